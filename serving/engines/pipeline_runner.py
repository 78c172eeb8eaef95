"""The driver's side of a pipeline: its workers, and passes that go round through them."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chatglm.commands import child_environment
from finetune.evaluation.inference import load_ready, pick_device
from finetune.placing import StageSpec
from serving.engines.adapters import AdapterSet
from serving.engines.pass_plans import PlannedPass
from serving.engines.passes import ModelRunner, report_of
from serving.engines.stage_links import (
    HiddenLink,
    PassMessage,
    StageOrder,
    dtype_name,
    on_host,
)
from serving.engines.stage_loading import (
    OpenedModel,
    StagePart,
    make_stage,
    resolve_dtype,
)
from serving.engines.stage_reports import ModelLoading, StageReport
from serving.engines.state_tap import StateTap

END_S = 5.0  # how long a worker has to end by itself


class Worker:
    """A stage's process, as the driver sees it.

    Args:
        number: of the stage.
        incoming, outgoing: its ends of the links to its neighbours; they are closed here.
    """

    def __init__(
        self, number: int, spec: StageSpec, incoming: socket.socket, outgoing: socket.socket
    ):
        self.number, self.spec = number, spec
        self._socket, its = socket.socketpair()
        self._asking = threading.Lock()
        self.process = self.start_process(its, incoming, outgoing)
        self._control = Connection(self._socket.detach())
        for end in (its, incoming, outgoing):
            end.close()

    def start_process(
        self, control: socket.socket, incoming: socket.socket, outgoing: socket.socket
    ) -> Any:
        """A process that has the sockets; as a Popen.

        `control` is its standard input, over which it gets the others.
        """
        threads = self.spec.threads
        command = [sys.executable, "-m", "serving.engines.stage_process", str(threads or 0)]
        environment = child_environment(threads)
        process = subprocess.Popen(command, env=environment, stdin=control.fileno(), stdout=2)
        socket.send_fds(self._socket, [b"\0"], [incoming.fileno(), outgoing.fileno()])
        return process

    def tell(self, question: str, *arguments: Any) -> None:
        """Ask without waiting for the answer, which `answer` returns."""
        try:
            self._control.send((question, arguments))
        except OSError:
            raise EOFError from None

    def answer(self) -> Any:
        """What the worker answers. Raises what it raised; EOFError where it has ended."""
        try:
            state, value = self._control.recv()
        except OSError:
            raise EOFError from None
        if state == "failed":
            raise type(value)(f"stage {self.number} on {self.spec.device}: {value}")
        return value

    def ask(self, question: str, *arguments: Any) -> Any:
        """`tell` and `answer`; from any thread."""
        with self._asking:
            self.tell(question, *arguments)
            return self.answer()

    def end(self) -> None:
        """End the process."""
        self._control.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class PipelineAdapters(AdapterSet):
    """The adapters of the driver's stage, and by it of all other stages."""

    def __init__(self, model: PreTrainedModel, device: torch.device, runner: "PipelineRunner"):
        super().__init__(model, device)
        self._runner = runner

    def _load_elsewhere(self, folder: Path, number: int) -> None:
        loaded = []
        try:
            for worker in self._runner.workers:
                self._runner.ask(worker, "load adapter", str(folder.absolute()), number)
                loaded.append(worker)
        except Exception:
            for worker in loaded:
                self._runner.ask(worker, "drop adapter", number)
            raise

    def _drop_elsewhere(self, number: int) -> None:
        for worker in self._runner.workers:
            with contextlib.suppress(RuntimeError):  # it has ended: step says so
                self._runner.ask(worker, "drop adapter", number)


