"""Every deployer's placement is loaded, holds what was predicted, and answers as one process."""

import json
import random
from dataclasses import replace

import pytest

from finetune.placing import DEPLOYER_NAMES, PlacementFlags
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Infeasible
from serving.engines import Sampling, make_engine, pipeline_runner
from serving.engines.pipeline import open_pipeline
from serving.engines.runner import EngineRunner
from serving.engines.stage_reports import ModelLoading
from serving.policies.continuous import POLICIES
from serving.replicas.measuring import cost_of
from serving.replicas.planning import plan_deployment
from serving.request import Limits, Request
from tests.serving.conftest import LinearCost
from tests.serving.engines.test_pipeline import ThreadWorker

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LIMITS = Limits(max_batch=4, kv_tokens=512, max_tokens=128)
NO_FLAGS = PlacementFlags(
    deployer=None,
    num_gpus=None,
    devices=None,
    device_map=None,
    cluster=None,
    profile=None,
    measure=False,
    measure_s=1.0,
)
LOADED: dict = {}  # {stages: tokens}: deployers often agree, and each chain is loaded once
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(10, 300) for _ in range(DRAW.randrange(5, 40))] for _ in range(6)]


def greedy_tokens(engine):
    runner = EngineRunner(engine, POLICIES["fcfs"])
    runner.start(lambda event: None, lambda: None)
    answers = []
    for number, prompt in enumerate(PROMPTS):
        request = Request(number, len(prompt), runner.clock.now_s(), 60.0)
        sampling = Sampling(20, ignore_stops=True)
        answers.append(runner.submit(request, prompt, sampling))
        runner.enqueue(request)
    assert all(answer.wait(60) for answer in answers)
    assert runner.stop(10)
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def wanted(tiny_folders):
    import torch

    from chatglm import load_model

    model = load_model(tiny_folders["glm2"], dtype=torch.float32)
    return greedy_tokens(make_engine("continuous", model, LIMITS, LinearCost()))


def cluster_of(folder, memory_bytes):
    """A file of a fast device and two slower ones."""
    devices = []
    for speed in (2e10, 1e10, 1e10):
        device = {"name": "cpu@1", "kind": "cpu", "threads": 1, "reserved_bytes": 0}
        device |= {"memory_bytes": memory_bytes, "bandwidth_bytes_s": speed, "flops_s": 3 * speed}
        devices.append(device)
    file = folder / "cluster.json"
    file.write_text(json.dumps({"devices": devices}))
    return str(file)


def test_the_flag_names_every_deployer():
    assert tuple(DEPLOYERS) == DEPLOYER_NAMES


@pytest.mark.parametrize("room", ["for all layers", "for two layers"])
@pytest.mark.parametrize("deployer", DEPLOYER_NAMES)
def test_a_placement_is_loaded(tiny_folders, wanted, tmp_path, monkeypatch, deployer, room):
    monkeypatch.setattr(pipeline_runner, "Worker", ThreadWorker)
    folder = tiny_folders["glm2"]
    flags = replace(NO_FLAGS, deployer=deployer)
    need = {"kv_tokens": LIMITS.kv_tokens, "batch": 2, "prompt_tokens": 20, "output_tokens": 20}
    whole = plan_deployment(
        replace(flags, deployer="single", cluster=cluster_of(tmp_path, 2**30)), str(folder), **need
    )
    [stage] = whole.stages
    most = 2**30 if room == "for all layers" else (stage.weight_bytes + stage.kv_bytes) * 4 // 5
    flags = replace(flags, cluster=cluster_of(tmp_path, most))
    if deployer == "single" and most < 2**30:
        with pytest.raises(Infeasible, match="no device holds the model"):
            plan_deployment(flags, str(folder), **need)
        return
    plan = plan_deployment(flags, str(folder), **need)
    if most < 2**30 or deployer == "even":
        assert len(plan.stages) > 1
    replica = plan.replicas[0]
    assert [s.start for s in replica.stages[1:]] == [s.end for s in replica.stages[:-1]]
    if replica.stages not in LOADED:
        LOADED[replica.stages] = load_and_answer(folder, plan)
    assert LOADED[replica.stages] == wanted


def load_and_answer(folder, plan):
    """The greedy tokens of a plan's first replica, whose stages hold what was predicted."""
    engine = open_pipeline(
        ModelLoading(str(folder), precision="fp32"),
        plan.replicas[0],
        LIMITS,
        cost_of(plan.placement, plan.profile),
    )
    try:
        tokens = greedy_tokens(engine)
        reports = engine.stage_reports()
    finally:
        engine.close()
    for predicted, report in zip(plan.stages, reports, strict=True):
        assert (report.start, report.end) == (predicted.start, predicted.end)
        assert report.weight_bytes == predicted.weight_bytes
    return tokens
