"""Models by a hub's name: THUDM/chatglm2-6b, hf://OWNER/NAME, ms://OWNER/NAME. Free of torch.

`resolve_folder` is the one place: it gives the folder of a name, and downloads what is missing.
Hugging Face is read through huggingface_hub (its cache, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE),
ModelScope through the package modelscope. Code (*.py) is never downloaded.
"""

import functools
import glob
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .files import is_lfs_pointer, pointer_error, read_json

HUGGING_FACE, MODELSCOPE = "hf://", "ms://"
HUB_NAME = re.compile(r"(hf://|ms://|)(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
CACHED = re.compile(r"models--(.+?)--(.+)")  # huggingface_hub's folder of models--OWNER--NAME
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
OLD_WEIGHTS = re.compile(r"(pytorch|adapter)_model.*\.bin")
OLD_INDEX = "pytorch_model.bin.index.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class HubName:
    """A model of a hub.

    Attributes:
        hub: HUGGING_FACE or MODELSCOPE.
        name: OWNER/NAME.
        revision: branch, tag or commit; None: the hub's newest.
    """

    hub: str
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        prefix = MODELSCOPE if self.hub == MODELSCOPE else ""
        return f"{prefix}{self.name}{f'@{self.revision}' if self.revision else ''}"


def parse_hub_name(text: str | Path) -> HubName | None:
    """The model that OWNER/NAME, hf://OWNER/NAME or ms://OWNER/NAME (each perhaps with @REVISION)
    names; None for a folder, or any other text.

    A folder of that path wins, and where OWNER is a folder here, NAME is looked for in it alone.
    """
    text = str(text)
    match = HUB_NAME.fullmatch(text)
    if match is None or Path(text).exists():
        return None
    hub, name, revision = match.groups()
    if not hub and Path(name.split("/")[0]).is_dir():
        return None
    return HubName(hub or HUGGING_FACE, name, revision)


def resolve_folder(name_or_path: str | Path, *, weights: bool = False) -> Path:
    """The folder of a hub's name, downloaded where it is not in the cache; any other path as it is.

    Args:
        weights: whether the weights are wanted too, not the configuration and tokenizer alone.
    Raises:
        FileNotFoundError: the hub has no such model or revision, or it is not in the cache and the
            hub cannot be asked.
        PermissionError: the hub gives it only to some.
        ConnectionError: the transfer broke off, or the hub failed.
        ValueError: it holds no model, or a package is missing.
    """
    asked = parse_hub_name(name_or_path)
    return fetch(asked, weights) if asked else Path(name_or_path)


@functools.cache
def fetch(asked: HubName, weights: bool = True, local_dir: str | None = None) -> Path:
    """Download a model, or find it in the cache, and return its folder; raises as `resolve_folder`.

    A process asks the hub once for each model.

    Args:
        local_dir: a folder to download to in place of the cache.
    """
    if asked.hub == MODELSCOPE:
        return fetch_from_modelscope(asked, weights, local_dir)
    return fetch_from_hugging_face(asked, weights, local_dir)


def choose_files(names: Iterable[str], weights: bool) -> list[str]:
    """The files of a model that are read: those of its top folder, without code.

    Of weights in both formats safetensors are chosen.
    """
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if name.endswith(TEXTS)]
    safe = [name for name in top if name.endswith(".safetensors")]
    if safe and OLD_INDEX in chosen:
        chosen.remove(OLD_INDEX)
    if weights:
        chosen += safe or [name for name in top if OLD_WEIGHTS.fullmatch(name)]
    return sorted(chosen)


def missing_weights(folder: Path) -> list[str]:
    """The weight files that a model folder lacks, by its indices; empty for a complete one."""
    if (folder / "adapter_config.json").is_file():
        there = any((folder / name).is_file() for name in ADAPTER_WEIGHTS)
        return [] if there else [ADAPTER_WEIGHTS[0]]
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return []
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            shards = set(files.values()) if isinstance(files, dict) else set()
            return sorted(shard for shard in shards if not (folder / shard).is_file())
    return [WEIGHT_FILES[0]]


