"""The cost model: real sizes, laws, a fit that recovers its input, measured runs, the command."""

import csv
import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cost_model.command import main
from serving.cost_model.devices import DEVICES, GIB, Cluster, Device, Link, find_device, read_device
from serving.cost_model.fit import (
    Measurement,
    fit_profile,
    named_stages,
    read_measurements,
    relative_errors,
    row_seconds,
    summarize_errors,
)
from serving.cost_model.model import (
    COEFFICIENTS,
    DATASHEET,
    CostModel,
    ModelSizes,
    Profile,
    even_stages,
    read_profile,
)
from tests.conftest import REPO_ROOT, SPECIAL, shared_file, tiny_config, tiny_model
from tests.warm import warm_python

ROOT = REPO_ROOT
GLM2 = ModelSizes.from_config("chatglm2-6b")
GLM1 = ModelSizes.from_config("chatglm-6b")
ROUGH = Profile(
    mapped_overhead_s=2e-4,
    hop_overhead_s=1e-3,
    cache_link_passes=2.0,
    attention_passes=3.0,
    sequence_overhead_s=1e-4,
    batch_overhead_s=1e-3,
    step_overhead_s=1e-4,
    startup_s=1.0,
    startup_device_s=0.5,
)


def on(*names: str, stages=None, profile=ROUGH, model=GLM2) -> CostModel:
    return CostModel(
        model, Cluster.uniform(names), stages or even_stages(model.layers, len(names)), profile
    )


def test_real_sizes():
    """ChatGLM-6B keeps 448 KiB of keys and values a token, ChatGLM2-6B 28 KiB.

    With the first vocabulary ChatGLM-6B has 6.26 billion parameters.
    """
    assert (GLM1.kv_bytes_per_token, GLM2.kv_bytes_per_token) == (448 * 1024, 28 * 1024)
    assert GLM2.attention_bytes_per_token == 448 * 1024
    assert (GLM1.parameters, GLM2.parameters) == (6_255_206_400, 6_243_584_000)
    assert GLM2.weight_bytes == 28 * GLM2.layer_bytes + GLM2.embedding_bytes + GLM2.output_bytes
    assert GLM1.tied and GLM1.weight_bytes == 28 * GLM1.layer_bytes + GLM1.output_bytes
    path = shared_file("data/chatglm2-tokenizer/config.json")
    assert (
        ModelSizes.from_config(path) == ModelSizes.from_config(json.loads(path.read_text())) == GLM2
    )


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
def test_bytes_are_the_models(family):
    shape = ModelSizes.from_config(tiny_config(family).to_dict(), element_bytes=4)
    model = tiny_model(family)
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    layers = model.transformer.layers if family == "glm" else model.transformer.encoder.layers
    assert shape.layer_bytes == sum(p.numel() * p.element_size() for p in layers[0].parameters())
    ids = torch.tensor([[7, SPECIAL["gmask"], SPECIAL["sop"], 9]])
    cache = model(ids, use_cache=True).past_key_values
    assert shape.kv_bytes_per_token * ids.numel() == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )


def test_a_step_by_hand():
    """One GPU of 1e12 B/s: (weights without the embedding + KV) / bandwidth, nothing else."""
    profile = Profile(weight_passes=1, kv_passes=1, layer_overhead_s=0)
    device = Device("one", 24 * GIB, 1e12, 1e14)
    step = CostModel.of(GLM2, device, profile).decode_step_s(4, 1000)
    assert step == pytest.approx(
        (GLM2.weight_bytes - GLM2.embedding_bytes + 1000 * 28 * 1024) / 1e12, rel=1e-12
    )
    # Prompts of 4,000 tokens are bound by products: 2 P tokens, and causal attention's 2 layers
    # hidden tokens^2.
    read = CostModel.of(GLM2, device, replace(profile, compute_passes=1)).prefill_s(4000)
    work = (
        28 * (2 * GLM2.layer_bytes / 2 * 4000 + 2 * 4096 * 4000**2) / 1e14
        + GLM2.output_bytes / 1e12
    )
    assert read == pytest.approx(work, rel=1e-12)


