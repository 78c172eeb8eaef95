"""The reference of a preference: the model that a run starts from, without a second copy of it.

Where what trains can be switched off, the reference is the model without it. Else the reference's
log-probabilities are computed once, before the first step, and kept in the output folder.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from chatglm.loading import stored_prefix
from finetune.config import RowsConfig
from finetune.loss import without_peft
from finetune.rows.groups import RowGroups

REFERENCE_FILE = "reference.safetensors"


def can_switch_off(config: RowsConfig, model_path: str) -> bool:
    """Whether the model without what trains is what the run starts from.

    A P-Tuning prefix that the folder has already is a part of that, and trains on.
    """
    has_prefix = config.train_type == "ptuning" and stored_prefix(Path(model_path))
    return config.switches_off and not has_prefix


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes without its adapters or the prefix that trains."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # peft's own disable_adapter also takes away that they require gradients, which a graph that
    # is not yet backpropagated needs.
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    config = without_peft(model).config
    length = getattr(config, "pre_seq_len", None) if trains_prefix(model) else None
    for layer in layers:
        layer._disable_adapters = True
    if length:
        config.pre_seq_len = None
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        if length:
            config.pre_seq_len = length


def trains_prefix(model: nn.Module) -> bool:
    """Whether a model has a P-Tuning prefix that trains; another one is a part of its base."""
    for name, parameter in model.named_parameters():
        if "prefix_encoder" in name and parameter.requires_grad:
            return True
    return False


def reference_key(parts: list[RowGroups], settings: list[Any]) -> str:
    """A hash of what log-probabilities of rows depend on; `settings` are those of the model."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for data in parts:
        digest.update(f"{len(data.data)} rows".encode())
        for row in range(len(data.data)):
            digest.update(data.data.ids(row).tobytes())
            digest.update(str(data.data.n_masked(row)).encode())
    return digest.hexdigest()


def save_reference(path: Path, log_probs: dict[str, np.ndarray], key: str) -> None:
    """Write log-probabilities of rows, {name: (rows,) fp32}, in one step."""
    from safetensors.numpy import save

    from finetune.files import written_whole

    with written_whole(path) as file:
        file.write(save(log_probs, {"key": key}))


def load_reference(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """What save_reference wrote; None where there is nothing, or of another key."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
