"""What a run measured: output_dir/run.json and metrics.jsonl, and the LOGGERS that --report_to
names. Free of torch.
"""

import json
import math
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from chatglm.files import read_json
from finetune.files import LastingStream, LineFile, overwrite, write_aside

RUN = "run.json"
METRICS_FILE = "metrics.jsonl"
FORMAT_VERSION = 2  # 1 had the steps of metrics.jsonl in run.json too
LOWER_IS_BETTER = ("loss", "mae")  # of the metrics; of all others a higher one is better
RECORD_SECONDS = 60  # between two writings of run.json where nothing else asks for one
ROOT = Path(__file__).resolve().parent.parent


class RunFlags(Protocol):
    """The flags that a record reads; all of the configuration is written."""

    def to_dict(self) -> dict[str, Any]: ...

    @property
    def metric_for_best(self) -> str: ...

    @property
    def loggers(self) -> tuple[str, ...]: ...

    @property
    def tensorboard(self) -> str | None: ...


class TensorBoard:
    """Events in --tensorboard, else output_dir/runs; what an interrupted run told after its
    checkpoint is dropped.
    """

    package = "tensorboard"

    def __init__(self, config: RunFlags, output_dir: Path, run_id: str, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(
            config.tensorboard or str(output_dir / "runs"), purge_step=done + 1
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class WandB:
    """Weights & Biases; its own environment variables say where to (WANDB_MODE=offline,
    WANDB_PROJECT). A resumed run keeps its page.
    """

    package = "wandb"

    def __init__(self, config: RunFlags, output_dir: Path, run_id: str, done: int):
        import os

        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "glm-foundry"),
            name=output_dir.name,
            id=run_id,
            resume="allow",
            dir=str(output_dir),
            config=config.to_dict(),
        )
        self.run.define_metric(
            "*", step_metric="step"
        )  # its own counter never goes back; ours does after a resume

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab; its own environment variables say where to (SWANLAB_MODE=local). A resumed run keeps
    its page.
    """

    package = "swanlab"

    def __init__(self, config: RunFlags, output_dir: Path, run_id: str, done: int):
        import swanlab

        self.run = swanlab.init(
            project="glm-foundry",
            experiment_name=output_dir.name,
            id=run_id[:21],
            resume="allow",
            logdir=str(output_dir / "swanlog"),
            config=config.to_dict(),
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab}


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError where a logger's package is not installed."""
    for name in names:
        if find_spec(package := LOGGERS[name].package) is None:
            raise ValueError(
                f'--report_to {name} needs the package {package}: pip install -e ".[{name}]"'
            )


def versions() -> dict[str, str]:
    """Of all that may change a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "deepspeed", "peft", "safetensors", "glm-foundry"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its folder
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of this code, with "+changes" where files differ from it; None outside of a
    repository.
    """

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_better(metric: str, value: float, than: float | None, by: float = 0.0) -> bool:
    """`value` of a metric is better than another one (None: than nothing) by more than `by`; nan
    never is.
    """
    if than is None:
        return not math.isnan(value)
    return (than - value if metric in LOWER_IS_BETTER else value - than) > by


def read_run(folder: Path) -> dict:
    """The record of a run with its "steps"; raises ValueError where there is none, or none that can
    be read.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RUN}: wanted the --output_dir of a run")
    run = read_json(path)
    found = run.get("format_version")
    if not isinstance(found, int):
        raise ValueError(f"{path}: not a run's record")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {found}, this program reads up to {FORMAT_VERSION}"
        )
    if not run.get("steps"):
        metrics = path.with_name(METRICS_FILE)
        run["steps"] = read_steps(metrics) if metrics.is_file() else []
    return run


def print_table(heads: list[str], lines: list[list[str]]) -> None:
    """Columns of numbers on the right, others on the left."""
    columns = list(zip(heads, *lines))
    right = [all(cell[:1] in "+-0123456789" for cell in cells) for _, *cells in columns]
    padded = [
        [
            cell.rjust(max(map(len, cells))) if r else cell.ljust(max(map(len, cells)))
            for cell in cells
        ]
        for r, cells in zip(right, columns)
    ]
    for line in zip(*padded):
        print("  ".join(line).rstrip())


def to_json(value: object, **options) -> str:
    """JSON text with null for inf and nan, which JSON has no word for."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), **options)


