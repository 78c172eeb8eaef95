"""Model folders: checks before a library reads one, and its errors in one line. Free of torch."""

import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .adapter_folders import refuse_foreign
from .evidence import CAUSAL_TYPES, PANGU_TYPES, is_glm_base
from .families import OWN_FAMILIES
from .files import read_json, read_text, shorten
from .hub import recover_folder, resolve_folder
from .runs import check_not_run

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OWN_TYPES = ("chatglm", *PANGU_TYPES, "glm_base")  # model_type of our model classes
OTHER_TYPES = (*OWN_TYPES[1:], *CAUSAL_TYPES)
PASSED_ON = (MemoryError, ImportError)  # no fault of the folder
LONGEST_REASON = 300  # characters
# of generation_config.json, which transformers believes until it generates
NUMBERS = ("temperature", "top_p", "repetition_penalty")
WHOLE_NUMBERS = ("max_length", "max_new_tokens", "min_length", "top_k", "num_beams", "pad_token_id")
GENERATION: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(NUMBERS, (int, float)),
    **dict.fromkeys(WHOLE_NUMBERS, int),
    "eos_token_id": (int, list),
    "do_sample": bool,
}


@contextmanager
def reading(place: str | Path, remedy: str = "") -> Iterator[None]:
    """What a library raises while it reads `place` becomes one line that names it.

    Errors that name the place already, files that cannot be opened, and a lack of memory or of a
    package pass through. The type of any other is named, because it may be a bug of ours.

    Raises:
        ValueError: for all the others.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if type(error).__name__ == "OutOfMemoryError" or is_explained(error, place):
            raise
        if type(error) not in (ValueError, OSError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[: LONGEST_REASON - 3]}..."
        raise ValueError(f"{place} cannot be read: {reason}{remedy and f'; {remedy}'}") from None


def is_explained(error: Exception, place: str | Path) -> bool:
    """Whether an error names its file already, in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    text = str(error)
    return (
        type(error) in (ValueError, FileNotFoundError) and str(place) in text and "\n" not in text
    )


def check_folder(path: str | Path, *, weights: bool = False) -> Path:
    """The folder of a path or a hub's name; `weights` as in `chatglm.hub.resolve_folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is the folder of a run, whose checkpoints are the models, or an adapter of
            another program that has to be converted.
        OSError: a hub does not give it; as `chatglm.hub.resolve_folder`.
    """
    path = resolve_folder(path, weights=weights)
    refuse_foreign(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such model folder: {path}")
    check_not_run(path)
    return path


def check_json_files(folder: Path) -> None:
    """Check every JSON file of a model folder.

    Raises:
        ValueError, OSError: one cannot be read, holds no object, or a value that cannot be.
    """
    for name in (*JSON_FILES, *INDICES):
        if (folder / name).is_file():
            values = read_json(folder / name)
            if name == "generation_config.json":
                check_generation(folder / name, values)


def check_generation(path: Path, values: dict[str, Any]) -> None:
    """Raises ValueError for a value of generation_config.json that is of another type."""
    for name, kind in GENERATION.items():
        value = values.get(name)
        if value is None:
            continue
        # bool is a subclass of int
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{path}: {name} cannot be {shorten(value)}")


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The folder as transformers reads it, which refuses JSON that begins with a byte order mark.

    Without such files the folder itself; else a temporary one: those files without their marks, and
    links to all the others.
    """
    paths = [folder / name for name in (*JSON_FILES, *INDICES)]
    marked = [path for path in paths if begins_with_mark(path)]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="chatglm-") as temporary:
        for path in folder.iterdir():
            copy = Path(temporary, path.name)
            if path in marked:
                copy.write_text(read_text(path), encoding="utf-8")
            else:
                copy.symlink_to(path.absolute())
        yield Path(temporary)


def begins_with_mark(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(BOM_UTF8)) == BOM_UTF8


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of our model classes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model folder")
    values = read_json(path)
    model_type = values.get("model_type", "chatglm")
    if model_type not in OWN_TYPES and not is_glm_base(values):
        raise ValueError(
            f'{path}: wanted "model_type": "chatglm" or one of {", ".join(OTHER_TYPES)}; '
            f"got {shorten(model_type)}{code_note(values)}"
        )
    if (family := values.get("glm_family")) not in (None, *OWN_FAMILIES):
        raise ValueError(
            f'{path}: "glm_family" is one of {", ".join(OWN_FAMILIES)}, got {shorten(family)}'
        )
    return values


def position_limit(folder: Path) -> int | None:
    """The most tokens of a sequence, of a model with learned positions; None for any other.

    Raises:
        ValueError: its config.json holds another value than a number there.
    """
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    if values.get("model_type") in PANGU_TYPES:
        name = "max_position_embeddings"
    elif is_glm_base(values):
        name = "max_sequence_length"
    else:
        return None
    limit = values.get(name, 1024)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"{path}: {name} must be a whole number above 0, got {shorten(limit)}")
    return limit


def refuse_unknown_type(folder: str | Path) -> None:
    """Raises ValueError where only a folder's own code could read its model: it is never run."""
    from transformers import CONFIG_MAPPING

    path = Path(folder, "config.json")
    if not path.is_file():
        return
    values = read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{path}: model_type {shorten(model_type)} is not known{code_note(values)}"
        )


def code_note(values: dict[str, Any]) -> str:
    """What an error adds for a folder that comes with code."""
    return "; code that comes with a model (auto_map) is never run" if "auto_map" in values else ""


def named_base(path: Path) -> str | None:
    """The base model that an adapter or prefix folder names.

    Raises:
        ValueError: it names one by something else than text.
    """
    keys = {"adapter_config.json": "base_model_name_or_path", "config.json": "_name_or_path"}
    for file, key in keys.items():
        name = read_json(path / file).get(key) if (path / file).is_file() else None
        if name and not isinstance(name, str):
            raise ValueError(f"{path / file}: {key} must be text, got {shorten(name)}")
        if name:
            return name
    return None


def find_base(path: Path, base: str | Path | None, *, weights: bool = True) -> Path:
    """The folder of the base of an adapter or prefix folder: `base`, else the one that it names.

    Either may be a hub's name; `weights` as in `chatglm.hub.resolve_folder`.

    Raises:
        ValueError: it names none.
        FileNotFoundError: the base is not there.
        OSError: a hub does not give it; as `chatglm.hub.resolve_folder`.
    """
    folder = base or named_base(path)
    if not folder:
        raise ValueError(
            f"{path} holds an adapter or a prefix and names no base model; give base=FOLDER"
        )
    found = recover_folder(folder, weights=weights)
    if not found.is_dir():
        raise FileNotFoundError(f"{path}: its base model {folder} is not there; give base=FOLDER")
    return found
