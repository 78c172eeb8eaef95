"""The policy `vllm` against what vLLM's own scheduler did, recorded and live."""

import re
from pathlib import Path

import pytest

from benchmarks.client_env import environment_folder
from benchmarks.vllm_scheduler import first_difference, main, simulated_steps
from serving.policies.vllm import Vllm

RECORDED = Path(__file__).with_name("vllm_traces.json.gz")


def same(printed: str, policy: str, kind: str) -> tuple[int, int]:
    """(workloads that are the same, all workloads) of a row of the tables."""
    row = re.search(rf"^\| {re.escape(policy)} \| `{kind}` \| (\d+) of (\d+) \|", printed, re.M)
    assert row, printed
    return int(row[1]), int(row[2])


def check_tables(printed: str) -> None:
    count, total = same(printed, "`vllm`", "fcfs")
    assert count == total > 0
    row = re.search(r"^\| `vllm` \| `priority` \| .*\| (.*) \|$", printed, re.M)
    assert re.fullmatch(r"(left out of the pass by vLLM: \d+)?", row[1])
    assert same(printed, "`fcfs`", "fcfs")[0] < total
    assert same(printed, "preempted is the latest arrival", "priority") < same(
        printed, "`vllm`", "priority"
    )


def test_recorded_decisions(capsys):
    assert main(["--traces", str(RECORDED)]) == 0
    check_tables(capsys.readouterr().out)


@pytest.mark.slow
def test_decisions_of_vllm_itself(tmp_path, capsys):
    if not (environment_folder("vllm") / "complete").exists():
        pytest.skip("no environment with vLLM: python benchmarks/client_env.py vllm makes it")
    traces = tmp_path / "traces.json.gz"
    words = ["--workloads", "10", "--requests", "20", "--seed", "3", "--traces", str(traces)]
    assert main(words) == 0 and traces.exists()
    count, total = same(capsys.readouterr().out, "`vllm`", "fcfs")
    assert count == total == 5


def workload(requests, **changes):
    settings = {"policy": "fcfs", "max_batch": 4, "pass_tokens": 32, "blocks": 12}
    settings |= {"block_tokens": 16, "max_tokens": 190, "requests": requests}
    return settings | changes


def test_passes_by_hand():
    """32 tokens a pass: 40 = 32 + 8, which leaves 24 of 50; then an answer takes one of the 32."""
    steps = simulated_steps(Vllm(), workload([[40, 3, 0, 0], [50, 2, 0.5, 0]]))
    assert [(step[2], step[3], step[4]) for step in steps] == [
        ([0], {0: 32}, []),
        ([1], {0: 8, 1: 24}, []),
        ([], {0: 1, 1: 26}, []),
        ([], {0: 1, 1: 1}, [0, 1]),
    ]


def test_memory_by_hand():
    """4 blocks: two prompts of 31 take them all.

    The third pass writes token 33 of the first, for which the second gives way. It comes back with
    32 tokens once the first has ended.
    """
    rows = [[31, 9, 0, 0], [31, 9, 0.5, 0]]
    steps = simulated_steps(Vllm(), workload(rows, blocks=4, max_tokens=64, pass_tokens=64))
    assert [step[2] for step in steps[:2]] == [[0], [1]]
    assert [step[1] for step in steps[:4]] == [[], [], [1], []]
    assert steps[2][3] == {0: 1} and steps[9][2:4] == ([1], {1: 32})


def test_the_highest_priority_number_is_preempted():
    rows = [[31, 20, 0, 3], [31, 20, 0.5, 0]]
    limits = {"policy": "priority", "blocks": 5, "max_tokens": 64, "pass_tokens": 64}
    steps = simulated_steps(Vllm(), workload(rows, **limits))
    assert next(step[1] for step in steps if step[1]) == [0]


def test_first_difference():
    step = (0.0, [], [0], {0: 4}, [])
    assert first_difference([step], [step]) == ""
    assert first_difference([step], [step, step]) == "time or end"
    assert first_difference([step], [(0.0, [1], [0], {0: 4}, [])]) == "preempted"
    assert first_difference([step], [(0.0, [], [], {0: 4}, [])]) == "admitted"
    assert first_difference([step], [(0.0, [], [0], {0: 5}, [])]) == "tokens"
    later = (0.0, [], [0], {0: 4, 1: 1}, [])
    assert first_difference([step], [later]) == "left out of the pass by vLLM"