def repository_of(folder: str | Path) -> str | None:
    """OWNER/NAME of a folder in huggingface_hub's cache, which is named by its commit alone."""
    path = Path(folder).absolute()
    if path.parent.name != "snapshots":
        return None
    match = CACHED.fullmatch(path.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match else None


def recover_folder(named: str | Path, *, weights: bool = True) -> Path:
    """The folder that a file written earlier names as a base model: `resolve_folder`; a folder of
    another machine's hub cache is found by its model and commit. Raises as `resolve_folder`.
    """
    path = Path(named)
    if not path.is_dir() and (repository := repository_of(path)):
        return fetch(HubName(HUGGING_FACE, repository, path.name), weights)
    return resolve_folder(named, weights=weights)


def model_short_name(folder: str | Path) -> str:
    """The last part of a model's name or path, without a revision."""
    path = repository_of(folder) or str(folder)
    asked = parse_hub_name(path)
    return Path(asked.name if asked else path).name


# ---- Hugging Face


def fetch_from_hugging_face(asked: HubName, weights: bool, local_dir: str | None) -> Path:
    """As `fetch`; the cache serves where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if local_dir is None and (found := complete_commit(asked, weights)):
        return found
    try:
        info = HfApi().model_info(asked.name, revision=asked.revision)
        names = [file.rfilename for file in info.siblings or []]
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise explain(error, asked) from None
        return from_cache(asked, weights, error)
    except Exception as error:  # whatever a proxy or a lack of network raises
        return from_cache(asked, weights, error)
    chosen = choose_files(names, weights)
    if not {"config.json", "adapter_config.json"} & set(chosen):
        raise ValueError(
            f"{asked}: that model of {constants.ENDPOINT} has neither config.json nor "
            "adapter_config.json"
        )
    try:
        folder = snapshot_download(
            asked.name,
            revision=asked.revision,
            local_dir=local_dir,
            allow_patterns=[glob.escape(name) for name in chosen],
        )
    except Exception as error:  # of a transfer, as above
        raise explain(error, asked) from None
    return check_complete(Path(folder), asked, weights)


def complete_commit(asked: HubName, weights: bool) -> Path | None:
    """The cached folder of a model whose revision is a whole commit, which never changes."""
    if not re.fullmatch("[0-9a-f]{40}", asked.revision or ""):
        return None
    return cached_folder(asked, weights)


def cached_folder(asked: HubName, weights: bool) -> Path | None:
    """The folder in huggingface_hub's cache; None where it, or a part of it, is not there."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        file = try_to_load_from_cache(asked.name, name, revision=asked.revision)
        if not isinstance(file, str):
            continue
        folder = Path(file).parent
        return None if weights and missing_weights(folder) else folder
    return None


def from_cache(asked: HubName, weights: bool, error: Exception) -> Path:
    """The cached folder, where the hub cannot be asked; raises FileNotFoundError without one."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    is_offline = isinstance(error, OfflineModeIsEnabled)
    why = f"{constants.ENDPOINT} does not answer ({reason_of(error)})"
    if is_offline:
        why = "HF_HUB_OFFLINE is set"
    folder = cached_folder(asked, weights)
    if folder is None:
        raise FileNotFoundError(
            f"no such model folder: {asked}; nor is it whole in the cache {constants.HF_HUB_CACHE},"
            f" and {why}"
        )
    if not is_offline:
        print(f"{asked}: {why}; taken from the cache: {folder}", file=sys.stderr)
    return folder


def explain(error: Exception, asked: HubName) -> Exception:
    """One line for what huggingface_hub raised: where it asked, and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    token = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{asked}: {hub} gives it only to who has accepted its licence: "
            f"accept it on {hub}/{asked.name}, then {token}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{asked}: {hub} has {asked.name}, but no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"no such model folder: {asked}; nor does {hub} know a model of that name "
            f"(for a private one {token})"
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return PermissionError(f"{asked}: {hub} refuses it ({status}): {token}")
    if isinstance(error, OSError) and error.errno:  # of this machine's disk
        place = error.filename or constants.HF_HUB_CACHE
        return OSError(error.errno, error.strerror, str(place))
    return ConnectionError(
        f"{asked}: the transfer from {hub} broke off ({reason_of(error)}); "
        "run the same command again: files that came whole are kept"
    )


def reason_of(error: Exception) -> str:
    """Type and first line of an error, at most 160 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": ")


# ---- ModelScope


def fetch_from_modelscope(asked: HubName, weights: bool, local_dir: str | None) -> Path:
    """As `fetch`, through the package modelscope, whose cache is MODELSCOPE_CACHE."""
    chosen = choose_files(list_modelscope(asked), weights)
    from modelscope import snapshot_download

    try:
        folder = snapshot_download(
            asked.name, revision=asked.revision, local_dir=local_dir, allow_patterns=chosen
        )
    except Exception as error:  # whatever a hub, a proxy or a lack of network raises
        raise ConnectionError(f"{asked}: {reason_of(error)}") from None
    return check_complete(Path(folder), asked, weights)


def list_modelscope(asked: HubName) -> dict[str, str | None]:
    """{file: its SHA-256, or None} of a model; raises as `resolve_folder`."""
    try:
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise ValueError(
            f"{asked} needs a library that is not here ({error.name}): pip install modelscope"
        ) from None
    try:
        files = HubApi().get_model_files(asked.name, revision=asked.revision, recursive=False)
    except Exception as error:  # whatever a hub, a proxy or a lack of network raises
        raise ConnectionError(f"{asked}: {reason_of(error)}") from None
    return {file["Path"]: file.get("Sha256") for file in files}


def modelscope_hashes(asked: HubName) -> dict[str, str]:
    """{file: its SHA-256} of the files of a model that `resolve_folder` downloads."""
    listed = list_modelscope(asked)
    hashes = {name: listed[name] for name in choose_files(listed, weights=True)}
    return {name: known for name, known in hashes.items() if known}


# ---- what came


def check_complete(folder: Path, asked: HubName, weights: bool) -> Path:
    """`folder`, which has what was asked for.

    Raises:
        ValueError: weights are missing, or a file is a Git LFS pointer.
    """
    if weights and (missing := missing_weights(folder)):
        raise ValueError(f"{asked}: the hub's model has no {missing[0]} ({folder})")
    check_pointers(folder)
    return folder


def check_pointers(folder: Path) -> None:
    """Raises ValueError where a file of a folder is a Git LFS pointer."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_lfs_pointer(path):
            raise pointer_error(path)
