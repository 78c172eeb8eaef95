"""benchmarks/vllm_orders.py without vLLM: loads, what is counted of a run, and wrong flags."""

import numpy as np
import pytest

from benchmarks.vllm_orders import build_parser, capacity_of, figures, is_order, main, run_of

WORDS = ["--orders", "--lengths", "rows.jsonl", "--predictor", "none", "--cells", "cells.jsonl"]
COSTS = {"step_s": 0.1, "row_s": 0.05, "prompt_s": 0.01}
ROWS = [{"prompt": 10, "answer": 5}, {"prompt": 30, "answer": 15}]


def test_capacity_by_hand():
    """Two at once take 0.1 s a token each: 10 tokens and a prompt of 20."""
    assert capacity_of(ROWS, COSTS, 2) == pytest.approx(1 / (10 * (0.1 / 2 + 0.05) + 0.2))


def test_all_orders_get_the_same_requests():
    flags = build_parser().parse_args([*WORDS, "--requests", "400", "--grain", "1"])
    cell = {"order": "vllm", "max_batch": 4, "load": 0.5, "seed": 3}
    one = run_of(cell, ROWS, flags)
    other = run_of(cell | {"order": "LengthScheduler@0.3+true"}, ROWS, flags)
    assert one["requests"] == other["requests"] and not one["truth"]
    assert (other["order"], other["truth"], other["boost_rate"]) == ("LengthScheduler", True, 0.3)
    gap_s = np.diff([arrival_s for _, arrival_s in one["requests"]]).mean()
    assert gap_s == pytest.approx(1 / (0.5 * capacity_of(ROWS, one, 4)), rel=0.15)


def test_figures_by_hand():
    run = {"requests": [[1, 1.0], [0, 2.0]], "slo_s": 5.0}
    found = {"spans": [[1.5, 11.0], [5.0, 6.0]], "preempted": 1, "own_us": 40.0}
    counted = figures(run, found, ROWS)
    assert (counted["mean_s"], counted["short_s"], counted["wait_s"]) == (7.0, 4.0, 3.0)
    assert (counted["in_time"], counted["span_s"], counted["preempted"]) == (50.0, 10.0, 1)


def test_names_of_orders(tmp_path, capsys, monkeypatch):
    assert all(map(is_order, ("vllm", "sjf+true", "LengthScheduler", "LengthScheduler@0.1+true")))
    wrong = ("", "sjf@0.1", "LengthScheduler@", "LengthScheduler@0", "LengthScheduler@-1", "srpt")
    assert not any(map(is_order, wrong))
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "--order", "vllm,srpt"]) == 1
    assert "--order: wanted some of vllm, LengthScheduler" in capsys.readouterr().err
    assert not (tmp_path / "cells.jsonl").exists()
