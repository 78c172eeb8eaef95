"""Weight files: which of a folder count, their tensors, whether these fit a model to be built."""

import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import is_lfs_pointer, pointer_error, read_json, shorten
from .quantization import SCALE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PREFIX = "transformer.prefix_encoder."
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
BODY = "transformer."


def weight_files(path: str | Path) -> list[Path]:
    """The files of a checkpoint: safetensors if there are any, else .bin; shards as listed.

    Raises:
        FileNotFoundError: there are none, or some are not there.
        ValueError: an index is no index, or names a file outside the folder.
    """
    path = Path(path)
    lost = None
    for name in WHOLE_FILES:
        if (path / name).is_file():
            files = [path / name]
        elif (index := path / f"{name}.index.json").is_file():
            files = [path / shard for shard in shard_names(index)]
            if missing := [file.name for file in files if not file.is_file()]:
                lost = lost or FileNotFoundError(
                    f"{path}: {index.name} names {missing[0]}, which is not there; "
                    f"fetch it, or delete {index.name}"
                )
                continue
        else:
            continue
        if lost:
            log.warning("%s; reading %s", lost, files[0].name)
        return files
    raise lost or FileNotFoundError(
        f"{path}: no model.safetensors and no pytorch_model.bin, whole or in shards"
    )


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted. Raises ValueError for one that is not beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: wanted a weight_map of tensors and their files, got {shorten(weight_map)}"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(
                f"{index}: {shorten(tensor)} must lie in a file of this folder, got {shorten(name)}"
            )
    return sorted(set(weight_map.values()))


def is_plain_name(name: str) -> bool:
    """Whether a file name stays inside its folder."""
    return PurePosixPath(name).name == name and name not in ("", "..") and "\\" not in name


def iterate_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a folder's weights, read lazily if possible; only tensors are unpickled."""
    for file in weight_files(path):
        yield from read_tensors(file)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one .safetensors or .bin file.

    Raises:
        ValueError: it is torn or holds anything else.
    """
    if file.suffix == ".safetensors":
        with open_safetensors(file) as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())
    else:
        yield from read_bin(file).items()


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """safetensors' safe_open, its errors a ValueError that names folder and file."""
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file.parent}: its weights cannot be read ({file.name}: {error}); "
            f"fetch {file.name} again"
        ) from None


def refuse_pointer(file: Path) -> None:
    """Raises ValueError where the file is a Git LFS pointer."""
    if is_lfs_pointer(file):
        raise pointer_error(file)


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped into memory if it is a zip (since torch 1.6).

    Raises:
        ValueError: it is torn, or holds anything but tensors; whatever else it is stays pickled.
    """
    refuse_pointer(file)
    zipped = zipfile.is_zipfile(file)
    with open(file, "rb") as opened:
        begins_as_zip = opened.read(2) == b"PK"
    if begins_as_zip and not zipped:  # a zip's table of contents stands at its end
        raise ValueError(f"{file} is cut short or damaged: fetch it again")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # damaged bytes make torch's unpickler raise almost anything
        # torch's message advises to switch the protection off; its last line says what was found
        lines = str(error).splitlines() or [""]
        found = next((line for line in lines if "WeightsUnpickler" in line), lines[0])
        raise ValueError(
            f"{file} is not read: it is damaged, or holds something else than tensors "
            f"({type(error).__name__}: {found[:200]})"
        ) from None
    is_table = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values())
    if not is_table:
        raise ValueError(f"{file} is not read: it is no flat table of names and tensors")
    return state


def stored_shapes(path: str | Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a folder's weights."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        else:
            shapes |= {name: list(tensor.shape) for name, tensor in read_bin(file).items()}
    return shapes


class StoredPrefix(TypedDict):
    """A P-Tuning prefix in a folder's weights: virtual tokens, numbers of each, with an MLP or not.

    only: nothing but the prefix is there (the official P-Tuning checkpoints, and ours).
    """

    length: int
    width: int
    mlp: bool
    only: bool


def stored_prefix(path: Path, shapes: dict[str, list[int]] | None = None) -> StoredPrefix | None:
    """The P-Tuning prefix that a folder's weights hold, or None.

    `shapes`: `stored_shapes` of the folder, if they are read already.
    """
    shapes = stored_shapes(path) if shapes is None else shapes
    mark = "prefix_encoder."
    prefix = {name.split(mark)[1]: shape for name, shape in shapes.items() if mark in name}
    if "embedding.weight" not in prefix:
        return None
    if len(prefix["embedding.weight"]) != 2:
        raise ValueError(
            f"{path}: prefix_encoder.embedding.weight must have 2 dimensions, "
            f"found {prefix['embedding.weight']}"
        )
    length, width = prefix["embedding.weight"]
    return {
        "length": length,
        "width": width,
        "mlp": "trans.0.weight" in prefix,
        "only": len(prefix) == len(shapes),
    }


# Tensors without effect on a language model: tables, P-Tuning's own, a value head, a tied copy.
HARMLESS = re.compile(
    r"inv_freq$|rotary_|prefix_encoder\.|^v_head\.|^lm_head\.weight$|\.attn\.(masked_)?bias$"
)


def scale_in(shapes: dict[str, list[int]]) -> str | None:
    """The first scale of quantised weights among a folder's tensors; None where there is none."""
    for name in shapes:
        if name.endswith(SCALE):
            return name
    return None


