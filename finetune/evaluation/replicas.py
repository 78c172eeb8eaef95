"""Answers of several replicas of a model, each a process of its own (replica_process.py).

Batches are dealt one at a time to whichever replica is free. A replica that dies is started again,
and its batch is dealt anew.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Self

from chatglm.commands import child_environment
from finetune.evaluation.generation import AnswerOptions, Generated, PromptBatch
from finetune.evaluation.inference import InferenceFlags, InferenceSetup, loading_options
from finetune.placing import ReplicaSpec, StageFigures

# How often a replica is started again, and a batch dealt again.
RETRIES = 2
CLOSE_S = 5.0  # a process that takes longer to end is killed
# What a replica's error is raised as here.
ERRORS: dict[str, type[Exception]] = {
    "MemoryError": MemoryError,
    "ValueError": ValueError,
    "OSError": OSError,
    "ImportError": ImportError,
}


@dataclass
class ReplicaFigures:
    """What one replica took.

    Attributes:
        load_s: seconds to import, read and place the weights, of the last start.
        weight_bytes: {device: bytes}.
        steps: passes of the model: of each batch, the tokens of its longest answer.
        busy_s: seconds of answering.
    """

    load_s: float = 0.0
    weight_bytes: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    batches: int = 0
    steps: int = 0
    busy_s: float = 0.0
    deaths: int = 0

    def add(self, answers: Sequence[Generated], seconds: float) -> None:
        """Count a batch."""
        self.batches += 1
        self.rows += len(answers)
        self.tokens += sum(len(ids) for ids, _ in answers)
        self.steps += max(len(ids) + ended for ids, ended in answers)
        self.busy_s += seconds


class OfflineReplica:
    """A replica's process, and the batch that it has.

    Attributes:
        number: from 1.
        dealt: the number of its batch; None where it has none.
        ready: the model is loaded.
        given_up: it died too often to be started again.
    """

    def __init__(self, number: int, spec: ReplicaSpec, setup: dict[str, Any]) -> None:
        self.number = number
        self.name = f"replica {number} ({spec.devices})"
        self.setup = setup | {
            "stages": [asdict(stage) for stage in spec.stages],
            "device_map": spec.device_map,
        }
        self.figures = ReplicaFigures()
        self.dealt: int | None = None
        self.ready = False
        self.given_up = False
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, inbox: "ReplicaMessages") -> None:
        """Start the process; its messages come to `inbox`, and None when it has ended."""
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune.evaluation.replica_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            # Ctrl-C is for the command alone, which then closes the replicas' standard input.
            start_new_session=True,
        )
        output = self.process.stdout
        threading.Thread(target=self._pass_on, args=(output, inbox), daemon=True).start()
        self.send(self.setup)

    def _pass_on(self, output: IO[bytes], inbox: "ReplicaMessages") -> None:
        for line in output:
            if line.endswith(b"\n"):  # else it died while it wrote
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def send(self, message: dict[str, Any]) -> None:
        """Write a message; of a process that has died, its end is noticed where it is read."""
        assert self.process and self.process.stdin
        with suppress(OSError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> int:
        """End the process, where there is one; returns its exit code."""
        if self.process is None:
            return 0
        assert self.process.stdin
        with suppress(OSError):  # of what was not yet written to it
            self.process.stdin.close()
        try:
            return self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def summary(self, predicted: Sequence[StageFigures] = ()) -> str:
        """One line on what it took, beside what was predicted of its stages."""
        took = self.figures
        weights = []
        for device, size in took.weight_bytes.items():
            weights.append(f"{size / 2**20:,.1f} MiB on {device}")
        text = f"{self.name}: weights {', '.join(weights) or '-'}"
        seconds = f"{took.busy_s:.2f} s"
        if predicted:
            text += f" (predicted {sum(s.weight_bytes for s in predicted) / 2**20:,.1f})"
            # The first token of a batch comes of its prefill.
            wanted_s = sum(s.prefill_s for s in predicted) * took.batches
            wanted_s += sum(s.decode_s for s in predicted) * (took.steps - took.batches)
            seconds += f" (predicted {wanted_s:.2f})"
        text += f", loaded in {took.load_s:.1f} s; {took.rows} rows, {took.tokens:,} tokens "
        text += f"by {took.steps:,} steps in {seconds}"
        return text + (f"; died {took.deaths} times" if took.deaths else "")


# What the processes write, and None where one has ended.
ReplicaMessages = queue.SimpleQueue[tuple[OfflineReplica, dict[str, Any] | None]]


class OfflineReplicas:
    """The processes of a placement's replicas. A context manager, which ends them.

    Args:
        specs: one for each process.
        settings: how answers are generated.
    """

    def __init__(
        self,
        specs: Sequence[ReplicaSpec],
        flags: InferenceFlags,
        setup: InferenceSetup,
        settings: AnswerOptions,
    ) -> None:
        message = {
            "folder": os.fspath(setup.folder),
            "tokenizer": {
                "mode": flags.mode,
                "base": flags.base_model,
                "prompt_style": flags.prompt_style,
                "verify": flags.verify,
            },
            "loading": loading_options(flags),
            "settings": asdict(settings),
        }
        self.inbox: ReplicaMessages = queue.SimpleQueue()
        self.replicas: list[OfflineReplica] = []
        self.weights_fingerprint = ""
        self.fatal_deaths: Counter[int] = Counter()
        for number, spec in enumerate(specs, 1):
            self.replicas.append(OfflineReplica(number, spec, message))

    def __enter__(self) -> Self:
        try:
            for replica in self.replicas:
                replica.start(self.inbox)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for replica in self.replicas:
            replica.close()

    def fingerprint(self) -> str:
        """`model_fingerprint` of the first replica that is loaded; waits for it."""
        while not self.weights_fingerprint:
            self._next_event()
        return self.weights_fingerprint

    def answers(
        self, batches: Sequence[PromptBatch]
    ) -> Iterator[tuple[PromptBatch, list[Generated]]]:
        """(batch, its answers) of all batches, as they come; they are dealt in their order.

        Raises:
            MemoryError, ValueError, OSError, ImportError: as loading and answering in one process.
            ChildProcessError: processes died too often.
        """
        waiting = deque(range(len(batches)))
        left = len(batches)
        while left:
            self._deal(waiting, batches)
            replica, message = self._next_event()
            if message is None:
                lost, replica.dealt = replica.dealt, None
                if lost is not None:
                    waiting.appendleft(lost)
                    self._count_loss(lost, batches[lost], replica)
            elif "answers" in message:
                batch = batches[message["number"]]
                answers: list[Generated] = []
                for ids, ended in message["answers"]:
                    answers.append((ids, ended))
                replica.dealt = None
                replica.figures.add(answers, message["seconds"])
                left -= 1
                self._deal(waiting, batches)  # it computes while these are written
                yield batch, answers

    def _deal(self, waiting: deque[int], batches: Sequence[PromptBatch]) -> None:
        for replica in self.replicas:
            if waiting and replica.ready and replica.dealt is None:
                number = replica.dealt = waiting.popleft()
                replica.send({"number": number, "batch": asdict(batches[number])})

    def _next_event(self) -> tuple[OfflineReplica, dict[str, Any] | None]:
        """Wait for a message; a replica that has ended is started again, or given up."""
        replica, message = self.inbox.get()
        if message is None:
            self._restart(replica)
        elif "error" in message:
            kind = ERRORS.get(message["error"], RuntimeError)
            raise kind(f"{replica.name}: {message['text']}")
        elif "ready" in message:
            replica.ready = True
            replica.figures.load_s = message["seconds"]
            replica.figures.weight_bytes = message["weight_bytes"]
            self.weights_fingerprint = message["fingerprint"]
            pid = replica.process.pid if replica.process else 0
            tell_above_bar(
                f"{replica.name}: process {pid} is ready after {message['seconds']:.1f} s"
            )
        return replica, message

    def _restart(self, replica: OfflineReplica) -> None:
        how = ending(replica.close())
        process = f"{replica.name}, process {replica.process.pid if replica.process else 0},"
        replica.ready = False
        replica.figures.deaths += 1
        if replica.figures.deaths <= RETRIES:
            tell_above_bar(f"{process} {how}; it is started again")
            replica.start(self.inbox)
            return
        replica.given_up = True
        tell_above_bar(f"{process} {how}; it is given up")
        if all(other.given_up for other in self.replicas):
            raise ChildProcessError(
                f"every replica died {RETRIES + 1} times, the last one {how}; memory may have run "
                "out: give fewer replicas, a lower --batch_size or --max_src_len"
            )

    def _count_loss(self, number: int, batch: PromptBatch, replica: OfflineReplica) -> None:
        self.fatal_deaths[number] += 1
        if self.fatal_deaths[number] > RETRIES:
            raise ChildProcessError(
                f"the batch of row {batch.numbers[0] + 1} ended {RETRIES + 1} processes, "
                f"{replica.name} the last; memory may have run out: give a lower --batch_size, "
                "--max_src_len or --max_new_tokens"
            )

    def summary(self, predicted: Sequence[StageFigures] = ()) -> list[str]:
        """A line for each replica on what it took.

        Args:
            predicted: the stages of one replica.
        """
        return [replica.summary(predicted) for replica in self.replicas]


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def tell_above_bar(line: str) -> None:
    """Write a line to stderr, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
