"""Fingerprints of the files behind the flags that are paths.

A resumed run must have the same contents, but the files may have moved.
"""

import hashlib
import json
from pathlib import Path

from chatglm.adapters import adapter_file
from chatglm.families import TOKENIZER_FILES
from chatglm.files import read_json
from chatglm.folders import check_folder
from chatglm.hub import model_short_name, resolve_folder
from chatglm.runs import MANIFEST
from chatglm.weights import iterate_weights, stored_prefix
from finetune.config import RowsConfig, RunConfig
from finetune.ds_file import read_ds_file
from finetune.files import sha256
from finetune.rows.sources import parse_sources

TOKENIZERS = (*TOKENIZER_FILES, "vocab.txt")  # the last one is an encoder's


def path_contents(
    config: RunConfig, *, fingerprint: str | None, data: str, model_path: str
) -> dict[str, str]:
    """{flag: text that identifies its content} of the given flags that name a file or folder.

    Args:
        fingerprint: of the weights in `model_path`, the model that is trained.
        data: hash of the training rows.
    Raises:
        ValueError: --adapter was trained on another base.
    """
    contents = {"ds_file": hash_json(read_ds_file(config.ds_file)[1]), "train_path": data}
    if isinstance(config, RowsConfig):
        documents = getattr(config, "txt_documents", "")
        contents["train_path"] = f"{data} {describe_sources(config.train_path, documents)}"
        if config.replay_path:
            # The hash of their rows is a part of `data`.
            contents["replay_path"] = describe_sources(config.replay_path, documents)
        if config.adapter:
            contents["adapter"] = adapter_content(config.adapter, fingerprint)
    if pretrain := getattr(config, "pretrain_path", ""):  # of --task ppo; its hash is in `data` too
        contents["pretrain_path"] = describe_sources(pretrain)
    if folder := getattr(config, "reward_model", ""):
        contents["reward_model"] = hash_weights(resolve_folder(folder, weights=True))
    for name in ("model_name_or_path", "encoder_path"):
        if folder := getattr(config, name, ""):
            weights = fingerprint if folder == model_path else None
            contents[name] = f"{weights} {hash_tokenizer(Path(folder))}"
    if config.task == "predictor" and config.model_name_or_path:
        # The folder's name is by default the name of the served model.
        contents["model_name_or_path"] += f" {model_short_name(config.model_name_or_path)}"
    return contents


def adapter_content(path: str, fingerprint: str | None) -> str:
    """SHA-256 of the weights of --adapter.

    Args:
        fingerprint: of the base's weights.
    Raises:
        ValueError: by its manifest, where it has one, it was trained on other weights.
    """
    folder = check_folder(path, weights=True)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    made_for = manifest.get("base_model") or {}
    if made_for.get("fingerprint") not in (None, fingerprint):
        raise ValueError(
            f"--adapter {folder} was trained on {made_for.get('name_or_path')}, whose weights are "
            "not those of --model_name_or_path (fingerprints differ)"
        )
    return sha256(adapter_file(folder))


def prefix_content(path: str) -> str:
    """SHA-256 of the P-Tuning prefix that a folder's weights hold, which is no part of their
    fingerprint; "" where they have none.
    """
    if not stored_prefix(Path(path)):
        return ""
    tensors = {}
    for name, tensor in iterate_weights(path):
        if "prefix_encoder." in name:
            tensors[name] = tensor.float().numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name])
    return digest.hexdigest()


def hash_weights(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's safetensors files."""
    return hash_json([(file.name, sha256(file)) for file in sorted(folder.glob("*.safetensors"))])


def hash_json(value: object) -> str:
    """SHA-256 of a value's JSON, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_tokenizer(folder: Path) -> str | None:
    """SHA-256 of a folder's tokenizer model, None where it has none."""
    for name in TOKENIZERS:
        if (folder / name).is_file():
            return sha256(folder / name)
    return None


def describe_sources(text: str, documents: str = "") -> str:
    """JSON of each part of --train_path: weight, number of files, and name where it is a hub's."""
    parts = []
    for source in parse_sources(text, documents=documents):
        parts.append((source.weight, len(source.files), source.name if source.is_hub else ""))
    return json.dumps(parts)
