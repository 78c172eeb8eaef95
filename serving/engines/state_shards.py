"""Hidden states of answers on disk: a folder of states.json and numbered safetensors files.

A shard has R rows, sorted by answer, then `at`: `answer` (R,) int64, the line of the answer in its
lengths file, from 0; `at` (R,) int32, answer tokens made; `last` and `mean` (R, L, hidden_size)
fp16, and `entropy` alike where it is collected (serving.engines.state_tap.StateReading).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm.files import read_json
from finetune.files import write_aside, write_json
from serving.engines.state_tap import StateReading

VERSION = 1
DESCRIPTION = "states.json"
SHARD_BYTES = 256_000_000


class StateFolder:
    """Appends the states of answers to a folder, or goes on with one.

    Rows of one answer are in one shard. The newest shard is written again until it is full; each
    write is renamed into place, so a torn one leaves what was there.

    Args:
        description: what states.json says beside the version.
        lines: answers that the lengths file has; states of others are dropped.
        shard_bytes: of a shard at most, but for one answer that has more.
    Raises:
        ValueError: the folder's states are of other settings, or answers lack theirs.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        lines: int,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._number = 1
        self._parts: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self._has_news = False
        self._open({"version": VERSION, **description}, lines)

    def _open(self, description: dict[str, Any], lines: int) -> None:
        path = self.folder / DESCRIPTION
        if not path.exists():
            if lines:
                raise ValueError(
                    f"--states {self.folder}: --output has {lines} answers without states; name "
                    "another --output"
                )
            write_json(path, description)
            return
        found = read_json(path)
        for key in {**description, **found}:
            wanted = description.get(key)
            if found.get(key) != wanted:
                raise ValueError(
                    f"--states {self.folder}: made with {key} {found.get(key)!r}, now it is "
                    f"{wanted!r}; name another folder"
                )
        self._resume(lines)

    def _resume(self, lines: int) -> None:
        """Drop the states of answers that have no line, and go on with the last shard."""
        answers: set[int] = set()
        for path in sorted(self.folder.glob("states-*.safetensors")):
            rows = read_state_shard(path)
            if not lines:  # of another --output, most likely: they took hours
                raise ValueError(
                    f"--states {self.folder}: has states, and --output has no answers yet; name "
                    "another folder, or remove this one"
                )
            kept = rows["answer"] < lines
            if not kept.any():
                path.unlink()
                continue
            if not kept.all():
                rows = {name: tensor[kept] for name, tensor in rows.items()}
                self._write(path, rows)
            answers.update(rows["answer"].tolist())
            self._number = int(path.stem.removeprefix("states-"))
            self._parts, self._bytes = [rows], size_of(rows)
        if len(answers) < lines:
            raise ValueError(
                f"--states {self.folder}: has the states of {len(answers)} of the {lines} answers "
                "of --output; name another folder and another --output"
            )

    def add(self, answer: int, readings: Sequence[StateReading]) -> None:
        """Append the states of one answer, whose number is above all before it."""
        part: dict[str, np.ndarray] = {
            "answer": np.full(len(readings), answer, np.int64),
            "at": np.array([reading.at for reading in readings], np.int32),
        }
        for name in ("last", "mean", "entropy"):
            states = [getattr(reading, name) for reading in readings]
            if states[0] is not None:
                part[name] = np.stack(states).astype(np.float16)
        if self._parts and self._bytes + size_of(part) > self.shard_bytes:
            self.flush()
            self._number += 1
            self._parts, self._bytes = [], 0
        self._parts.append(part)
        self._bytes += size_of(part)
        self._has_news = True

    def flush(self) -> None:
        """Write what was added."""
        if not self._has_news:
            return
        whole: dict[str, np.ndarray] = {}
        for name in self._parts[0]:
            whole[name] = np.concatenate([part[name] for part in self._parts])
        self._parts = [whole]
        self._write(self.folder / f"states-{self._number:05d}.safetensors", whole)
        self._has_news = False

    def _write(self, path: Path, rows: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save

        write_aside(path, save(rows))


def read_state_shard(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard. Raises ValueError, which names it, where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        rows = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if "answer" not in rows:
        raise ValueError(f"{path}: there is no tensor 'answer'")
    return rows


def size_of(rows: Mapping[str, np.ndarray]) -> int:
    """Bytes of the rows' tensors."""
    return sum(tensor.nbytes for tensor in rows.values())
