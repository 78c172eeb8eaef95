"""The served model's hidden states that `scripts/collect_lengths.py --states` keeps. numpy only.

A folder of states.json and shards of safetensors beside a file of lengths. A row is one reading:
after the prompt (at 0), and at every multiple of `every` tokens of an answer that goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatglm.files import read_json, shorten

SETTINGS_FILE = "states.json"
SHARDS = "states-*.safetensors"
VERSION = 1
POOLINGS = ("both", "last", "mean", "entropy")
SIZES = ("hidden_size", "every", "cap")


@dataclass(frozen=True)
class HiddenStates:
    """R readings of L layers with H features, sorted by answer and `at`.

    Attributes:
        served_model, weights: name and fingerprint of the model whose states they are.
        layers: (L,) blocks whose output was read, counted from 1.
        every: tokens between two readings of an answer.
        cap: most tokens of an answer; a longer one was cut there.
        answer: (R,) int64, line of the lengths file, from 0.
        at: (R,) int32, tokens of the answer that were there; 0 is the prompt alone.
        last: (R, L, H) float16, at the last token read.
        mean: (R, L, H) float16, over the prompt's tokens (at 0), else the answer's so far.
        entropy: (R, L, H) float16, at 0 the mean over the prompt's tokens weighted by the entropy
            of the next token's distribution (EGTP, arXiv 2602.11812), else `mean`; or None.
    """

    served_model: str
    weights: str
    layers: tuple[int, ...]
    every: int
    cap: int
    answer: np.ndarray
    at: np.ndarray
    last: np.ndarray
    mean: np.ndarray
    entropy: np.ndarray | None

    def __len__(self) -> int:
        return len(self.at)

    @property
    def hidden_size(self) -> int:
        return self.last.shape[2]

    def vectors(self, pooling: str, layers: Sequence[int] = ()) -> np.ndarray:
        """(R, D) float32: the states of `layers` [all], pooled as `pool_states` does.

        Raises:
            ValueError: the folder has no such layer, or no states pooled by entropy.
        """
        chosen = self.layers if not len(layers) else tuple(layers)
        missing = sorted(set(chosen) - set(self.layers))
        if missing:
            raise ValueError(
                f"--state_layers: wanted layer {missing[0]}; "
                f"the states are of {', '.join(map(str, self.layers))}"
            )
        columns = list(map(self.layers.index, chosen))
        if pooling != "entropy":
            return pool_states(self.last[:, columns], self.mean[:, columns], pooling)
        if self.entropy is None:
            raise ValueError(
                "--state_pooling entropy: the states were collected without --state_entropy"
            )
        return pool_states(self.last[:, columns], self.entropy[:, columns], "both")


def pool_states(last: np.ndarray, mean: np.ndarray, pooling: str) -> np.ndarray:
    """(N, D) float32 of states (N, L, H): "last", "mean", or "both" side by side.

    "entropy" is "both", with `mean` weighted by entropy.
    """
    n = len(last)
    if pooling == "last":
        return last.reshape(n, -1).astype(np.float32)
    if pooling == "mean":
        return mean.reshape(n, -1).astype(np.float32)
    parts = (last.reshape(n, -1), mean.reshape(n, -1))
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def read_hidden_states(folder: str | Path, answers: int | None = None) -> HiddenStates:
    """The states of a folder.

    Args:
        answers: lines of the lengths file; rows of later lines are an error. None for any.
    Raises:
        FileNotFoundError: it has no states.json, or no shard.
        ValueError: naming the file that is damaged, of a newer version, or of other states.
    """
    folder = Path(folder)
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"--states {folder}: there is no {SETTINGS_FILE}")
    settings = check_settings(read_json(file), file)
    shards = sorted(folder.glob(SHARDS))
    if not shards:
        raise FileNotFoundError(f"--states {folder}: there is no {SHARDS}")
    arrays = join_shards([read_shard(shard, settings) for shard in shards])
    check_readings(arrays, settings, folder, answers)
    return HiddenStates(
        settings["served_model"],
        str(settings["weights"]),
        tuple(settings["layers"]),
        settings["every"],
        settings["cap"],
        arrays["answer"],
        arrays["at"],
        arrays["last"],
        arrays["mean"],
        arrays.get("entropy"),
    )


def join_shards(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors that all shards have, end to end, sorted by answer and place."""
    arrays = {}
    for name in parts[0]:
        if all(name in part for part in parts):
            arrays[name] = np.concatenate([part[name] for part in parts])
    order = np.lexsort((arrays["at"], arrays["answer"]))
    for name in arrays:
        arrays[name] = arrays[name][order]
    return arrays