def test_two_devices_by_hand():
    """A split adds two hops a pass, the map's overhead, and remote layers' cache over the link."""
    link = Link(1e10, 1e-4)
    plain = Profile(
        hop_overhead_s=1e-3,
        mapped_overhead_s=1e-4,
        cache_link_passes=2,
        startup_s=1,
        startup_device_s=0.25,
    )
    cluster = Cluster.uniform("A40", 2, link=link)
    one, two = (
        CostModel(GLM2, cluster, [(0, 28)], plain),
        CostModel(GLM2, cluster, [(0, 13), (1, 15)], plain),
    )
    more = 2 * (1e-3 + 1e-4 + 8 * 8192 / 1e10) + 28 * 1e-4 + 2 * 5000 * 28 * 1024 * 15 / 28 / 1e10
    assert two.decode_step_s(8, 5000) - one.decode_step_s(8, 5000) == pytest.approx(more)
    assert (one.startup_s, two.startup_s) == (1, 1.25)


def test_capacity():
    alone = on("RTX3090")
    assert alone.kv_capacity_tokens == (24576 * 2**20 - GIB - GLM2.weight_bytes) // (28 * 1024)
    assert on("RTX3090", "RTX3090").kv_capacity_tokens > 2 * alone.kv_capacity_tokens
    small = CostModel.of(GLM2, Device("small", 8 * GIB, 1e12, 1e14))
    assert small.kv_capacity_tokens == 0
    # Tied ends lie together on the first device.
    tied = on("RTX3090", "RTX3090", model=GLM1)
    assert [tied.weight_bytes_on(d) for d in (0, 1)] == [
        13 * GLM1.layer_bytes + GLM1.output_bytes,
        15 * GLM1.layer_bytes,
    ]


chains = st.sampled_from([("RTX3090",), ("RTX3090", "A40"), ("A100-40G", "H100", "A40", "CPU")])


@given(
    chains,
    st.integers(1, 64),
    st.integers(0, 100_000),
    st.integers(0, 400),
    st.sampled_from([GLM1, GLM2]),
)
@settings(max_examples=60, deadline=None)
def test_decode_is_the_sum_of_its_steps(names, batch, context, steps, model):
    cost = on(*names, model=model)
    total = sum(cost.decode_step_s(batch, context + batch * i) for i in range(steps))
    assert cost.decode_s(batch, context, steps) == pytest.approx(total, rel=1e-9)


@given(
    chains,
    st.integers(1, 3000),
    st.integers(0, 3000),
    st.integers(1, 500),
    st.sampled_from([GLM1, GLM2]),
)
@settings(max_examples=60, deadline=None)
def test_chunks_share_their_pass(names, tokens, start, rows, model):
    """Alone a chunk is a prefill; beside others it costs less.

    However a pass is cut into chunks, it costs the same.
    """
    cost = on(*names, model=model)
    assert cost.chunk_s(tokens) == pytest.approx(cost.prefill_s(tokens))
    assert 0 < cost.chunk_s(tokens, start, rows) <= cost.chunk_s(tokens, start)
    overhead = cost.profile.sequence_overhead_s
    apart = (
        cost.chunk_s(tokens, start, rows)
        + cost.chunk_s(7, start + tokens, rows + tokens)
        - overhead
    )
    assert cost.chunk_s(tokens + 7, start, rows) == pytest.approx(apart)


