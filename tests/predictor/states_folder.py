"""Lengths and hidden states whose features hold a noisy clock of what is left of the answer."""

import json
from pathlib import Path

import numpy as np

SERVED = "clock"
KINDS = {"name": 12, "list": 40, "explain": 90, "essay": 200}  # word of a prompt -> median tokens
EVERY, CAP, HIDDEN, LAYERS = 16, 128, 12, (2, 3)
NOISE = 0.35  # of the clock, in log tokens
SPREAD = 0.8  # of log lengths of one kind


def write_states(folder: Path, arrays: dict[str, np.ndarray], shards: int = 2, **settings) -> Path:
    """A folder of states as scripts/collect_lengths.py --states writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": HIDDEN, "layers": list(LAYERS), "every": EVERY, "cap": CAP}
    content = {"version": 1, "served_model": SERVED, "weights": "0123"} | sizes | settings
    (folder / "states.json").write_text(json.dumps(content))
    bounds = np.linspace(0, len(arrays["at"]), shards + 1).astype(int)
    for number, (start, end) in enumerate(zip(bounds, bounds[1:]), 1):
        part = {}
        for name, values in arrays.items():
            part[name] = np.ascontiguousarray(values[start:end])
        save_file(part, folder / f"states-{number:05d}.safetensors")
    return folder


def make_answers(prompts: int, runs: int = 1, seed: int = 0) -> list[dict]:
    """Rows of a lengths file: log-normal lengths around the median of the prompt's word."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(prompts):
        kind = draw.choice(list(KINDS))
        for _ in range(runs):
            tokens = int(min(CAP, max(1, KINDS[kind] * np.exp(SPREAD * draw.normal()))))
            prompt = f"{kind} something about topic number {seed} {i} {draw.integers(10**6)}"
            rows.append({"prompt": prompt, "output_tokens": tokens, "served_model": SERVED})
            rows[-1]["finished"] = tokens < CAP
        for row in rows[-runs:]:
            row["prompt"] = rows[-runs]["prompt"]
    return rows


def make_arrays(rows: list[dict], seed: int = 0) -> dict[str, np.ndarray]:
    """States of the answers: the clock in some direction of the last layer, noise elsewhere."""
    draw = np.random.default_rng(seed)
    direction = np.random.default_rng(0).normal(size=HIDDEN)  # the same model in every collection
    answer, at, clock = [], [], []
    for line, row in enumerate(rows):
        tokens = row["output_tokens"]
        # A cut answer would have gone on.
        true = tokens if row["finished"] else tokens * np.exp(abs(draw.normal()))
        for place in range(0, max(tokens, 1), EVERY):
            answer.append(line)
            at.append(place)
            noise = NOISE if place else 3 * NOISE
            clock.append(np.log1p(true - place) + noise * draw.normal())
    states = draw.normal(size=(len(at), len(LAYERS), HIDDEN))
    states[:, -1] += 2 * np.array(clock)[:, None] * direction
    noisy = states + 0.3 * draw.normal(size=states.shape)
    return {
        "answer": np.array(answer, np.int64),
        "at": np.array(at, np.int32),
        "last": states.astype(np.float16),
        "mean": noisy.astype(np.float16),
    }


def write_collection(folder: Path, prompts: int, runs: int = 1, seed: int = 0) -> tuple[Path, Path]:
    """(lengths file, states folder) of some prompts."""
    rows = make_answers(prompts, runs, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = folder / "lengths.jsonl"
    lengths.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lengths, write_states(folder / "states", make_arrays(rows, seed))
