"""Adapter folders in peft's layout with random factors, and models merged with them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from chatglm import load_model
from finetune.merging import merge_weights
from serving.engines.adapter_files import linear_sizes


def write_adapter(folder: Path, model, seed: int, targets, rank=4, change=None, **config) -> Path:
    """A LoRA of the layers of `model` whose names end so.

    Args:
        change: called with the {name: tensor} before they are written.
        config: more of adapter_config.json; its rank_pattern takes plain names.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    patterns = config.get("rank_pattern", {})
    state = {}
    for name, (rows, columns) in linear_sizes(model).items():
        last = name.split(".")[-1]
        if last not in targets:
            continue
        r = patterns.get(last, rank)
        a = torch.randn(r, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, r, generator=generator)
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
    if change is not None:
        change(state)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    values |= {"target_modules": list(targets), "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def merged_model(base: Path, adapter: Path, folder: Path, mode: str):
    """The model of a base merged with an adapter by this project's merging, fp32."""
    folder.mkdir()
    merge_weights(base, adapter, folder, mode=mode, dtype=None, device="cpu")
    return load_model(folder, mode=mode)
