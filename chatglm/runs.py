"""The folders that a training run leaves: output_dir/epoch-E-step-S. Free of torch."""

import re
from pathlib import Path

from .files import read_json

CHECKPOINT = re.compile(r"epoch-(\d+)-step-(\d+)$")
MANIFEST = "manifest.json"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises ValueError where it has none."""
    found = CHECKPOINT.search(folder.name)
    if found is None:
        raise ValueError(f"{folder} is not named epoch-E-step-S")
    return int(found.group(2))


def committed_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    if not Path(output_dir).is_dir():
        return []
    folders = []
    for path in Path(output_dir).glob("epoch-*-step-*"):
        if CHECKPOINT.search(path.name) and (path / MANIFEST).is_file():
            folders.append(path)
    return sorted(folders, key=step_of)


def check_not_run(path: str | Path, flag: str = "") -> None:
    """Raises ValueError where `path` is a run's folder; it names the checkpoints in there."""
    path = Path(path)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return
    if not (checkpoints := committed_checkpoints(path)):
        return
    last = checkpoints[-1]
    try:
        best = path / read_json(path / "best.json")["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        best = None
    names = [f"{last} (the last)"]
    if best == last:
        names = [f"{last} (the last and the best)"]
    elif best in checkpoints:
        names = [f"{best} (the best)", *names]
    raise ValueError(
        f"{flag and f'{flag}: '}{path} is a run's folder; "
        f"give one of its {len(checkpoints)} checkpoints: {', '.join(names)}"
    )