def read_steps(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl but a last one that a killed run left unfinished; raises
    ValueError where another is no step's.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append({"step": (told := json.loads(line))["step"]} | told)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and not line.endswith("}"):
                return found
            raise ValueError(
                f"{path}:{number}: wanted an object with a step, got {line[:60]!r}"
            ) from None
    return found


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RunLog:
    """Writes a run's measurements; rank 0 alone has one.

    Every step goes to metrics.jsonl at once, unrounded. run.json has all else that is known of the
    run, and is written whole at each evaluation and save, at the end, and otherwise once a minute;
    its size does not grow with the steps. Where one of these cannot be written, or a logger fails,
    a warning says so once and the run goes on.
    """

    def __init__(
        self,
        config: RunFlags,
        output_dir: Path,
        done: int,
        facts: dict,
        eval_data: str | None = None,
    ):
        """`facts`: what of run.json the caller knows. `done`: steps that a resumed run has behind
        it. `eval_data`: tells one set of evaluation rows from another; only values of the same set
        are compared.
        """
        self.config, self.output_dir, self.started = config, output_dir, time.monotonic()
        self.failing: set[str] = set()
        try:
            before = read_run(output_dir) if done else {}
        except ValueError:
            before = {}
        self.seconds_before = before.get("seconds", 0.0)
        self.record = {
            "format_version": FORMAT_VERSION,
            "id": before.get("id", uuid.uuid4().hex),
            "status": "running",
            "started": before.get("started", now()),
            "sittings": [
                *before.get("sittings", []),
                {"started": now(), "first_step": done + 1, "eval_data": eval_data},
            ],
            **facts,
            "flags": config.to_dict(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        self.path = output_dir / METRICS_FILE
        # A resumed run repeats the steps after its checkpoint: the first telling of them goes.
        lines = read_steps(self.path) if done and self.path.is_file() else []
        lines = [line for line in lines if line["step"] <= done]
        write_aside(self.path, "".join(to_json(line) + "\n" for line in lines))
        # Step and value of the best evaluation on the present rows so far, the first of equals.
        self.best: dict | None = None
        for line in lines:
            if self.sitting_of(line["step"]).get("eval_data") == eval_data:
                self.note_best(line)
        self.file = LineFile(self.path)
        self.loggers = {}
        for name in config.loggers:
            try:
                self.loggers[name] = LOGGERS[name](config, output_dir, self.record["id"], done)
            except Exception as error:  # no account, no network: each package has errors of its own
                raise ValueError(
                    f"--report_to {name}: "
                    f"{' '.join(str(error).split())[:300] or type(error).__name__}"
                ) from error
        self.write()

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, logger in list(self.loggers.items()):
            try:
                logger.add(step, values)
            except Exception as error:
                self.warn(f"--report_to {name}", error)
                del self.loggers[name]
        self.attempt(self.path, lambda: self.file.add(to_json({"step": step, **values})))
        self.note_best({"step": step, **values})
        if time.monotonic() - self.written > RECORD_SECONDS:
            self.write()

    def attempt(self, path: Path, write: Callable[[], object]) -> bool:
        """Whether `write()` could write; the first failure of a row of them is a warning, and so is
        their end.
        """
        try:
            write()
        except OSError as error:
            self.warn(str(path), error)
            return False
        if str(path) in self.failing:
            self.failing.remove(str(path))
            print(f"{path} can be written again", file=LastingStream(sys.stdout), flush=True)
        return True

    def warn(self, what: str, error: Exception) -> None:
        if what not in self.failing:
            self.failing.add(what)
            reason = (
                getattr(error, "strerror", None)
                or " ".join(str(error).split())[:200]
                or type(error).__name__
            )
            reason = reason.removeprefix("cannot be written: ")  # as finetune.files.writing says it
            print(
                f"WARNING: {what} cannot be written ({reason}); training goes on",
                file=LastingStream(sys.stdout),
                flush=True,
            )

    def write(self) -> None:
        """Put the record as it is now in run.json."""
        self.written = time.monotonic()
        self.attempt(
            self.output_dir / RUN, lambda: write_aside(self.output_dir / RUN, self.render())
        )

    def render(self) -> str:
        """run.json as it is now."""
        seconds = time.monotonic() - self.started
        self.record["sittings"][-1]["seconds"] = round(seconds, 1)
        record = self.record | {
            "updated": now(),
            "seconds": round(self.seconds_before + seconds, 1),
            "best": self.best,
        }
        return to_json(record, indent=2, ensure_ascii=False) + "\n"

    def sitting_of(self, step: int) -> dict:
        """The sitting that made a step."""
        sittings = self.record["sittings"]
        return next((s for s in reversed(sittings) if s["first_step"] <= step), sittings[-1])

    def note_best(self, line: dict) -> None:
        """Keep the step and value of a line of metrics.jsonl, where its evaluation is better than
        those before.
        """
        metric = self.config.metric_for_best
        value = line.get(f"eval_{metric}")
        if value is not None and is_better(metric, value, self.best and self.best["value"]):
            self.best = {"step": line["step"], "metric": metric, "value": value}

    def close(self, status: str) -> None:
        self.record["status"] = status
        self.attempt(self.path, self.file.flush)
        self.file.close()
        if not self.attempt(
            self.output_dir / RUN, lambda: write_aside(self.output_dir / RUN, self.render())
        ):
            self.attempt(self.output_dir / RUN, self.write_over)
        for name, logger in self.loggers.items():
            try:
                logger.close()
            except Exception as error:
                self.warn(f"--report_to {name}", error)

    def write_over(self) -> None:
        """The record, in less room, over the last one: how the run ended must be true on a full
        disk too.
        """
        overwrite(
            self.output_dir / RUN, to_json(json.loads(self.render()), ensure_ascii=False) + "\n"
        )
