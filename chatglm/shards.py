"""Weights of a folder by name, and files of a few gigabytes that they are written to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .saving import disk_errors
from .weights import open_safetensors, read_bin, weight_files

SHARD_BYTES = 2_000_000_000


class NamedTensors(Protocol):
    """Tensors that are made when they are asked for."""

    def __getitem__(self, name: str) -> Tensor: ...


class BaseWeights:
    """The tensors of a model folder by name, read lazily."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Path] = {}  # tensor -> its file
        # Files of torch's format, which are read whole.
        self.bins: dict[Path, dict[str, Tensor]] = {}
        for file in weight_files(folder):
            self.files |= dict.fromkeys(self.names_in(file), file)

    def names_in(self, file: Path) -> list[str]:
        """Names of the tensors in a file."""
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                return list(tensors.keys())
        self.bins[file] = read_bin(file)
        return list(self.bins[file])

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file in self.bins:
            return self.bins[file][name]
        with open_safetensors(file) as tensors:
            return tensors.get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor."""
        for name in self.files:
            dtype = self[name].dtype
            if dtype.is_floating_point:
                return dtype
        raise ValueError(f"{self.folder}: no tensor of floating-point numbers")


def plan_shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The names of `sizes`, tensor to bytes, in order, in one list per file of `most` bytes."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > most:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def shard_file(number: int, count: int) -> str:
    """The name of a file of weights, the `number`-th of `count` from 1 on."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def save_shards(
    tensors: NamedTensors,
    shards: list[list[str]],
    output: Path,
    saved: Callable[[list[str]], None] = lambda names: None,
) -> tuple[dict[str, str], int]:
    """Write tensors, a file per shard; memory holds one shard.

    Args:
        saved: called with the names of each shard that is written.
    Returns:
        {tensor: file name}, and the bytes of all tensors.
    Raises:
        OSError: the disk is full, or cannot be written.
    """
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    written = 0
    for number, names in enumerate(shards, 1):
        file = shard_file(number, len(shards))
        state = {name: tensors[name].contiguous() for name in names}
        with disk_errors(output):
            save_file(state, output / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
        written += sum(tensor.nbytes for tensor in state.values())
        del state  # before the next one is made
        saved(names)
    return files, written


def write_index(files: dict[str, str], total: int, output: Path) -> None:
    """Write the index of several shards: {tensor: file name}, and their bytes."""
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True)
        (output / "model.safetensors.index.json").write_text(text + "\n", "utf-8")
