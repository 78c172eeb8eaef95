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
# Of the metrics; of all others a higher one is better.
LOWER_IS_BETTER = ("loss", "mae", "perplexity", "bits_per_byte", "kl")
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
    """Events in --tensorboard, else output_dir/runs.

    Those that an interrupted run wrote after its checkpoint are dropped.
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
    """Weights & Biases, set up by its environment variables (WANDB_MODE=offline, WANDB_PROJECT).

    A resumed run continues its page.
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
        # Its own counter never goes back; the step does after a resume.
        self.run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab, set up by its environment variables (SWANLAB_MODE=local).

    A resumed run continues its page.
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


class Logger(Protocol):
    """Where measurements also go: an instance of one of LOGGERS."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


LOGGERS: dict[str, type[TensorBoard] | type[WandB] | type[SwanLab]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "swanlab": SwanLab,
}


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError where a logger's package is not installed."""
    for name in names:
        if find_spec(package := LOGGERS[name].package) is None:
            raise ValueError(
                f'--report_to {name} needs the package {package}: pip install -e ".[{name}]"'
            )


def versions() -> dict[str, str]:
    """{package: version} of all that may change a run's numbers."""
    numbers = {"python": platform.python_version()}
    for name in ("torch", "transformers", "deepspeed", "peft", "safetensors", "glm-foundry"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:  # run from its folder
            numbers[name] = "not installed"
    return numbers


def git_commit() -> str | None:
    """Commit of this code, with "+changes" where files differ; None outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def processor() -> str:
    """Name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def is_better_value(metric: str, value: float, than: float | None, by: float = 0.0) -> bool:
    """Whether a metric's `value` is better than another (None: than nothing) by more than `by`.

    nan never is.
    """
    if than is None:
        return not math.isnan(value)
    return (than - value if metric in LOWER_IS_BETTER else value - than) > by


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run with its "steps".

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = Path(folder) / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no {RUN}: wanted the --output_dir of a run")
    run = read_json(path)
    number = run.get("format_version")
    if not isinstance(number, int):
        raise ValueError(f"{path}: not a run's record")
    if number > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {number}, this program reads up to {FORMAT_VERSION}"
        )
    if not run.get("steps"):
        metrics = path.with_name(METRICS_FILE)
        run["steps"] = read_steps(metrics) if metrics.is_file() else []
    return run


def print_columns(heads: list[str], lines: list[list[str]]) -> None:
    """Print a table: columns of numbers on the right, others on the left."""
    columns = []
    for head, *cells in zip(heads, *lines):
        width = max(map(len, [head, *cells]))
        align = str.rjust if is_numeric(cells) else str.ljust
        columns.append([align(cell, width) for cell in [head, *cells]])
    for line in zip(*columns):
        print("  ".join(line).rstrip())


def is_numeric(cells: list[str]) -> bool:
    """Whether every cell begins as a number, or is empty."""
    return all(cell[:1] in "+-0123456789" for cell in cells)


def to_json(value: object, **options: Any) -> str:
    """JSON text with null for inf and nan, which JSON cannot write."""
    return json.dumps(finite_or_none(value), **options)


