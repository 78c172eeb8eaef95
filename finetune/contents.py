"""What lies behind the flags that are paths: a resumed run must have the same, wherever it lies now."""

import hashlib
import json
from pathlib import Path

from finetune.config import TrainConfig
from finetune.ds_file import read_ds_file
from finetune.files import sha256
from finetune.rows.sources import parse_sources

TOKENIZERS = ("tokenizer.model", "ice_text.model", "tokenizer.json", "vocab.txt")


def path_contents(
    config: TrainConfig, *, fingerprint: str | None, data: str, model_path: str
) -> dict[str, str]:
    """{flag: a text that is the same for the same content}, of the flags that are given and name a file or folder.

    Args:
        fingerprint: of the weights in `model_path`, which is what trains.
        data: hash of the training rows.
    """
    found = {"ds_file": hash_json(read_ds_file(config.ds_file)[1]), "train_path": data}
    if config.task == "finetune":
        found["train_path"] = f"{data} {describe_sources(config.train_path)}"
        if config.replay_path:
            found["replay_path"] = describe_sources(config.replay_path)  # their rows are in `data`
    for name in ("model_name_or_path", "encoder_path"):
        if folder := getattr(config, name, ""):
            weights = fingerprint if folder == model_path else None
            found[name] = f"{weights} {hash_tokenizer(Path(folder))}"
    if config.task == "predictor" and config.model_name_or_path:
        found["model_name_or_path"] += (
            f" {Path(config.model_name_or_path).name}"  # the served model's name by default
        )
    return found


def hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_tokenizer(folder: Path) -> str | None:
    """SHA-256 of a folder's tokenizer model, None where it has none."""
    return next((sha256(folder / name) for name in TOKENIZERS if (folder / name).is_file()), None)


def describe_sources(text: str) -> str:
    """Of each part of --train_path: its weight, how many files it is, and its name where that is a hub's."""
    parts = [(s.weight, len(s.files), s.name if s.is_hub else "") for s in parse_sources(text)]
    return json.dumps(parts)