class PipelineRunner(ModelRunner):
    """Runs an engine's passes through stages, of which the first or the last is in this process.

    Args:
        lanes: micro-batches.
    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `open_pipeline`.
    """

    def __init__(
        self, loading: ModelLoading, stages: Sequence[StageSpec], kv_tokens: int, lanes: int
    ):
        self.workers: list[Worker] = []
        self._operations: list[tuple[int, str, tuple[Any, ...]]] = []
        dtype = resolve_dtype(loading.precision, stages)
        opened = OpenedModel(loading, dtype)
        check_chain(stages, opened.layers)
        # The driver has the output layer, and with it a tied embedding.
        self.is_first = opened.is_tied
        own = stages[0] if self.is_first else stages[-1]
        others = stages[1:] if self.is_first else stages[:-1]
        first = 1 if self.is_first else 0
        if own.threads:
            torch.set_num_threads(own.threads)
        try:
            self._start(others, first)
            device = torch.device(pick_device(own.device))
            model = opened.keep(StagePart(own, embeds=self.is_first, heads=True), device)
            del opened
            for number, worker in enumerate(self.workers, first):
                # One after another: some folders are whole in memory for a moment.
                part = StagePart(worker.spec, embeds=number == 0, heads=False)
                name = str(dtype).removeprefix("torch.")
                self.ask(worker, "load", StageOrder(without_checks(loading), part, name, lanes))
            adapters = PipelineAdapters(model, device, self)
            part = StagePart(own, embeds=self.is_first, heads=True)
            stage = make_stage(model, part, device, adapters, lanes, self._log)
        except BaseException:
            self.close()
            raise
        self._set_up(model, stage, kv_tokens)

    def _start(self, specs: Sequence[StageSpec], first: int) -> None:
        """Start the workers, in a chain of links that begins and ends here."""
        ours, incoming = socket.socketpair()
        self._outgoing = HiddenLink(Connection(ours.detach()))
        for number, spec in enumerate(specs, first):
            outgoing, following = socket.socketpair()
            self.workers.append(Worker(number, spec, incoming, outgoing))
            incoming = following
        self._incoming = HiddenLink(Connection(incoming.detach()))

    def _log(self, lane: int, operation: str, arguments: tuple[Any, ...]) -> None:
        self._operations.append((lane, operation, arguments))

    def submit(self, planned: PlannedPass) -> None:
        """Send a pass on its way."""
        message = PassMessage(planned.plan, self._operations)
        self._operations = []
        hidden = None
        if self.is_first:
            hidden = on_host(self.stage.compute(planned.plan))
            message = replace(message, dtype=dtype_name(hidden), shape=tuple(hidden.shape))
        self._outgoing.send(message, hidden)

    def collect(self, planned: PlannedPass) -> Tensor | None:
        """As ModelRunner's. Raises RuntimeError where a worker has ended."""
        try:
            _, hidden = self._incoming.receive()
        except (EOFError, OSError):
            raise self._death() from None
        assert hidden is not None  # a stage has computed them
        hidden = hidden.to(self.stage.device)
        if not self.is_first:
            hidden = self.stage.compute(planned.plan, hidden)
        return self.outputs(planned, hidden)

    def attach(self, tap: StateTap) -> None:
        """As ModelRunner's: refused, because the states are in other processes."""
        raise ValueError(
            "hidden states are read from a model on one device, this one lies on "
            f"{len(self.workers) + 1} stages: leave out --rereader, or place it on one device"
        )

    def ask(self, worker: Worker, question: str, *arguments: Any) -> Any:
        """What a worker answers. Raises RuntimeError where it has ended."""
        try:
            return worker.ask(question, *arguments)
        except EOFError:
            raise self._death() from None

    def _death(self) -> RuntimeError:
        """The error that names the stage that ended first, and its exit status."""
        from serving.engines.stage_process import NEIGHBOUR_ENDED

        ended = []
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = worker.process.wait(END_S)
                ended.append((status == NEIGHBOUR_ENDED, worker.number, worker.spec, status))
        if not ended:
            return RuntimeError("the pipeline is closed, or a link between its stages is broken")
        _, number, spec, status = min(ended, key=lambda entry: entry[:2])
        return RuntimeError(
            f"stage {number} of the pipeline (layers {spec.start} to {spec.end - 1} on "
            f"{spec.device}) has ended with exit status {status}"
        )

    def reports(self) -> list[StageReport]:
        """Of each stage, in order."""
        found = [self.ask(worker, "report") for worker in self.workers]
        own = report_of(self.stage, self.model)
        return [own, *found] if self.is_first else [*found, own]

    def close(self) -> None:
        """End the workers."""
        for name in ("_outgoing", "_incoming"):
            if (link := getattr(self, name, None)) is not None:
                link.close()
        for worker in self.workers:
            worker.end()


def check_chain(stages: Sequence[StageSpec], layers: int) -> None:
    """Raises ValueError where stages are not all of a model's layers, in order."""
    place = 0
    for stage in stages:
        if stage.start != place or stage.end <= stage.start:
            break
        place = stage.end
    if place != layers:
        found = ", ".join(f"{stage.start} to {stage.end}" for stage in stages)
        raise ValueError(
            f"the stages of a pipeline must hold layers 0 to {layers}, each one once and in order; "
            f"got {found}"
        )


def without_checks(loading: ModelLoading) -> ModelLoading:
    """The same for a worker: the driver has compared the files with their checksums."""
    return replace(loading, verify="off")


def load_single(loading: ModelLoading, device: str, threads: int | None = None) -> PreTrainedModel:
    """The whole model on one device, in this process, whose threads are set."""
    if threads:
        torch.set_num_threads(threads)
    return load_ready(
        loading.path,
        mode=loading.mode,
        base=loading.base,
        device=device,
        precision=loading.precision,
        keep_quantized=loading.keep_quantized,
        verify=loading.verify,
    )
