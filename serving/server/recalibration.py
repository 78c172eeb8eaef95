"""Recalibrates the predictor on the lengths that the server sees, in the background.

Every so many whole answers a niced process runs `python -m predictor.update` on the newest ones.
The newest half of the answers since the last time is held out: neither the predictor that serves
nor the update has been fitted to it, and the update serves only where it is better there
(predictor.held_out). It is then written to a folder of its own, where the next start finds it.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import child_environment
from chatglm.files import read_json
from chatglm.saving import locked_output, put_in_place
from finetune.files import sha256
from predictor.decoder import CARD, read_card
from predictor.held_out import describe_held_out
from serving.server.predictors import Predictors, one_line_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

log = logging.getLogger(__name__)

WINDOW = 2000  # answers that an update is fitted to at most
CHARACTERS = 20_000_000  # of the prompts that are kept
MIN_EVERY = 40
MIN_PROMPTS = 10  # different ones to fit to; predictor.update's least
UPDATE_S = 3600.0  # an update that takes longer is killed
NICE = 10  # a tenth of the share of an engine on the CPU; at 19 a busy machine leaves it nothing
OUTCOMES = ("taken", "dropped", "failed")
PYTHON = sys.executable


class UpdateFailed(RuntimeError):
    """No update came of the answers; the text says why."""


class Recalibrator:
    """Collects answers and updates the predictor from them in a thread of its own.

    Prompts are kept in memory, and during an update in a temporary folder that only the server's
    user can read.

    Args:
        every: whole answers from one update to the next.
        output: the folder for updates that are taken, as `checked_output` returns it.
        registry: of prometheus_client, for the metrics; or None.
    """

    def __init__(
        self,
        predictors: Predictors,
        *,
        every: int,
        output: Path,
        registry: "CollectorRegistry | None" = None,
    ) -> None:
        self.predictors, self.every, self.output = predictors, every, output
        self.rows: deque[tuple[str, int, bool]] = deque()
        self.tried: Counter | None = None  # by outcome
        self.process: subprocess.Popen | None = None
        self._characters = 0
        self._new_rows = self._new_whole = 0  # since the last update was tried
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="recalibration", daemon=True)
        if registry is not None:
            self._make_metrics(registry)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread and its process."""
        self._closed = True
        self._due.set()
        process = self.process
        if process is not None:
            with suppress(OSError):
                process.kill()
        if self._thread.is_alive():
            self._thread.join(10)

    def observe(self, prompt: str, tokens: int, finished: bool) -> None:
        """Take an answer, whose length is `tokens`, or more where it is not finished. Quick."""
        with self._lock:
            self.rows.append((prompt, tokens, finished))
            self._characters += len(prompt)
            self._new_rows += 1
            self._new_whole += finished
            while len(self.rows) > WINDOW + self._new_rows // 2 or self._characters > CHARACTERS:
                self._characters -= len(self.rows.popleft()[0])
            if self._new_whole >= self.every:
                self._due.set()

    def _run(self):
        while True:
            self._due.wait()
            self._due.clear()
            if self._closed:
                return
            self.recalibrate()

    def recalibrate(self) -> str:
        """Try one update, as one line of the log says; returns its outcome, one of OUTCOMES."""
        with self._lock:
            rows = list(self.rows)
            hold_out = min(self._new_rows, len(rows)) // 2
            self._new_rows = self._new_whole = 0
        try:
            outcome, text = self._update(rows, hold_out)
        except Exception as error:  # whatever it is, the server serves on
            outcome, text = "failed", one_line_of(error)
        if self._closed:
            return outcome
        if self.tried is not None:
            self.tried.labels(outcome).inc()
        level = logging.WARNING if outcome == "failed" else logging.INFO
        version = self.predictors.current.version
        log.log(level, "recalibration %s: %s; version %d serves", outcome, text, version)
        return outcome

    def _update(self, rows: list[tuple[str, int, bool]], hold_out: int) -> tuple[str, str]:
        """(outcome, why). Raises UpdateFailed, ValueError, OSError."""
        serving = self.predictors.current
        self.output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that one rename puts the update in place.
        aside = self.output.with_name(f".{self.output.name}.{os.getpid()}.tmp")
        candidate = aside / "predictor"
        try:
            with tempfile.TemporaryDirectory(prefix="recalibration-") as work:
                report_file = Path(work) / "report.json"
                self._write_rows(Path(work) / "rows.jsonl", rows)
                self._run_process(
                    ["--predictor", str(serving.origin), "--against", str(serving.folder)],
                    ["--log", str(Path(work) / "rows.jsonl"), "--hold_out", str(hold_out)],
                    ["--newest", str(WINDOW), "--min_rows", str(MIN_PROMPTS)],
                    ["--output", str(candidate), "--json", str(report_file)],
                )
                held_out = read_json(report_file)["held_out"]
            text = describe_held_out(held_out)
            if not held_out["better"]:
                return "dropped", text
            new = self.predictors.load(candidate)
            with self.predictors.exclusive(), locked_output(self.output, "the folder"):
                if self.predictors.current is not serving:
                    return "dropped", "another predictor has been put in place meanwhile"
                put_in_place(candidate, self.output)
                self.predictors.use_recalibrated(new, self.output, serving.origin)
            return "taken", text
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write_rows(self, path: Path, rows: list[tuple[str, int, bool]]):
        with path.open("w", encoding="utf-8") as file:
            for prompt, tokens, finished in rows:
                row = {
                    "prompt": prompt,
                    "output_tokens": tokens,
                    "finished": finished,
                    "served_model": self.predictors.name,
                }
                file.write(json.dumps(row) + "\n")

    def _run_process(self, *words: list[str]):
        """Run predictor.update beside the engine. Raises UpdateFailed."""
        command = [PYTHON, "-m", "predictor.update", *sum(words, [])]
        env = child_environment(threads=1) | {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, self.process.pid, NICE)
            if self._closed:
                self.process.kill()
            _, errors = self.process.communicate(timeout=UPDATE_S)
        except subprocess.TimeoutExpired:
            raise UpdateFailed(f"predictor.update took over {UPDATE_S:g} s") from None
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()
            code, self.process = self.process.returncode, None
        if code:
            last = (errors.strip().splitlines() or [f"predictor.update ended with {code}"])[-1]
            raise UpdateFailed(last)

    def _make_metrics(self, registry: "CollectorRegistry"):
        from prometheus_client import Counter

        text = "Updates of the predictor that were tried"
        self.tried = Counter("glm_recalibrations", text, ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.tried.labels(outcome)


def add_version_metric(predictors: Predictors, registry: "CollectorRegistry") -> None:
    """The metric glm_predictor_version."""
    from prometheus_client import Gauge

    version = Gauge("glm_predictor_version", "Of the predictor that serves", registry=registry)
    version.set_function(lambda: predictors.current.version)


def checked_output(output: str | Path | None, home: str | Path) -> Path:
    """The resolved folder of --recalibrated_dir; `home`: that of --predictor.

    Raises:
        ValueError: it is the original's, or holds other things than a predictor.
    """
    origin = Path(home).resolve()
    output = Path(output or origin.with_name(f"{origin.name}-recalibrated")).resolve()
    if output == origin or output in origin.parents or origin in output.parents:
        raise ValueError(f"--recalibrated_dir {output}: must lie beside --predictor {origin}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--recalibrated_dir {output}: not a folder")
    if output.is_dir() and any(islice(output.iterdir(), 1)) and not (output / CARD).is_file():
        raise ValueError(f"--recalibrated_dir {output} holds other things than a predictor")
    return output


def resume(predictors: Predictors, output: Path) -> None:
    """Let the recalibrated predictor of an earlier run serve, if it is of the same original.

    One that is damaged, or was made from another predictor, is left aside with a line in the log.
    """
    if not (output / CARD).is_file():
        return
    try:
        card: dict[str, Any] = read_card(output)
        wanted = sha256(predictors.home / CARD)
        if card.get("updated", {}).get("from", {}).get("card_sha256") != wanted:
            log.warning("--recalibrated_dir %s: not made from %s, left", output, predictors.home)
            return
        predictors.use_recalibrated(predictors.load(output), output, predictors.home)
    except Exception as error:
        log.error("--recalibrated_dir %s: %s; the original serves", output, one_line_of(error))
