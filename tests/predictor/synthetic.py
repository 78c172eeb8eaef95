"""Prompts whose answers' lengths depend on their words, with known noise, and their predictor."""

import json
from pathlib import Path

import numpy as np

from predictor.labels import Label, LabelledPrompt

KINDS = {"name": 1.5, "list": 2.5, "explain": 3.5, "essay": 4.5}  # mean of log(1 + length)
TOPICS = [
    "river",
    "lamp",
    "train",
    "winter",
    "garden",
    "music",
    "history",
    "bread",
    "ocean",
    "paper",
    "window",
    "friend",
    "city",
]
NOISE = 0.4  # standard deviation of log(1 + length), normal


def make_rows(count: int, *, seed: int, factor: float = 1.0, turned: bool = False) -> list[dict]:
    """Rows of different prompts answered by "m", with lengths `factor` times as long.

    `turned`: short where they would be long.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        kind = generator.choice(list(KINDS))
        mean = 6 - KINDS[kind] if turned else KINDS[kind]
        prompt = f"{kind} {' '.join(generator.choice(TOPICS, 5))} {seed} {i}"
        tokens = factor * np.expm1(generator.normal(mean, NOISE))
        rows.append(
            {
                "prompt": prompt,
                "output_tokens": max(0, round(tokens)),
                "finished": True,
                "served_model": "m",
            }
        )
    return rows


def cap_rows(rows: list[dict], share: float) -> list[dict]:
    """The rows with answers cut where about `share` of them have ended."""
    cap = int(np.quantile([row["output_tokens"] for row in rows], share))
    return [
        row
        | {"output_tokens": min(row["output_tokens"], cap), "finished": row["output_tokens"] <= cap}
        for row in rows
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def examples_of(rows: list[dict]) -> list[LabelledPrompt]:
    return [
        LabelledPrompt(
            row["prompt"],
            (Label(row["output_tokens"], row["served_model"], row["finished"]),),
            "log",
            "",
        )
        for row in rows
    ]


def train(folder: Path, rows: list[dict], **options) -> Path:
    """A lexical predictor of the rows."""
    from predictor.config import PredictorConfig
    from predictor.training import train_predictor

    data = write_rows(folder / "rows.jsonl", rows)
    knobs = {
        "served_model": "m",
        "hash_bits": 12,
        "landmarks": 200,
        "length_limit": 1000,
        "head": "regression",
    } | options
    return train_predictor(
        PredictorConfig(
            task="predictor", train_path=str(data), output_dir=str(folder / "predictor"), **knobs
        )
    )
