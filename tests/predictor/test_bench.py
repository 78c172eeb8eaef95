"""The columns of LengthBench against separate arithmetic, and the documented example."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from predictor import LengthPrediction
from predictor.bench import (
    ceiling_of_runs,
    runs_of_rows,
    score_predictor,
    time_single_prompts,
)
from predictor.heads import LIST_LABELS, MOST_COMPARED, Ranking
from predictor.scores import PINBALL_LEVELS, kendall_tau
from tests.conftest import REPO_ROOT
from tests.predictor.synthetic import make_rows

ROWS = [
    {"prompt": "a", "output_tokens": 10},
    {"prompt": "b", "output_tokens": 20},
    {"prompt": "a", "output_tokens": 14},
    {"prompt": "c", "output_tokens": 40},
    {"prompt": "b", "output_tokens": 12},
    {"prompt": "d", "output_tokens": 80, "finished": False},
    {"prompt": "a", "output_tokens": 30},
]
ESTIMATE = {"a": 12.0, "b": 30.0, "c": 25.0, "d": 60.0}


def lengths_of(prompts):
    return [ESTIMATE[prompt] for prompt in prompts]


def test_lengths_alone():
    figures = score_predictor(lengths_of, ROWS)
    # 5 of 6 pairs are in order.
    assert figures["tau"] == pytest.approx(4 / 6)
    assert figures["mae"] == pytest.approx((2 + 10 + 15 + 20) / 4)
    # c is 15 and d is 20 tokens longer than what would be reserved.
    assert figures["under_mean"] == 0.5 and figures["reserved_mean"] == pytest.approx(127 / 4)
    for name in ("pinball", "coverage_90", "under_90", "under_975"):
        assert figures[name] is None
    assert figures["p99_ms"] >= figures["p50_ms"] > 0
    assert figures["tau_per_us"] == pytest.approx(figures["tau"] / (1e3 * figures["p50_ms"]))


def test_predictions_count_up_to_the_cap():
    figures = score_predictor(lengths_of, ROWS, cap=50, timed=0)
    assert figures["mae"] == pytest.approx((2 + 10 + 15 + 30) / 4)
    assert figures["tau"] == pytest.approx(4 / 6)  # ranks are not cut
    assert figures["reserved_mean"] == pytest.approx((12 + 30 + 25 + 50) / 4)


def test_quantiles():
    def predict(prompts):
        known = np.array(lengths_of(prompts))
        spread = {level: level * 2 * known for level in PINBALL_LEVELS}
        return spread | {"mean": known, "rank": -known}

    figures = score_predictor(predict, ROWS, timed=0)
    tokens, known = np.array([10, 20, 40, 80]), np.array(lengths_of("abcd"))
    assert figures["tau"] == pytest.approx(-4 / 6)
    losses = []
    for level in PINBALL_LEVELS:
        for token, guess in zip(tokens, level * 2 * known):
            over = token - guess
            losses.append(level * over if over > 0 else (level - 1) * over)
    assert figures["pinball"] == pytest.approx(np.mean(losses))
    assert figures["coverage_90"] == 1.0 and figures["under_90"] == 0.0
    assert figures["reserved_975"] == pytest.approx(1.95 * known.mean())
    assert figures["p50_ms"] is None and figures["tau_per_us"] is None


def test_distributions():
    edges = np.array([0.0, 100.0, 200.0])

    def predict(prompts):
        predictions = []
        for prompt in prompts:
            share = ESTIMATE[prompt] / 100
            masses = np.array([1 - share, share])
            predictions.append(LengthPrediction(masses, edges, share))
        return predictions

    figures = score_predictor(predict, ROWS, timed=0)
    assert figures["tau"] == pytest.approx(4 / 6)
    # The mean is 50 + 100 * share: 62, 80, 75, 110, all longer than the answers.
    assert figures["under_mean"] == 0 and figures["reserved_mean"] == pytest.approx(81.75)


def test_more_prompts_than_a_chunk_and_all_are_asked_once():
    rows = make_rows(600, seed=4)
    asked = []

    def predict(prompts):
        asked.extend(prompts)
        return [len(prompt) for prompt in prompts]

    figures = score_predictor(predict, rows, timed=0)
    assert asked == [row["prompt"] for row in rows]
    tokens = np.array([row["output_tokens"] for row in rows])
    known = kendall_tau(np.array(list(map(len, asked))), tokens)
    assert figures["tau"] == pytest.approx(known)
    assert figures["ceiling"] is None and figures["share"] is None


def test_the_ceiling_is_of_the_other_runs():
    prompts, runs = runs_of_rows(ROWS)
    assert prompts == ["a", "b", "c", "d"] and runs == [[10, 14, 30], [20, 12], [40], [80]]
    # a's others have the median 22, b's 12: the wrong order.
    assert ceiling_of_runs(runs) == pytest.approx(-1)
    assert ceiling_of_runs([[1], [2], [3, 4]]) is None
    figures = score_predictor(lengths_of, ROWS, ceiling=0.8, timed=0)
    assert figures["ceiling"] == 0.8 and figures["share"] == pytest.approx(4 / 6 / 0.8)


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda n: [1.0] * (n - 1), r"wanted 4 numbers as lengths, got the shape \(3,\)"),
        (lambda n: ["x"] * n, "wanted 4 numbers as lengths"),
        (lambda n: [float("nan")] * n, "wanted finite numbers as lengths, got nan"),
        (lambda n: {1.5: [1.0] * n}, "wanted quantile levels between 0 and 1"),
        (lambda n: {0.9: [1.0] * n}, "none orders prompts"),
        (lambda n: {0.5: [1.0] * (n + 1)}, r"as the quantile 0.5, got the shape \(5,\)"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer, said):
    with pytest.raises(ValueError, match=said):
        score_predictor(lambda prompts: answer(len(prompts)), ROWS)


def test_rows_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r'rows\[1\]: no key "prompt"'):
        score_predictor(lengths_of, [ROWS[0], {"output_tokens": 3}])
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        score_predictor(lengths_of, ROWS[:1])


def test_the_fastest_of_several_calls_counts():
    calls = []

    def predict(prompts):
        calls.append(prompts)
        if len(calls) == 22:  # the second timed call of all, after 20 to warm up
            time.sleep(0.05)
        return [1.0]

    milliseconds = time_single_prompts(predict, ["a", "b"])
    assert milliseconds.max() < 25 and len(calls) == 20 + 3 * 2
    assert {len(prompts) for prompts in calls} == {1}


@pytest.mark.parametrize("name", ["pairwise", "listmle"])
def test_many_labels_are_compared_in_lists(name):
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    count = MOST_COMPARED + 100
    head = Ranking(512, 32, name)
    outputs = torch.from_numpy(draw.normal(size=(count, 1))).requires_grad_()
    tokens = torch.from_numpy(draw.integers(1, 500, count).astype(float))
    finished = torch.ones(count, dtype=torch.bool)
    weights, owners = torch.ones(count), torch.zeros(count, dtype=torch.long)
    loss = head.loss(outputs, tokens, finished, weights, owners)
    lists = -(-count // LIST_LABELS)
    separate = 0.0
    for first in range(lists):
        part = slice(first, None, lists)
        separate += head.loss(
            outputs[part], tokens[part], finished[part], weights[part], owners[part]
        )
    assert float(loss.detach()) == pytest.approx(float(separate.detach()))
    loss.backward()
    # Longer answers are pushed up, shorter ones down.
    assert kendall_tau(-outputs.grad[:, 0].numpy(), tokens.numpy()) > 0.5


@pytest.mark.parametrize("document", ["docs/predictor.md", "docs/zh/predictor.md"])
def test_the_documented_example_runs(document, tmp_path):
    text = (REPO_ROOT / document).read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(from predictor\.bench .*?)```", text, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "'tau': 1.0" in done.stdout and "'share': 1.0" in done.stdout, done.stdout
