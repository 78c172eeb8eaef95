"""The deployers: one contract for all, and helr against the exhaustive search.

Placements as accelerate and vLLM take them.
"""

import json
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cost_model.devices import GIB, MIB, Cluster, Device, Link
from serving.cost_model.model import (
    DATASHEET,
    CostModel,
    ModelSizes,
    layers_by_device,
    read_profile,
)
from serving.deployment.command import main
from serving.deployment.deployers import (
    DEPLOYERS,
    Even,
    Exhaustive,
    Helr,
    Morphling,
    compositions,
    divide_by_shares,
    fill_in_order,
    objective,
    window_min,
)
from serving.deployment.placement import Infeasible, LatencyTerms, Need, make_placement
from tests.conftest import REPO_ROOT, tiny_config, tiny_model
from tests.warm import warm_python

GLM2 = ModelSizes.from_config("chatglm2-6b")
NEED = Need(kv_tokens_q90=8000, batch=8, prompt_tokens=35, output_tokens=300)


def deeper(layers: int) -> ModelSizes:
    """ChatGLM2-6B with another number of layers."""
    return replace(
        GLM2,
        layers=layers,
        kv_bytes_per_token=GLM2.kv_bytes_per_token // 28 * layers,
        attention_bytes_per_token=GLM2.attention_bytes_per_token // 28 * layers,
        parameters=GLM2.parameters + (layers - 28) * GLM2.layer_bytes // 2,
    )


def random_case(seed: int, devices: int, layers: int):
    """Different memory, speeds and links, at times two equal devices; some cases fit nowhere."""
    rng = np.random.default_rng(seed)
    size = 100 * MIB
    model = ModelSizes(
        layers,
        1024,
        1024,
        layers * 2048,
        layers * 4096,
        size,
        50 * MIB,
        51 * MIB,
        (layers * size + 101 * MIB) // 2,
        tied=bool(rng.integers(2)),
    )
    found = [
        Device(
            f"d{i}",
            int(rng.integers(2, 9 if seed % 4 else 14)) * size,
            float(rng.uniform(1e10, 1e12)),
            float(rng.uniform(1e12, 1e14)),
            reserved_bytes=0,
        )
        for i in range(devices)
    ]
    if devices > 2 and rng.random() < 0.4:
        found[2] = found[0]
    kinds = [
        Link(float(10 ** rng.uniform(8.5, 11)), float(10 ** rng.uniform(-6, -3))) for _ in range(3)
    ]
    links = tuple(
        tuple(None if i == j else kinds[rng.integers(3)] for j in range(devices))
        for i in range(devices)
    )
    need = Need(int(rng.integers(0, 20000)), *(int(rng.integers(1, top)) for top in (9, 200, 300)))
    profile = replace(
        DATASHEET,
        mapped_overhead_s=float(rng.choice([0, 1e-4])),
        cache_link_passes=float(rng.choice([0, 4])),
        hop_overhead_s=1e-4,
    )
    return model, Cluster(tuple(found), links), need, profile


def placed(name: str, case):
    """(placement, or None where the deployer says that none fits)."""
    try:
        return (DEPLOYERS[name] if isinstance(name, str) else name).place(*case)
    except Infeasible as error:
        assert "needs" in str(error) and "bytes" in str(error) and "there are" in str(error)
        return None


