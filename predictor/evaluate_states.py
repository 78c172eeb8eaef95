"""Evaluates a Rereader on answers whose lengths and hidden states are known.

What `python -m predictor.evaluate` does with a predictor of --backbone states.
"""

import time
from pathlib import Path

import numpy as np

from predictor.hidden_states import HiddenStates, read_hidden_states
from predictor.labels import read_examples
from predictor.prediction import LengthPrediction
from predictor.readings import AnswerLines, Readings, join_readings
from predictor.reread_scores import LEGEND, reread_lines, score_places, survived_priors
from predictor.rereading import Priors, Rereader
from predictor.runtime import LengthPredictor

BATCH = 48  # readings in a timed call
CALLS = 200  # that are timed
WARM_UP = 5  # calls before


def evaluate_rereader(
    rereader: Rereader, data: Path, states_folder: Path, prior: LengthPredictor | None
) -> dict:
    """Metrics at every re-read, as a dict that JSON takes.

    Args:
        data: lengths of answers; states_folder: their states.
        prior: predicts the prompts; None for posteriors of the states alone.
    Raises:
        ValueError: lengths and states that do not belong together, or of another model.
    """
    states = read_hidden_states(states_folder)
    check_same_states(rereader, states, states_folder)
    name = states.served_model
    examples, _ = read_examples(data, served_model=name)
    prompts = [example.prompt for example in examples]
    lines = AnswerLines.read(data, prompts, name, name)
    readings = join_readings(states, lines, rereader.pooling, rereader.layers, data)
    if not len(readings):
        raise ValueError(f"--states {states_folder}: no states of answers by {name!r}")
    priors, before = None, None
    if prior:
        priors = Priors.of(prior.predict(prompts)).take_rows(readings.prompt)
        before = survived_priors(priors, readings.at, rereader.decoder.grid)
    classes = rereader.classes(readings.at, readings.vectors)
    decoder = rereader.decoder
    if priors:
        after = decoder.in_turn(readings.answer, readings.at, classes, priors)
    else:
        after = decoder.posteriors(readings.at, classes, None)
    known = (readings.at, readings.tokens, readings.finished)
    return {
        "predictor": rereader.card["backbone"],
        "served_model": name,
        "answers": len(np.unique(readings.answer)),
        "places": score_places(after, before, *known, states.cap),
        "milliseconds": read_milliseconds(rereader, states, readings, priors),
    }


def check_same_states(rereader: Rereader, states: HiddenStates, folder: Path) -> None:
    """Raises ValueError where states are not of the model whose states were learnt."""
    wanted, got = rereader.weights, states.weights
    if states.hidden_size != rereader.hidden_size or got != wanted:
        raise ValueError(
            f"--states {folder} is of a model with weights {got} and {states.hidden_size} "
            f"features, the predictor's are {wanted} and {rereader.hidden_size}"
        )
    cap = rereader.decoder.grid.cap
    if states.cap != cap:  # the CRPS is an integral up to it
        raise ValueError(
            f"--states {folder}: answers were cut at {states.cap} tokens, those that the predictor "
            f"learnt from at {cap}; collect with --max_new_tokens {cap}"
        )


def read_milliseconds(
    rereader: Rereader, states: HiddenStates, readings: Readings, priors: Priors | None
) -> dict[str, float]:
    """{"batch", "p50", "p99"}: milliseconds of `Rereader.read` for BATCH readings together."""
    columns = list(map(states.layers.index, rereader.layers))
    rows = np.arange(BATCH) % len(readings)
    number = np.searchsorted(states.answer, readings.answer[rows])
    last, mean = states.last[number][:, columns], states.mean[number][:, columns]
    given: list[LengthPrediction | None] = [None] * BATCH
    if priors:
        given = [LengthPrediction(priors.masses[row], priors.edges, 0.0) for row in rows]
    seconds = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        rereader.read(readings.at[rows], last, mean, given)
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.quantile(seconds[WARM_UP:], [0.5, 0.99]) * 1000
    return {"batch": BATCH, "p50": float(p50), "p99": float(p99)}


def describe_rereads(report: dict) -> str:
    """The report in words and columns."""
    made, ms = report["predictor"], report["milliseconds"]
    head = (
        f"states predictor of layers {', '.join(map(str, made['layers']))}, "
        f"re-read every {made['every']} tokens: {report['answers']} answers of "
        f"{report['served_model']}"
    )
    timing = f"ms for {ms['batch']} readings together: p50 {ms['p50']:.2f}, p99 {ms['p99']:.2f}"
    return "\n".join([head, *reread_lines(report["places"]), LEGEND, timing])