@given(chains, st.integers(1, 64), st.integers(1, 4000), st.integers(1, 500), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_more_is_never_sooner(names, batch, prompt, answer, extra):
    cost = on(*names)
    assert cost.decode_step_s(batch + extra, 100) >= cost.decode_step_s(batch, 100) > 0
    assert cost.decode_step_s(batch, 100 + extra) > cost.decode_step_s(batch, 100)
    assert (
        cost.prefill_s(batch * (prompt + extra), batch) >= cost.prefill_s(batch * prompt, batch) > 0
    )
    base = cost.batch_s([prompt] * batch, [answer] * batch)
    assert cost.batch_s([prompt] * batch, [answer + extra] * batch) > base
    assert cost.batch_s([prompt] * (batch + extra), [answer] * (batch + extra)) >= base
    # Padding: a batch is as slow as one of its longest prompt and answer.
    mixed = cost.batch_s([prompt] + [1] * (batch - 1), [answer] + [1] * (batch - 1))
    assert mixed == pytest.approx(base)


@given(
    chains,
    st.floats(1, 8),
    st.sampled_from(["bandwidth_bytes_s", "flops_s"]),
    st.integers(1, 32),
    st.integers(1, 2000),
)
@settings(max_examples=40, deadline=None)
def test_a_better_device_or_link_is_never_slower(names, factor, field, batch, tokens):
    cost = on(*names)
    better = [replace(DEVICES[n], **{field: factor * getattr(DEVICES[n], field)}) for n in names]
    faster = CostModel(GLM2, Cluster.uniform(better), cost.stages, ROUGH)
    linked = CostModel(
        GLM2, Cluster.uniform(names, link=Link(24e9 * factor, 10e-6)), cost.stages, ROUGH
    )
    for other in (faster, linked):
        assert other.batch_s([tokens] * batch, [50] * batch) <= cost.batch_s(
            [tokens] * batch, [50] * batch
        ) * (1 + 1e-12)


def test_nothing_takes_no_time():
    cost = on("A40")
    assert (
        cost.prefill_s(0)
        == cost.decode_step_s(0, 0)
        == cost.decode_s(4, 100, 0)
        == cost.batch_s([], [])
        == 0.0
    )
    with pytest.raises(ValueError, match="as many output lengths as prompts"):
        cost.batch_s([1, 2], [1])
    with pytest.raises(ValueError, match="28 layers, got 27"):
        CostModel(GLM2, Cluster.uniform("A40"), [(0, 27)])


def test_named_placements():
    shares = {
        1: [28],
        2: [13, 15],
        3: [8, 10, 10],
        4: [6, 8, 8, 6],
        7: [3, 5, 5, 5, 5, 5],
        8: [2, 4, 4, 4, 4, 4, 4, 2],
    }
    assert {g: [n for _, n in even_stages(28, g)] for g in shares} == shares
    assert named_stages("lr", 4, 28) == (((0, 28),), True)
    stages, mapped = named_stages("he", 4, 28)
    assert mapped and len(stages) == 28 and stages[:2] == ((1, 1), (0, 1))
    assert named_stages("10,18", 2, 28)[0] == ((0, 10), (1, 18))
    for bad in ("best", "10,10", "7,7,14", "he"):
        with pytest.raises(ValueError, match="placement"):
            named_stages(bad, 2 if bad != "he" else 1, 28)


def test_own_devices(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(
        json.dumps(
            {"name": "card", "memory_bytes": 2**34, "bandwidth_bytes_s": 1e12, "flops_s": 1e14}
        )
    )
    assert find_device(str(path)) == read_device(path) == Device("card", 2**34, 1e12, 1e14)
    cluster = Cluster.uniform([str(path), "A40", "A40"])
    (tmp_path / "cluster.json").write_text(json.dumps(cluster.to_json()))
    assert Cluster.from_json(tmp_path / "cluster.json") == cluster
    assert cluster.groups == [[0], [1, 2]]
    for text, message in (
        ("[]", "wanted an object"),
        ("{", "not valid JSON"),
        ('{"colour": 1}', "unknown field 'colour'"),
        ("{}", "not a device"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_device(path)
    with pytest.raises(ValueError, match="memory_bytes must be a number above 0"):
        Device("none", 0, 1.0, 1.0)


# ---- calibration


def made_up(count: int, profile: Profile, slow: float = 0.0) -> list[Measurement]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        row = Measurement(
            1.0,
            int(rng.choice([1, 1, 4, 16, 30])),
            int(rng.integers(100, 1500)),
            int(rng.integers(1, 5)),
            str(rng.choice(["", "", "single"])),
        )
        noise = 1.2 if i < slow * count else float(np.exp(rng.normal(0, 0.005)))
        rows.append(replace(row, seconds=row_seconds(row, profile) * noise))
    return rows


def test_fit_finds_the_profile_despite_slow_runs():
    truth = replace(ROUGH, device="RTX3090", link="pcie3", attention_passes=4.0, startup_s=1.5)
    rows = made_up(60, truth, slow=0.1)
    found = fit_profile(rows[:50], replace(DATASHEET, device="RTX3090", link="pcie3"))
    assert np.median(np.abs(relative_errors(rows[50:], found))) < 0.01
    assert np.max(np.abs(relative_errors(rows[50:], found))) < 0.03
    assert found.startup_s == pytest.approx(
        1.5, rel=0.1
    ) and found.attention_passes == pytest.approx(4, rel=0.1)


def test_profile_on_the_measured_rows(tmp_path):
    rows = shared_file("data/uellm/measured_3090.csv")
    assert (
        main(
            [
                "evaluate",
                "--profile",
                "rtx3090",
                "--rows",
                str(rows),
                "--json",
                str(tmp_path / "out.json"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["rows"] == 135
        and found["median_abs_error"] <= 0.03
        and found["p90_abs_error"] <= 0.10
    )
    # Not fitted: the same with two of seven questions and two batch sizes left out.
    usable, skipped = read_measurements(rows)
    assert len(skipped) == 1
    held = [row.query in ("q2", "q3") or row.batch in (10, 25) for row in usable]
    start = replace(DATASHEET, device="RTX3090", link="pcie3")
    profile = fit_profile([row for row, out in zip(usable, held) if not out], start)
    unseen = summarize_errors(
        relative_errors([row for row, out in zip(usable, held) if out], profile)
    )
    assert (
        unseen["rows"] == 37
        and unseen["median_abs_error"] <= 0.03
        and unseen["p90_abs_error"] <= 0.10
    )


def test_p3_the_fit_gives_the_shipped_profile():
    """scipy's NNLS on the rows that serving/cost_model/profiles/rtx3090.json was fitted to."""
    rows, _ = read_measurements(shared_file("data/uellm/measured_3090.csv"))
    found, shipped = (
        fit_profile(rows, replace(DATASHEET, device="RTX3090", link="pcie3")),
        read_profile("rtx3090"),
    )
    for name in COEFFICIENTS:
        assert getattr(found, name) == pytest.approx(getattr(shipped, name), rel=1e-4, abs=1e-12), (
            name
        )


def test_profile_on_whole_runs():
    """Runs of 10 to 30 batches in one process, none of them fitted: one start-up.

    The rest adds up.
    """
    profile, found = read_profile("rtx3090"), []
    with open(shared_file("data/uellm/measured.csv"), encoding="utf-8-sig", newline="") as file:
        for run in csv.DictReader(file):
            if "UELM/baseline/" in run["path"] or "UELM-deploy" in run["path"]:
                cost = CostModel(GLM2, profile.cluster(1), [(0, 28)], profile)
                shapes = (map(int, shape.split("x")) for shape in run["batch_shapes"].split(";"))
                seconds = cost.startup_s + sum(
                    cost.batch_s([35] * batch, [steps] * batch) for batch, steps in shapes
                )
                found.append(seconds / float(run["time_s"]) - 1)
    assert len(found) == 10 and np.median(np.abs(found)) <= 0.03


HEAD = "gpus,batch_size,placement,seconds,output_tokens\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("gpus,seconds\n1,2\n", "column 'batch_size' is missing"),
        (HEAD, "holds no row"),
        (HEAD + "1,1,,,200\n", "holds no row"),
        (
            HEAD + "1,1,,5.0,200\n1,1,,abc,200\n",
            "line 3: seconds must be a number above 0, got 'abc'",
        ),
        (HEAD + "0,1,,5.0,200\n", "line 2: gpus must be a whole number from 1 to 1024, got '0'"),
        (HEAD + "1,1,,nan,200\n", "line 2: seconds must be a number above 0, got 'nan'"),
        (HEAD + "1,2.5,,5.0,200\n", "line 2: batch_size must be a whole number"),
        (
            HEAD + "1,1e30,,5.0,200\n",
            "line 2: batch_size must be a whole number from 1 to 1e+09, got '1e30'",
        ),
        (
            HEAD + "1000000,1,,5.0,200\n",
            "line 2: gpus must be a whole number from 1 to 1024, got '1000000'",
        ),
        (HEAD + "1,1,sideways,5.0,200\n", "line 2: placement must be"),
    ],
)
def test_bad_rows_are_one_clear_line(tmp_path, capsys, text, message):
    (tmp_path / "rows.csv").write_text(text)
    assert (
        main(
            ["evaluate", "--rows", str(tmp_path / "rows.csv"), "--json", str(tmp_path / "out.json")]
        )
        == 1
    )
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "wanted an object"),
        ('{"speed": 1}', "not a profile"),
        ('{"kv_passes": -1}', "at least 0"),
        (None, "no profile"),
    ],
)
def test_bad_profiles(tmp_path, capsys, content, message):
    path = tmp_path / "profile.json"
    if content:
        path.write_text(content)
    assert main(["predict", "--profile", str(path), "--output-tokens", "10"]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"device": "none"}', "no device 'none'"),
        ('{"device": 3}', "device and link are text or an object"),
        ('{"device": {"name": "x"}}', "not a device or link"),
        ('{"link": "string"}', "no link 'string'; known are pcie3"),
        ('{"link": []}', "device and link are text or an object"),
        ('{"kv_passes": NaN}', "at least 0"),
        (
            '{"device": {"name": ["x"], "memory_bytes": 1, "bandwidth_bytes_s": 1, "flops_s": 1}}',
            "name must be text",
        ),
        (
            '{"device": {"name": "x", "memory_bytes": 1e400, '
            '"bandwidth_bytes_s": 1, "flops_s": 1}}',
            "memory_bytes must be a number above 0",
        ),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_p2_profiles_that_are_none(tmp_path, capsys, content, message):
    (tmp_path / "profile.json").write_text(content)
    assert (
        main(["predict", "--profile", str(tmp_path / "profile.json"), "--output-tokens", "10"]) == 1
    )
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1.5", "x", "9" * 400])
@pytest.mark.parametrize("flag", ["--gpus", "--batch", "--output-tokens", "--prompt-tokens"])
def test_p2_numbers_that_are_none(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "--output-tokens", "10", flag, value])
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and said.count("\n") == 1
        and f"{flag}: wanted a whole number from 1" in said
    )


