"""LengthScheduler in vLLM's own loop, without a model, and serving one behind the gateway."""

import json
import subprocess

import pytest

from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.peers.test_vllm import made_python


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{case: [admitted, preempted] of each step}, of CASES in vllm_lengths.py."""
    python = made_python()
    place = tmp_path_factory.mktemp("scheduler")
    script = REPO_ROOT / "tests" / "serving" / "gateway" / "vllm_lengths.py"
    env = child_env(VLLM_LOGGING_LEVEL="ERROR", PYTHONPATH=str(REPO_ROOT))
    words = [python, script, place / "found.json"]
    done = subprocess.run(words, env=env, cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "found.json").read_text())


def admissions(steps):
    return [number for admitted, _ in steps for number in admitted]


@pytest.mark.slow
def test_the_order_of_admission(steps):
    assert admissions(steps["order fcfs"]) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert admissions(steps["order"]) == [0, 1, 2, 3, 6, 7, 4, 5]
    assert admissions(steps["priority"]) == [0, 1, 2, 3, 5, 4]
    assert admissions(steps["waits"])[4] == 4
    assert admissions(steps["wrong"]) == [0]


@pytest.mark.slow
def test_predicted_memory_keeps_from_preemption(steps):
    def preempted(name):
        return sum(len(lost) for _, lost in steps[name])

    assert preempted("memory fcfs") > 0
    assert preempted("memory") == 0
    assert len(steps["memory"]) == 2 * 160  # two at a time