def refuse_quantized(path: str | Path, shapes: dict[str, list[int]]) -> None:
    """Raises ValueError where weights are one of the published int4 or int8 releases."""
    if scale := scale_in(shapes):
        raise ValueError(
            f"{path} holds weights quantised to 4 or 8 bits, such as {scale}: an adapter is merged "
            "into the fp16 release of the model"
        )


def check_fit(
    path: str | Path,
    model: "PreTrainedModel",
    shapes: dict[str, list[int]],
    ignored: tuple[str, ...] = (),
) -> None:
    """Compare what a folder's weights hold with what a model wants, before any of it is read.

    Args:
        model: built on the meta device.
        shapes: `stored_shapes` of the folder.
        ignored: parts of names; tensors with one of them may be missing.
    Raises:
        ValueError: the weights are quantised and the config does not say so, or a tensor is missing
            or has another shape.
    """
    if (scale := scale_in(shapes)) and not model.config.quantization_bit:
        raise ValueError(
            f"{path} holds {scale}, of weights quantised to 4 or 8 bits, and its config.json has "
            "no quantization_bit"
        )
    tied = model.all_tied_weights_keys
    state = model.state_dict()
    # A body may be saved alone, without its own name before its tensors'.
    body = f"{model.base_model_prefix}."
    stored = {name.removeprefix(body): shape for name, shape in shapes.items()}
    for name, tensor in state.items():  # a tied copy is read too
        shape = list(tensor.shape)
        found = stored.get(name.removeprefix(body), shape)
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {found}, config.json asks for {shape}")
    lost = []
    for name in sorted(state):
        is_wanted = name not in tied and not any(part in name for part in ignored)
        if is_wanted and name.removeprefix(body) not in stored:
            lost.append(name)
    refuse_missing(path, lost)
    known = {name.removeprefix(body) for name in state}
    check_extra(path, [name for name in shapes if name.removeprefix(body) not in known])


def refuse_missing(path: str | Path, names: list[str]) -> None:
    """Raises ValueError where a folder's weights lack tensors of these names."""
    if names:
        raise ValueError(f"{path}: the weights lack {len(names)} tensors, the first is {names[0]}")


def check_extra(path: str | Path, names: list[str]) -> None:
    """What becomes of tensors that a folder holds and its model does not have.

    Tables, a prefix and a value head change nothing; others get a warning.

    Raises:
        ValueError: they are LoRA's that was never merged, or a vision model's.
    """
    extra = [name for name in names if not HARMLESS.search(name)]
    if not extra:
        return
    words = f"{path} holds {len(extra)} tensors that the model does not have, such as {extra[0]}"
    if any(".lora_" in name for name in extra):
        raise ValueError(
            f"{words}: LoRA that is not merged; save it as an adapter, or merged, where it was made"
        )
    if any("vision." in name for name in extra):
        raise ValueError(f"{words}: models of images are not loaded here")
    log.warning("%s: they are not read", words)