def finite_or_none(value: object) -> object:
    """A JSON value with None in place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(finite_or_none, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but not a last one that a killed run left unfinished.

    Raises:
        ValueError: another line is not a step's.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            steps.append({"step": values["step"]} | values)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and not line.endswith("}"):
                return steps
            raise ValueError(
                f"{path}:{number}: wanted an object with a step, got {line[:60]!r}"
            ) from None
    return steps


def utc_now() -> str:
    """The time in ISO 8601."""
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
        facts: dict[str, Any],
        eval_data: str | None = None,
    ):
        """
        Args:
            done: number of steps before a resumed run.
            facts: what of run.json the caller knows.
            eval_data: identifies the evaluation rows; only values on the same rows are compared.
        """
        self.config = config
        self.output_dir = output_dir
        self.started = time.monotonic()
        self.failing: set[str] = set()
        try:
            before = read_run(output_dir) if done else {}
        except ValueError:
            before = {}
        self.seconds_before = before.get("seconds", 0.0)
        sitting = {"started": utc_now(), "first_step": done + 1, "eval_data": eval_data}
        self.record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "id": before.get("id", uuid.uuid4().hex),
            "status": "running",
            "started": before.get("started", utc_now()),
            "sittings": [*before.get("sittings", []), sitting],
            "memory": [each for each in before.get("memory", []) if each["last_step"] <= done],
            **facts,
            "flags": config.to_dict(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        self.path = output_dir / METRICS_FILE
        # Step and value of the best evaluation on the present rows so far, the first of equals.
        self.best: dict[str, Any] | None = None
        for line in self.truncate_steps(done):
            if self.sitting_of(line["step"]).get("eval_data") == eval_data:
                self.note_best(line)
        self.file = LineFile(self.path)
        self.loggers = self.open_loggers(done)
        self.write()

    def truncate_steps(self, done: int) -> list[dict[str, Any]]:
        """The first `done` steps, to which metrics.jsonl is cut: a resumed run repeats the rest."""
        lines = read_steps(self.path) if done and self.path.is_file() else []
        lines = [line for line in lines if line["step"] <= done]
        write_aside(self.path, "".join(to_json(line) + "\n" for line in lines))
        return lines

    def open_loggers(self, done: int) -> dict[str, Logger]:
        """The loggers of --report_to; raises ValueError where one cannot start."""
        loggers: dict[str, Logger] = {}
        for name in self.config.loggers:
            try:
                loggers[name] = LOGGERS[name](self.config, self.output_dir, self.record["id"], done)
            except Exception as error:  # no account, no network: each package has errors of its own
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"--report_to {name}: {reason}") from error
        return loggers

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        self.log(step, values)
        self.attempt(self.path, lambda: self.file.add(to_json({"step": step, **values})))
        self.note_best({"step": step, **values})
        if time.monotonic() - self.written > RECORD_SECONDS:
            self.write()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand values to the loggers; one that fails gets no more."""
        for name, logger in list(self.loggers.items()):
            try:
                logger.add(step, values)
            except Exception as error:
                self.warn(f"--report_to {name}", error)
                del self.loggers[name]

    def add_memory(self, epoch: dict[str, Any]) -> None:
        """Write an epoch's memory, as EpochMemory has it, to run.json and the loggers."""
        self.record["memory"].append(epoch)
        values = {
            "memory/epoch_peak_gb": max(epoch["rank_peaks_gb"]),
            "memory/epoch_added_gb": epoch["end_gb"] - epoch["begin_gb"],
            "memory/epoch_host_peak_gb": epoch["host_peak_gb"],
        }
        self.log(epoch["last_step"], values)

    def attempt(self, path: Path, write: Callable[[], object]) -> bool:
        """Whether `write()` could write.

        The first of several failures in a row prints a warning, and their end a line.
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
        """Print a warning, unless the last attempt failed too."""
        if what not in self.failing:
            self.failing.add(what)
            text = " ".join(str(error).split())[:200]
            reason = getattr(error, "strerror", None) or text or type(error).__name__
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
            "updated": utc_now(),
            "seconds": round(self.seconds_before + seconds, 1),
            "best": self.best,
        }
        return to_json(record, indent=2, ensure_ascii=False) + "\n"

    def sitting_of(self, step: int) -> dict[str, Any]:
        """The sitting that made a step."""
        sittings: list[dict[str, Any]] = self.record["sittings"]
        for sitting in reversed(sittings):
            if sitting["first_step"] <= step:
                return sitting
        return sittings[-1]

    def note_best(self, line: dict[str, Any]) -> None:
        """Remember the evaluation in a line of metrics.jsonl where it is the best so far."""
        metric = self.config.metric_for_best
        value = line.get(f"eval_{metric}")
        if value is not None and is_better_value(
            metric, value, self.best["value"] if self.best else None
        ):
            self.best = {"step": line["step"], "metric": metric, "value": value}

    def close(self, status: str) -> None:
        """Write everything, with how the run ended."""
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
        """Replace run.json in place by shorter text, which a full disk has room for."""
        text = to_json(json.loads(self.render()), ensure_ascii=False)
        overwrite(self.output_dir / RUN, text + "\n")