@pytest.mark.parametrize("name", DEPLOYERS)
def test_contract(name):
    """Each layer once, within memory, deterministic, latency from the cost model.

    Disjoint replicas.
    """
    answered = 0
    for seed in range(0, 96, 4):
        case = model, cluster, need, profile = random_case(seed, 1 + seed % 5, 6)
        placement = placed(name, case)
        if placement is None:
            continue
        answered += 1
        assert sum(placement.layers) == model.layers and min(placement.layers) >= 1
        assert len(set(placement.devices)) == len(placement.devices)
        layers = layers_by_device(placement.stages)
        for d, count in layers.items():
            ends = model.end_bytes(d == placement.devices[0], d == placement.devices[-1])
            held = (
                count
                * (
                    model.layer_bytes
                    + need.kv_tokens_q90 * model.kv_bytes_per_token // model.layers
                )
                + ends
            )
            assert placement.memory_bytes[d] == held <= cluster.devices[d].usable_bytes
        cost = CostModel.of(model, placement, profile)
        assert cost.kv_capacity_tokens >= need.kv_tokens_q90
        batch = [need.prompt_tokens] * need.batch, [need.output_tokens] * need.batch
        assert placement.expected_latency_s == cost.batch_s(*batch)
        assert LatencyTerms(model, cluster, need, profile).seconds(
            placement.devices, placement.layers
        ) == pytest.approx(placement.expected_latency_s)
        assert (
            0 < placement.utilisation <= 1
            and placement.search_steps >= 1
            and placement.deployer == name
        )
        copies = placement.replica_devices()
        assert len(copies) == placement.replicas >= 1 and copies[0] == placement.devices
        assert len({d for copy in copies for d in copy}) == len(copies) * len(layers)
        assert placed(name, case) == placement
        # A cost model is as good as its profile.
        assert DEPLOYERS[name].place(model, cluster, need, cost) == placement
    assert answered >= 3


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_helr_equals_exhaustive(weight):
    """200 random cases, up to 5 devices and 10 layers: the same optimum, or infeasible in both."""
    fits = 0
    for seed in range(200):
        case = model, cluster, need, profile = random_case(seed, 1 + seed % 5, 10 - seed % 3)
        values = []
        for deployer in (Helr(weight), Exhaustive(weight)):
            placement = placed(deployer, case)
            scale = LatencyTerms(*case).scale
            values.append(
                placement
                and objective(placement.expected_latency_s, len(placement.stages), scale, weight)
            )
        assert (values[0] is None) == (values[1] is None)
        if values[0] is not None:
            fits += 1
            assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert fits > 80


def test_one_weight_from_lr_to_he():
    fast, big = Device("fast", 6 * GIB, 2e12, 3e14), Device("big", 24 * GIB, 4e11, 1e14)
    cluster = Cluster.uniform([fast, fast, fast, big], link="nvlink3")
    lr, he = (DEPLOYERS[k].place(GLM2, cluster, NEED, DATASHEET) for k in ("lr", "he"))
    assert he.devices == (3,) and len(lr.devices) > 1
    assert lr.expected_latency_s < he.expected_latency_s and lr.utilisation < he.utilisation
    chain = [Helr(w).place(GLM2, cluster, NEED, DATASHEET) for w in np.linspace(0, 1, 11)]
    assert (chain[0].stages, chain[-1].stages) == (lr.stages, he.stages)
    assert all(
        b.expected_latency_s >= a.expected_latency_s * (1 - 1e-9) and len(b.stages) <= len(a.stages)
        for a, b in zip(chain, chain[1:])
    )
    with pytest.raises(ValueError, match="efficiency_weight must lie in"):
        Helr(1.5)


def test_helr_on_the_measured_cluster():
    """Of 4 RTX 3090 one holds ChatGLM2-6B.

    Splitting only costs, in measured runs and every search.
    """
    profile = read_profile("rtx3090")
    cluster = profile.cluster(4)
    found = {
        k: DEPLOYERS[k].place(GLM2, cluster, NEED, profile) for k in DEPLOYERS if k != "exhaustive"
    }
    assert all(
        found[k].layers == (28,) and found[k].replicas == 4
        for k in ("single", "he", "lr", "helr", "morphling")
    )
    assert found["even"].layers == (6, 8, 8, 6) and found["even"].replicas == 1
    assert found["even"].expected_latency_s > 1.5 * found["helr"].expected_latency_s