def test_p2_large_numbers_take_no_memory(capsys):
    assert (
        main(
            [
                "predict",
                "--output-tokens",
                "1000000000",
                "--batch",
                "1000000000",
                "--prompt-tokens",
                "1000000000",
            ]
        )
        == 0
    )
    assert float(capsys.readouterr().out.split()[0]) > 1e9


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm_python(), "-m", "serving.cost_model", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path):
    def seconds(*more: str) -> float:
        done = run("predict", "--gpus", "2", "--batch", "8", "--output-tokens", "256", *more)
        assert done.returncode == 0, done.stderr
        assert (
            "8 x (35 + 256) tokens of chatglm2-6b on 2 x RTX3090" in done.stdout
            and done.stdout.split()[1] == "s:"
        )
        return float(done.stdout.split()[0])

    assert 5 < seconds("--warm") < seconds() < seconds("--placement", "he") < 60
    with open(tmp_path / "rows.csv", "w") as file:
        file.write(
            "seconds,batch_size,output_tokens,gpus,colour,phase,prompt_tokens,context_tokens\n"
        )
        for row in made_up(12, replace(DATASHEET, device="A40")):
            file.write(
                f"{row.seconds},{row.batch},{row.output_tokens},{row.gpus},red,,,\n"
                if not row.placement
                else ""
            )
        file.write("0.2,1,,1,,prefill,2000,\n0.05,4,2,1,,decode,,500\n")
    out = tmp_path / "own.json"
    done = run("fit", "--rows", str(tmp_path / "rows.csv"), "--output", str(out), "--device", "A40")
    assert done.returncode == 0 and "in_sample" in done.stdout, done.stderr
    assert json.loads(out.read_text())["device"] == "A40"
    done = run(
        "evaluate",
        "--profile",
        str(out),
        "--rows",
        str(tmp_path / "rows.csv"),
        "--json",
        str(tmp_path / "e.json"),
    )
    assert done.returncode == 0 and set(json.loads((tmp_path / "e.json").read_text())) == {
        "rows",
        "median_abs_error",
        "p90_abs_error",
    }
