"""What LengthScheduler does in vLLM without a model: run with vLLM's python.

vllm_lengths.py OUT.json: {case: [steps of benchmarks/vllm_trace.py]}.
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.vllm_trace import CONFIG, make_request, make_scheduler, mocked_output
from serving.gateway.vllm_scheduler import LengthScheduler

WORKLOAD = {"policy": "fcfs", "max_batch": 4, "pass_tokens": 256, "block_tokens": 16}
WORKLOAD |= {"max_tokens": 512}


def steps_of(scheduler, rows):
    """[admitted, preempted] of each step; rows: (prompt, answer, arrival, priority, xargs)."""
    steps, now = [], 0
    todo = list(enumerate(rows))
    while todo or scheduler.has_unfinished_requests():
        while todo and todo[0][1][2] <= now:
            number, (*row, lengths) = todo.pop(0)
            request = make_request(number, row)
            request.sampling_params.extra_args = lengths
            scheduler.add_request(request)
        running = {request.request_id for request in scheduler.running}
        scheduler.preempted = []
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        scheduler.update_from_output(output, mocked_output(scheduler, tokens))
        admitted = [int(name) for name in tokens if name not in running]
        steps.append([admitted, scheduler.preempted])
        now += 1
    return steps


def known(tokens):
    return {"predicted_tokens": tokens}


ALONE = [(8, 100, 0, 0, known(100))] * 4  # all slots, until step 100
CASES = {
    # Short ones first, unless they come late; without a prediction one counts as 256, or its limit.
    "order": [
        *ALONE,
        (8, 80, 1, 0, known(80)),
        (8, 60, 2, 0, None),
        (8, 20, 3, 0, known(20)),
        (8, 40, 3, 0, known(40)),
    ],
    # A client's own priority goes first, however long the answer.
    "priority": [*ALONE, (8, 20, 1, 0, known(20)), (8, 90, 2, -1, known(90))],
    # It came 98 s before the short ones, which is more than their boost.
    "waits": [*ALONE, (8, 300, 1, 0, known(300)), *[(8, 9, 99, 0, known(9))] * 9],
    # 4 answers of 160 tokens in memory for two.
    "memory": [(8, 160, 0, 0, known(160))] * 4,
    "wrong": [(8, 20, 0, 0, {"predicted_tokens": "many"})],
}
MEMORY = {"memory": 22}

if __name__ == "__main__":
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for case, rows in CASES.items():
            workload = WORKLOAD | {"blocks": MEMORY.get(case, 200)}
            for label, kind in (("", LengthScheduler), (" fcfs", None)):
                scheduler = make_scheduler(workload, folder, kind)
                if kind is not None:  # as if it computed 100 tokens a second
                    scheduler.note_pace = lambda scheduled: None
                    scheduler.busy_s, scheduler.made_tokens = 1.0, 100.0
                    scheduler.mean_tokens, scheduler.answers = 100.0, 100
                found[case + label] = steps_of(scheduler, rows)
    Path(sys.argv[1]).write_text(json.dumps(found))