def test_eight_and_sixty_four_devices_in_time():
    """Best of two, in seconds of this process: the machine may be busy."""
    rng = np.random.default_rng(0)
    eight = [
        Device(f"d{i}", int(rng.integers(5, 12)) * GIB, float(rng.uniform(5e11, 2e12)), 1e14)
        for i in range(8)
    ]
    links = tuple(
        tuple(None if i == j else Link(float(rng.uniform(1e9, 1e11)), 1e-5) for j in range(8))
        for i in range(8)
    )
    kinds = [
        Device("a", 2 * GIB, 2e12, 1e14),
        Device("b", 3 * GIB, 1e12, 1e14),
        Device("c", 9 * GIB // 5, 3e12, 1e14),
        Device("d", 4 * GIB, 5e11, 1e14),
    ]
    group = [i // 16 for i in range(64)]
    wires = [
        [Link(1e11, 1e-6) if a == b else Link(1e10 * (1 + abs(a - b)), 1e-5) for b in range(4)]
        for a in range(4)
    ]
    many = Cluster(
        tuple(kinds[g] for g in group),
        tuple(
            tuple(None if i == j else wires[group[i]][group[j]] for j in range(64))
            for i in range(64)
        ),
    )
    assert [len(g) for g in many.groups] == [16] * 4
    for cluster, limit in ((Cluster(tuple(eight), links), 1.0), (many, 10.0)):
        took = []
        for _ in range(2):
            start = time.process_time()
            placement = DEPLOYERS["lr"].place(deeper(80), cluster, Need(20_000, 8), DATASHEET)
            took.append(time.process_time() - start)
        assert min(took) < limit and sum(placement.layers) == 80


def test_groups_change_nothing():
    """Equal devices are searched as counts.

    Slightly different ones singly, with the same answer.
    """
    device = Device("d", 5 * GIB, 1e12, 1e14)
    alike = Cluster.uniform([device] * 3 + [replace(device, bandwidth_bytes_s=5e11)] * 2)
    apart = Cluster.uniform([replace(d, name=f"d{i}") for i, d in enumerate(alike.devices)])
    assert [len(c.groups) for c in (alike, apart)] == [2, 5]
    for weight in (0.0, 0.4, 1.0):
        a, b = (Helr(weight).place(GLM2, c, NEED, DATASHEET) for c in (alike, apart))
        assert a.expected_latency_s == pytest.approx(b.expected_latency_s) and len(a.stages) == len(
            b.stages
        )


def test_infeasible_says_bytes():
    cluster = Cluster.uniform("RTX3090", 2)
    need = Need(kv_tokens_q90=2_000_000)
    kv = 28 * 1024 * 2_000_000
    for name in DEPLOYERS:
        with pytest.raises(
            ValueError,
            match=f"needs {GLM2.weight_bytes + kv:,} bytes .* "
            f"there are {2 * (24576 * MIB - GIB):,} bytes",
        ):
            DEPLOYERS[name].place(GLM2, cluster, need, DATASHEET)
    terms = LatencyTerms(GLM2, cluster, Need(500_000), DATASHEET)
    with pytest.raises(Infeasible, match="28 layers on device 0 need"):
        make_placement(terms, [(0, 28)], DATASHEET, 0, "by hand")
    for bad in ({"kv_tokens_q90": -1}, {"kv_tokens_q90": 1, "batch": 0}, {"kv_tokens_q90": 1.5}):
        with pytest.raises(ValueError, match="must be a whole number"):
            Need(**bad)
    with pytest.raises(ValueError, match="more than max_plans"):
        Exhaustive().place(GLM2, Cluster.uniform("RTX3090", 8), NEED, DATASHEET)


def test_even_moves_what_does_not_fit():
    small = Device("small", 3 * GIB, 1e12, 1e14)
    layers = Even().place(GLM2, Cluster.uniform(["A40", small, "A40"]), NEED, DATASHEET).layers
    assert layers[1] < 10 and sum(layers) == 28
    assert Even().place(GLM2, Cluster.uniform([small, "A40"]), NEED, DATASHEET).layers[0] < 13


def test_morphling_counts_its_stress_tests():
    rng = np.random.default_rng(1)
    cluster = Cluster.uniform(
        [
            Device(f"d{i}", int(rng.integers(3, 16)) * GIB, float(rng.uniform(4e11, 2e12)), 1e14)
            for i in range(24)
        ]
    )
    found = Morphling(stress_tests=30).place(GLM2, cluster, NEED, DATASHEET)
    assert found.search_steps == 30
    rate = {
        n: 1 / p.expected_latency_s / len(p.stages)
        for n in (30, 200)
        if (p := Morphling(stress_tests=n).place(GLM2, cluster, NEED, DATASHEET))
    }
    assert rate[30] >= 0.95 * rate[200]


# ---- what it hands on


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
@pytest.mark.parametrize("prefix", [False, True])
def test_device_map_covers_a_real_model(family, prefix):
    """accelerate places every parameter and buffer; the dispatched model answers as before."""
    import torch
    from accelerate import dispatch_model
    from accelerate.utils.modeling import check_device_map

    config = tiny_config(family)
    shape = ModelSizes.from_config(config.to_dict(), element_bytes=4)
    model = tiny_model(family, pre_seq_len=4 if prefix else None)
    size = shape.weight_bytes
    cluster = Cluster.uniform(
        [Device(n, 10 * size, 1e12, 1e14, reserved_bytes=0) for n in ("a", "b", "c")]
    )
    terms = LatencyTerms(shape, cluster, Need(10), DATASHEET)
    placement = make_placement(terms, [(0, 1), (2, 2)], DATASHEET, 0, "by hand")
    mapped = placement.to_device_map(family, prefix)
    check_device_map(model, mapped)
    assert set(mapped.values()) == {0, 2}
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert all(sum(n.startswith(key + ".") for key in mapped) == 1 for n in names)
    assert all(any(n.startswith(key + ".") for n in names) for key in mapped)
    layer = "transformer.layers." if family == "glm" else "transformer.encoder.layers."
    assert [mapped[f"{layer}{i}"] for i in range(3)] == [0, 2, 2]
    # Tied ends stay together, with the embedding.
    assert list(mapped.values())[-1] == (0 if shape.tied else 2)
    ids = torch.tensor([[7, 51, 54, 9]])
    before = model(ids).logits
    on_cpu = make_placement(
        LatencyTerms(shape, Cluster.uniform("CPU"), Need(10), DATASHEET),
        [(0, 3)],
        DATASHEET,
        0,
        "cpu",
    )
    exchange_rows = dispatch_model(model, on_cpu.to_device_map(family, prefix), force_hooks=True)
    assert torch.equal(exchange_rows(ids).logits, before)


def test_forms_for_others(tmp_path):
    cluster = Cluster.uniform(["CPU", "RTX3090", "RTX3090"])
    placement = make_placement(
        LatencyTerms(GLM2, cluster, NEED, DATASHEET),
        [(2, 14), (0, 4), (1, 10)],
        DATASHEET,
        0,
        "by hand",
    )
    mapped = placement.to_device_map()
    assert [mapped[f"transformer.encoder.layers.{i}"] for i in (0, 14, 18)] == [1, "cpu", 0]
    assert placement.to_pipeline_partition() == "14,4,10"
    placement.draw(tmp_path / "placement.png")
    assert (tmp_path / "placement.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="glm2 or glm3 model, not of glm"):
        placement.to_device_map("glm")
    with pytest.raises(ValueError, match="family must be one of"):
        placement.to_device_map("llama")
    woven = make_placement(
        LatencyTerms(GLM2, Cluster.uniform("A40", 2), NEED, DATASHEET),
        [(0, 10), (1, 10), (0, 8)],
        DATASHEET,
        0,
        "woven",
    )
    with pytest.raises(ValueError, match="returns to one"):
        woven.to_pipeline_partition()


# ---- the small functions


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_window_min(length, width, seed):
    values = np.random.default_rng(seed).normal(size=(2, length))
    wanted = [
        [min(row[max(0, m - width) : m], default=np.inf) for m in range(length)]
        for row in values.tolist()
    ]
    assert window_min(values, width).tolist() == wanted


@given(st.integers(1, 60), st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_divide(extra, shares):
    layers = divide_by_shares(len(shares) + extra, np.array(shares))
    assert sum(layers) == len(shares) + extra and min(layers) >= 1
    exact = np.array(shares) / sum(shares) * extra
    assert np.all(np.abs(np.array(layers) - 1 - exact) < 1)


def test_compositions_and_fill():
    assert sorted(compositions(4, 2)) == [(1, 3), (2, 2), (3, 1)]
    assert list(compositions(3, 1)) == [(3,)]
    assert (
        fill_in_order(np.array([5, 5, 5]), 7) == [5, 1, 1]
        and fill_in_order(np.array([2, 2]), 5) is None
    )


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(5, 14))
@settings(max_examples=30, deadline=None)
def test_no_deployer_beats_lr(seed, devices, layers):
    case = random_case(seed, devices, layers)
    best = placed("lr", case)
    for name in ("even", "single", "he", "helr", "morphling"):
        other = placed(name, case)
        assert other is None or (
            best and best.expected_latency_s <= other.expected_latency_s * (1 + 1e-9)
        )


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm_python(), "-m", "serving.deployment", *map(str, words)],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_says_where_layers_go(tmp_path, capsys):
    cluster, out, picture = tmp_path / "cluster.json", tmp_path / "out.json", tmp_path / "out.png"
    cluster.write_text(
        json.dumps({"devices": ["RTX3090", "RTX3090", "RTX3090", "RTX3090"], "link": "pcie3"})
    )
    words = [
        "--model",
        "chatglm-6b",
        "--cluster",
        cluster,
        "--need_tokens",
        30_000,
        "--batch",
        4,
        "--json",
        out,
        "--picture",
        picture,
    ]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    need = Need(30_000, 4)
    placement = DEPLOYERS["helr"].place(
        ModelSizes.from_config("chatglm-6b"), Cluster.from_json(cluster), need, DATASHEET
    )
    assert len(placement.stages) == placement.replicas == 2  # or the test has nothing to tell apart
    assert said["device_map"] == placement.to_device_map() and said["replicas"] == [[0, 1], [2, 3]]
    assert said["latency_per_token_s"] == pytest.approx(placement.expected_latency_s / 256)
    assert [(x["device"], x["needed_bytes"]) for x in said["devices"]] == list(
        placement.memory_bytes.items()
    )
    assert all(x["needed_bytes"] <= x["there_bytes"] == 23 * GIB for x in said["devices"])
    for piece in (
        "28 layers on 2 of 4 device(s), 2 replica(s)",
        "0,1 | 2,3",
        f"VLLM_PP_LAYER_PARTITION={placement.to_pipeline_partition()} ",
        f"device_map: {json.dumps(said['device_map'])}",
        f"utilisation {placement.utilisation:.1%}",
    ):
        assert piece in done.stdout, piece
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = run(*words, "--deployer", "single")
    assert (
        done.returncode == 1
        and "no device holds the model" in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not done.stdout
    )
    assert main([*map(str, words), "--profile", "nope"]) == 1
    assert "no profile 'nope'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--gpus", "2"])
    assert end.value.code == 2 and "leave out --device and --gpus" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1.5", "x", "9" * 400])
