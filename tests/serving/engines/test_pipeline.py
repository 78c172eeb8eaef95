"""A pipeline answers as the engine on one device, and its processes end when they should.

Most tests run the workers as threads of this process, over the same links; a few start processes,
which takes seconds.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch

import serving.engines.arena
from chatglm import load_model
from finetune.placing import ReplicaSpec, StageSpec
from serving.engines import Sampling, pipeline_runner, prefix_sharing
from serving.engines.adapter_errors import UnknownAdapter
from serving.engines.arena import Arena
from serving.engines.bodies import decoder_layers
from serving.engines.kv_memory import KvMemory, LoggedMemory
from serving.engines.pipeline import open_pipeline
from serving.engines.stage_links import HiddenLink
from serving.engines.stage_process import NEIGHBOUR_ENDED, StageWorker
from serving.engines.stage_reports import ModelLoading
from serving.policies.continuous import POLICIES
from serving.request import Limits, Plan, Record, Request
from serving.simulate.engine import LinearCost
from tests.causal_folders import random_causal_model
from tests.conftest import REPO_ROOT, VARIANTS, tiny_model
from tests.finetune.runs import child_env
from tests.serving.engines.test_engines import (
    SMALL,
    STOPS,
    Chaos,
    Row,
    alone,
    engine_of,
    model_of,
    prompt_of,
    serve,
    some,
)
from tests.serving.engines.test_prefix_sharing import alike
from tests.serving.lora_folders import merged_model, write_adapter
from tests.warm import warm_python

GLM_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# (model, prefix, first layers of the stages after the first, micro-batches)
CASES = [
    ("glm", "v1", (1,), 1),
    ("glm2", "plain", (1, 2), 4),
    ("glm2", "v2", (1,), 2),
    ("glm4", "plain", (2,), 2),
    ("qwen2", "plain", (1,), 4),  # tied
]
SLOW_CASES = [
    ("glm", "plain", (1,), 2),
    ("glm", "v2", (1, 2), 3),
    ("glm2", "v1", (2,), 2),
    ("glm2-multi_head-linear_biases", "plain", (2,), 2),
    ("glm3", "plain", (1,), 1),
    ("native-glm2", "plain", (1,), 2),
    ("native-glm4", "plain", (2,), 3),
    ("llama", "plain", (1,), 2),
    ("qwen3", "plain", (1,), 1),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


@pytest.fixture(autouse=True)
def small_classes(monkeypatch):
    monkeypatch.setattr(serving.engines.arena, "SMALLEST_SLAB", 4)


class ThreadedStage(StageWorker):
    """A worker that is a thread, and ends alone."""

    def end(self):
        raise SystemExit


def quietly(task):
    with contextlib.suppress(SystemExit):
        task()


class ThreadWorker(pipeline_runner.Worker):
    """A stage in this process; it stands for its process too."""

    def start_process(self, *sockets):
        control, *links = [Connection(end.detach()) for end in sockets]
        stage = ThreadedStage(control, *map(HiddenLink, links))
        threading.Thread(target=quietly, args=[stage.watch], daemon=True).start()
        self.thread = threading.Thread(target=self.run_stage, args=[stage], daemon=True)
        self.thread.start()
        self.stage_worker = stage
        return self

    def run_stage(self, stage):
        try:
            stage.load()
            stage.run()
        except SystemExit:
            pass
        finally:
            stage.incoming.close()
            stage.outgoing.close()

    def wait(self, timeout_s):
        self.thread.join(timeout_s)
        return NEIGHBOUR_ENDED

    def kill(self):
        raise AssertionError("the stage's thread has not ended")


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(pipeline_runner, "Worker", ThreadWorker)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a thread that waits for its neighbour's should not wait 5 ms
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def opened():
    """opened(...): an engine that is closed after the test."""
    engines = []

    def of(*args, **options):
        engines.append(open_engine(*args, **options))
        return engines[-1]

    yield of
    for engine in engines:
        engine.close()


def stages_of(layers, cuts, threads=1):
    bounds = [0, *cuts, layers]
    return ReplicaSpec(tuple(StageSpec("cpu", a, b, threads) for a, b in zip(bounds, bounds[1:])))


def open_engine(
    folder, layers, cuts, lanes=None, mode=None, limits=SMALL, stops=STOPS, prefix=0, **more
):
    """A pipeline of CPU stages."""
    loading = ModelLoading(str(folder), mode=mode, **{"precision": "fp32"} | more)
    return open_pipeline(
        loading,
        stages_of(layers, cuts),
        limits,
        LinearCost(kv_capacity_tokens=limits.kv_tokens),
        stop_ids=stops,
        prefix_cache_tokens=prefix,
        micro_batches=lanes,
    )


def saved(model, folder):
    """(folder, layers, mode) of a model."""
    model.save_pretrained(folder)
    family = getattr(model.config, "glm_family", "causal")
    return folder, len(decoder_layers(model)), family


def check_alone(model, asked, answers):
    for i, (prompt, sampling) in asked.items():
        assert answers[i].tokens == alone(model, prompt, sampling.max_new_tokens)


def check_empty(engine):
    """Nothing is left of the answers, and the stages' layouts are the driver's."""
    assert not engine.rows and not engine._answers and not engine._in_flight
    for lane in engine.runner.lanes:
        assert not lane.prefills
        for slab in lane.arena.slabs.values():
            assert not slab.rows and not slab.decoding


@pytest.mark.parametrize("variant, prefix, cuts, lanes", CASES)
def test_tokens_are_those_made_alone(threads, opened, tmp_path, variant, prefix, cuts, lanes):
    """Random plans with preemptions, overruns and odd chunks; then static batches."""
    model = model_of(variant, prefix)
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, cuts, lanes, mode)
    asked = some(model, 9, 1)
    answers, events = serve(engine, Chaos(1), asked)
    check_alone(model, asked, answers)
    check_empty(engine)
    kinds = [event.kind for event in events]
    assert kinds.count("preempted") > 1 and kinds.count("overran") > 1
    asked = some(model, 3, 1)
    answers, _ = serve(engine, Chaos(7, together=True), asked)
    check_alone(model, asked, answers)
    passes = [report.passes for report in engine.stage_reports()]
    assert min(passes) == max(passes) > 50


QUICK = ("fcfs", "sjf", "deadline")
EVERY_POLICY = []
for name in POLICIES:
    EVERY_POLICY.append(pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]))


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_every_policy_answers_whole(threads, opened, tmp_path, policy):
    model = model_of("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    limits = Limits(max_batch=4, kv_tokens=160, max_tokens=60, prefill_tokens=16)
    engine = opened(folder, layers, (1,), 2, mode, limits)
    asked = some(model, 10, 5)
    answers, _ = serve(engine, POLICIES[policy], asked)
    check_alone(model, asked, answers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["glm2", "qwen2"])
def test_prefixes_are_shared(threads, opened, tmp_path, monkeypatch, variant):
    """Within a lane, and kept by one for all; untied and tied."""
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 4)
    model = model_of(variant)
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, (1,), 2, mode, prefix=50)
    for seed in range(2):
        asked = alike(model, 14, seed)
        answers, _ = serve(engine, Chaos(seed), asked)
        check_alone(model, asked, answers)
    assert engine.prefixes.copied_tokens > 100 and engine.prefixes.kept


def test_sampling_and_readings_are_the_same(threads, opened, tmp_path):
    """Seeded samples, log probabilities of answers and prompts, and embeddings."""
    model = model_of("glm3")
    folder, layers, mode = saved(model, tmp_path / "model")
    options = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.2, "top_p": 0.8, "seed": 4, "logprobs": 2},
        {"prompt_logprobs": 2},
        {"embeds": True},
        {"repetition_penalty": 1.3, "prompt_logprobs": 0, "embeds": True},
    ]
    asked = {}
    for i in range(10):
        asked[i] = prompt_of(model, 6 + 2 * i, i), Sampling(9, **options[i % 5])
    wanted, _ = serve(engine_of("continuous", model), Chaos(1), asked)
    answers, _ = serve(opened(folder, layers, (2,), 2, mode), Chaos(2), asked)
    for i in asked:
        one, here = wanted[i], answers[i]
        assert here.tokens == one.tokens
        assert len(here.prompt_logprobs) == len(one.prompt_logprobs)
        for mine, other in zip(here.prompt_logprobs[1:], one.prompt_logprobs[1:]):
            assert mine.chosen == pytest.approx(other.chosen, abs=1e-3)
        if one.embedding is not None:
            torch.testing.assert_close(here.embedding, one.embedding, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["glm2", "qwen2"])
def test_a_failed_row_harms_nobody_else(threads, opened, tmp_path, variant):
    """Also where it is cancelled, or preempted, while its pass is in flight."""
    if variant == "glm2":
        model = tiny_model("glm2", seed=3)
    else:
        model = random_causal_model("qwen2", vocab_size=100, tie_word_embeddings=False)
    prompts = [prompt_of(model, 5 + i, i) for i in range(4)]
    expected = [alone(model, prompt, 10, []) for prompt in prompts]
    used = set(sum(prompts + expected, []))
    bad = min(set(range(60)) - used)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, (1,), 2, mode, stops=[])
    asked = {}
    for i, prompt in enumerate(prompts):
        asked[i] = prompt, Sampling(10)
        asked[10 + i] = [bad, *prompt[1:]], Sampling(10)
    for _ in range(2):
        answers, _ = serve(engine, POLICIES["fcfs"], dict(sorted(asked.items())))
        for i in range(4):
            assert answers[i].tokens == expected[i]
            assert answers[10 + i].reason == "failed" and not answers[10 + i].tokens


@pytest.mark.parametrize("seed", [0, *[pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3)]])
def test_cancelled_answers_change_no_others(threads, opened, tmp_path, seed):
    model = model_of("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, (1,), 3, mode)
    asked = {i: (p, Sampling(max_new_tokens=30)) for i, (p, _) in some(model, 12, 7).items()}
    gone = random.Random(seed).sample(range(12), 4)
    timer = threading.Timer(0.05 * seed, lambda: [engine.cancel(i) for i in gone])
    timer.start()
    answers, events = serve(engine, Chaos(seed), asked)
    timer.join()
    for i, (prompt, _) in asked.items():
        whole = alone(model, prompt, 30)
        assert answers[i].tokens == whole[: len(answers[i].tokens)]
        assert i in gone or answers[i].tokens == whole
    assert [event.kind for event in events].count("finished") == 12
    check_empty(engine)


def test_horizon_and_budget_bound_a_step(threads, opened, tmp_path):
    model = model_of("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, (1,), 2, mode, stops=[])
    records, reserve = [], {}
    for i in range(4):
        request = Request(i, 5, 0.0, 100.0)
        engine.submit(request, prompt_of(model, 5, i), Sampling(20))
        records.append(Record(request))
        reserve[i] = 40
    result = engine.step(Plan(tuple(records), (), reserve, horizon_steps=1))
    assert result.emitted_tokens == 4 and len(result.started) == 4
    assert engine.step(Plan(horizon_steps=3)).emitted_tokens == 12
    assert 1 <= engine.step(Plan(), budget_s=0.0).emitted_tokens <= 4
    while engine.rows:
        engine.step(Plan())
    check_empty(engine)


@pytest.mark.parametrize("kind", ["glm", "glm2", "llama"])
def test_adapters_of_rows(threads, opened, tmp_path, kind):
    """Loaded and unloaded in all stages; an adapter that does not fit is in none."""
    if kind == "llama":
        model, family, layers = random_causal_model("llama", vocab_size=100), "causal", None
        targets = ("q_proj", "v_proj", "down_proj")
    else:
        family, changes = VARIANTS[kind]
        model, targets = tiny_model(family, **changes), GLM_LAYERS
    folder, layers, mode = saved(model, tmp_path / "base")
    engine = opened(folder, layers, (1,), 2, mode)
    merged = {None: model}
    for seed, name in enumerate(("a", "b")):
        adapter = write_adapter(tmp_path / name, model, seed, targets, 2 + seed)
        engine.adapters.load(name, adapter)
        merged[name] = merged_model(folder, adapter, tmp_path / f"merged-{name}", family)
    asked = {}
    for i, (prompt, sampling) in some(model, 12, 4).items():
        asked[i] = prompt, replace(sampling, adapter=("a", "b", None)[i % 3])
    answers, _ = serve(engine, Chaos(4), asked)
    for i, (prompt, sampling) in asked.items():
        wanted = alone(merged[sampling.adapter], prompt, sampling.max_new_tokens)
        assert answers[i].tokens == wanted
    stages = [engine.runner.stage, *[w.stage_worker.stage for w in engine.runner.workers]]
    assert all(stage.adapters._stacks for stage in stages)
    engine.adapters.unload("a")
    engine.adapters.unload("b")
    assert not any(stage.adapters._stacks for stage in stages)
    with pytest.raises(UnknownAdapter):
        request = Request(0, 4, 0.0, 1.0)
        engine.submit(request, prompt_of(model, 4, 0), Sampling(2, adapter="a"))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError):
        engine.adapters.load("a", tmp_path / "a")
    assert not any(stage.adapters._stacks for stage in stages)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bf16", "mixed", "bin", "int8"])
def test_folders_of_every_dtype(threads, opened, tmp_path, stored):
    """Weights are converted as in one process, and each stage holds its own alone."""
    model = tiny_model("glm2", seed=5)
    if stored == "bf16":
        model = model.bfloat16()
    if stored == "int8":
        model.quantize(8)
    folder, layers, mode = saved(model, tmp_path / "model")
    if stored == "mixed":
        state = model.state_dict()
        for name in list(state)[::2]:
            state[name] = state[name].bfloat16()
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", {"format": "pt"})
    if stored == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    reference = load_model(folder, mode=mode, dtype=torch.float32)
    engine = opened(folder, layers, (1,), 2, mode)
    asked = some(reference, 6, 3)
    answers, _ = serve(engine, Chaos(3), asked)
    check_alone(reference, asked, answers)
    reports = engine.stage_reports()
    whole = sum(parameter.nbytes for parameter in reference.parameters())
    assert sum(report.weight_bytes for report in reports) == whole
    assert max(report.weight_bytes for report in reports) < 0.8 * whole
    for report in reports:
        assert report.resident_bytes > report.weight_bytes and report.seconds > 0


@pytest.mark.slow
def test_adapter_and_prefix_folders(threads, opened, tmp_path):
    """A peft folder is one with its base; a folder of a prefix alone is put on its own."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    base, layers, mode = saved(tiny_model("glm2", seed=6).bfloat16(), tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["query_key_value"], r=2, init_lora_weights=False)
    get_peft_model(load_model(base, mode=mode), config).save_pretrained(tmp_path / "lora")
    prefixed = tiny_model("glm2", seed=6, pre_seq_len=4, ptuning_version="v2")
    encoder = {}
    for name, tensor in prefixed.state_dict().items():
        if "prefix_encoder" in name:
            encoder[name] = tensor
    (tmp_path / "prefix").mkdir()
    save_file(encoder, tmp_path / "prefix" / "model.safetensors", {"format": "pt"})
    config = prefixed.config.to_dict() | {"architectures": None}
    (tmp_path / "prefix" / "config.json").write_text(json.dumps(config))
    for name in ("lora", "prefix"):
        folder, options = tmp_path / name, {"mode": mode, "base": str(base)}
        reference = load_model(folder, dtype=torch.float32, **options)
        engine = opened(folder, layers, (1,), 2, **options)
        asked = some(reference, 6, 3)
        answers, _ = serve(engine, Chaos(3), asked)
        check_alone(reference, asked, answers)