def check_settings(settings: dict, file: Path) -> dict:
    """The content of states.json. Raises ValueError where a key is missing or wrong."""
    if not isinstance(settings, dict) or not isinstance(settings.get("version"), int):
        raise ValueError(f"{file}: not the settings of hidden states (no version)")
    if settings["version"] > VERSION:
        raise ValueError(
            f"{file}: version {settings['version']}, this program reads up to {VERSION}"
        )
    for name in SIZES:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise ValueError(
                f"{file}: {name} must be a whole number above 0, got {shorten(settings.get(name))}"
            )
    layers = settings.get("layers")
    if not isinstance(layers, list) or not layers or set(map(type, layers)) != {int}:
        raise ValueError(f"{file}: layers must be whole numbers, got {shorten(layers)}")
    for name in ("served_model", "weights"):
        if not isinstance(settings.get(name), str):
            raise ValueError(f"{file}: {name} must be text, got {shorten(settings.get(name))}")
    return settings


def read_shard(file: Path, settings: dict) -> dict[str, np.ndarray]:
    """The arrays of one shard. Raises ValueError where it is torn or of another shape."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    rows = len(arrays["at"]) if arrays.get("at", np.zeros(())).ndim == 1 else -1
    wanted: dict[str, tuple[int, ...]] = {"answer": (rows,), "at": (rows,)}
    states = (rows, len(settings["layers"]), settings["hidden_size"])
    wanted |= {"last": states, "mean": states}
    if "entropy" in arrays:
        wanted["entropy"] = states
    for name, shape in wanted.items():
        if name not in arrays:
            raise ValueError(f"{file}: there is no tensor {name!r}")
        if arrays[name].shape != shape:
            raise ValueError(f"{file}: {name} must be {shape}, got {arrays[name].shape}")
        kind = "iu" if name in ("answer", "at") else "f"
        if arrays[name].dtype.kind not in kind:
            raise ValueError(f"{file}: {name} must not be {arrays[name].dtype}")
    found = {}
    for name in wanted:
        found[name] = arrays[name]
    return found


def check_readings(
    arrays: dict[str, np.ndarray], settings: dict, folder: Path, answers: int | None
) -> None:
    """Raises ValueError where rows are of no answer, of no re-read, or there twice."""
    answer, at = arrays["answer"], arrays["at"]
    if not len(at):
        raise ValueError(f"--states {folder}: there are no rows")
    if answer.min() < 0 or (answers is not None and answer.max() >= answers):
        raise ValueError(
            f"--states {folder}: a row is of line {answer.max() + 1}, "
            f"the lengths file has {answers}: they are of two collections"
        )
    wrong = (at < 0) | (at >= settings["cap"]) | (at % settings["every"] != 0)
    if wrong.any():
        raise ValueError(
            f"--states {folder}: a row was read at {at[wrong][0]} tokens, wanted multiples of "
            f"{settings['every']} below {settings['cap']}"
        )
    if ((np.diff(answer) == 0) & (np.diff(at) == 0)).any():
        raise ValueError(f"--states {folder}: an answer has two rows of the same place")
    for name in ("last", "mean", "entropy"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise ValueError(f"--states {folder}: a state is not finite ({name})")