@pytest.mark.parametrize(
    "flag", ["--gpus", "--need_tokens", "--batch", "--prompt_tokens", "--output_tokens"]
)
def test_p2_numbers_that_are_none(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([flag, value])
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and said.count("\n") == 1
        and f"{flag}: wanted a whole number from 1" in said
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "not valid JSON"),
        ("[]", "wanted an object"),
        ("{}", "not a cluster: 'devices'"),
        ('{"devices": []}', "from 1 to 1024 devices, got 0"),
        ('{"devices": 5}', "not a cluster"),
        ('{"devices": ["x"]}', "no device 'x'"),
        ('{"devices": [5]}', "not a cluster"),
        ('{"devices": ["A40"], "link": "string"}', "no link 'string'"),
        ('{"devices": ["A40"], "links": 5}', "not a cluster"),
        (
            '{"devices": ["A40", "A40"], "links": [[null, null], [null, null]]}',
            "there is none from device 0 to device 1",
        ),
        (
            '{"devices": ["A40"], "link": {"bandwidth_bytes_s": NaN, "latency_s": 0}}',
            "a link needs bandwidth_bytes_s above 0",
        ),
        (
            '{"devices": [{"name": "x", "memory_bytes": Infinity, '
            '"bandwidth_bytes_s": 1, "flops_s": 1}]}',
            "memory_bytes must be a number above 0",
        ),
    ],
)
def test_p2_clusters_that_are_none(content, said, tmp_path, capsys):
    (tmp_path / "cluster.json").write_text(content)
    assert main(["--cluster", str(tmp_path / "cluster.json")]) == 1
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1 and "cluster.json" in printed