def test_refusals(threads, opened, tmp_path):
    model = model_of("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    for cuts, count in [((1,), 2), ((1, 1), 3), ((2, 1), 3)]:
        with pytest.raises(ValueError, match="layers 0 to 3, each one once and in order"):
            opened(folder, count, cuts, mode=mode)
    with pytest.raises(ValueError, match="packed"):
        opened(folder, layers, (1,), mode=mode, keep_quantized=True)
    with pytest.raises(ValueError, match="micro_batches"):
        opened(folder, layers, (1,), 0, mode)
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "none", layers, (1,), mode=mode)
    with pytest.raises(ValueError, match="pipeline"):
        engine_of("continuous", tiny_model("glm2").to("meta"))


def test_a_single_stage_is_the_plain_engine(opened, tmp_path):
    model = model_of("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    engine = opened(folder, layers, (), mode=mode)
    asked = some(model, 6, 3)
    answers, _ = serve(engine, Chaos(3), asked)
    check_alone(model, asked, answers)
    (report,) = engine.stage_reports()
    assert (report.start, report.end, report.device) == (0, layers, "cpu")
    assert report.passes and report.seconds > 0


@pytest.mark.parametrize("seed", range(3))
def test_mirrored_memories_are_equal(seed):
    """Two lanes share a log; another memory of each repeats it, with kept prefixes between them."""
    rng = random.Random(seed)
    log, sizes = [], (2, 1, 1, torch.float32, torch.device("cpu"))
    kept, mirrored = {}, {}
    lanes, mirrors = [], []
    for lane in range(2):
        memory = LoggedMemory(lambda *done, lane=lane: log.append((lane, *done)), *sizes, kept=kept)
        lanes.append(Arena(memory, 200))
        mirrors.append(KvMemory(*sizes, kept=mirrored))
    rows = [[], []]
    names = []

    def repeat():
        for lane, operation, arguments in log:
            mirrors[lane].do(operation, *arguments)
        log.clear()

    def write(lane, row):
        """What a pass does in each process: the same, at the same place."""
        repeat()
        number, end = rng.random(), min(row.length + rng.randint(1, 5), row.slab.size)
        for memory in (lanes[lane].memory, mirrors[lane]):
            for by_class in (memory.keys, memory.values):
                for tensor in by_class[row.slab.size]:
                    tensor[row.slot, :, row.length : end] = number
        row.length = end

    for _ in range(300):
        lane = rng.randrange(2)
        arena, here = lanes[lane], rows[lane]
        choice = rng.random()
        if choice < 0.25 or not here:
            here.append(Row())
            arena.admit(here[-1], rng.randint(1, 40))
        row = rng.choice(here)
        if choice < 0.5:
            write(lane, row)
        elif choice < 0.6 and row.slot >= row.slab.decoding:
            arena.start_decoding(row)
        elif choice < 0.7:
            arena.reserve(row, row.slab.size + rng.randint(1, 30))
        elif choice < 0.75 and row.length:
            names.append((len(names), row.length))
            arena.memory.do("keep", names[-1][0], row.slab.size, row.slot, row.length)
        elif choice < 0.8 and names:
            name, length = rng.choice(names)
            length = min(length, row.slab.size)
            arena.memory.do("paste", name, row.slab.size, row.slot, length)
            row.length = max(row.length, length)
        elif choice > 0.85:
            here.remove(row)
            arena.release(row, zero=rng.random() < 0.3)
    repeat()
    assert lanes[0].migrations and names
    for arena, mirror in zip(lanes, mirrors):
        for ours, its in ((arena.memory.keys, mirror.keys), (arena.memory.values, mirror.values)):
            assert ours.keys() == its.keys()
            for size in ours:
                assert all(torch.equal(a, b) for a, b in zip(ours[size], its[size]))
    assert kept.keys() == mirrored.keys()


# ---- with processes


@pytest.mark.slow  # a replica of two stages has processes in tests/serving/replicas/test_pool.py
def test_processes(tmp_path):
    """Unequal threads, adapters, what is read of prompts; then the death of a stage."""
    model = tiny_model("glm2")
    folder, layers, mode = saved(model, tmp_path / "model")
    loading = ModelLoading(str(folder), mode=mode, precision="fp32")
    stages = (StageSpec("cpu", 0, 1, 2), StageSpec("cpu", 1, layers, 1))
    before = torch.get_num_threads()
    engine = open_pipeline(loading, ReplicaSpec(stages), SMALL, LinearCost(), stop_ids=STOPS)
    try:
        adapter = write_adapter(tmp_path / "a", model, 1, GLM_LAYERS)
        merged = merged_model(folder, adapter, tmp_path / "merged", mode)
        engine.adapters.load("a", adapter)
        asked = {}
        for i, (prompt, sampling) in some(model, 12, 1).items():
            asked[i] = prompt, replace(sampling, adapter="a" if i % 2 else None)
        answers, _ = serve(engine, Chaos(1), asked)
        for i, (prompt, sampling) in asked.items():
            wanted = alone(merged if i % 2 else model, prompt, sampling.max_new_tokens)
            assert answers[i].tokens == wanted
        first, last = engine.stage_reports()
        assert (first.threads, last.threads) == (2, 1)
        assert (first.start, first.end, last.start, last.end) == (0, 1, 1, layers)
        assert first.passes == last.passes and first.seconds > 0
        (worker,) = engine.runner.workers
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"stage 0 .* on cpu\) has ended .* -9"):
            serve(engine, Chaos(1), some(model, 4, 2))
    finally:
        engine.close()
        torch.set_num_threads(before)
    assert worker.process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_three_processes_and_a_tied_model(tmp_path):
    model = model_of("glm")
    folder, layers, mode = saved(model, tmp_path / "model")
    before = torch.get_num_threads()
    engine = open_engine(folder, layers, (1, 2), mode=mode)
    try:
        asked = some(model, 12, 3)
        answers, _ = serve(engine, Chaos(3), asked)
        check_alone(model, asked, answers)
    finally:
        engine.close()
        torch.set_num_threads(before)
    assert [w.process.returncode for w in engine.runner.workers] == [NEIGHBOUR_ENDED] * 2


DRIVER = """
import sys, time
from finetune.placing import ReplicaSpec, StageSpec
from serving.engines.pipeline import open_pipeline
from serving.engines.stage_reports import ModelLoading
from serving.request import Limits
from serving.simulate.engine import LinearCost

stages = StageSpec("cpu", 0, 1, 1), StageSpec("cpu", 1, 3, 1)
loading = ModelLoading(sys.argv[1], mode="glm2", precision="fp32")
engine = open_pipeline(loading, ReplicaSpec(stages), Limits(4, 200, 60), LinearCost())
print(engine.runner.workers[0].process.pid, flush=True)
time.sleep(600)
"""


def test_no_worker_outlives_its_driver(tmp_path):
    folder, _, _ = saved(model_of("glm2"), tmp_path / "model")
    driver = subprocess.Popen(
        [warm_python(), "-c", DRIVER, str(folder)],
        cwd=REPO_ROOT,
        env=child_env() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(driver.stdout.readline())
    assert is_running(pid)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
