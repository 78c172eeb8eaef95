"""A worker of a pipeline: `python -m serving.engines.stage_process`, started by its driver.

It ends when its driver does, or when a neighbour in the pipeline does.
"""

import os
import queue
import signal
import socket
import sys
import threading
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engines.stage_links import HiddenLink, StageOrder

NEIGHBOUR_ENDED = 3  # exit status
WATCH_S = 1.0


class StageWorker:
    """The process's state.

    Args:
        control: questions of the driver, answered one by one.
        incoming, outgoing: passes from the stage before, and to the next one.
    """

    def __init__(self, control: Connection, incoming: "HiddenLink", outgoing: "HiddenLink"):
        self.control = control
        self.incoming, self.outgoing = incoming, outgoing
        self.orders: queue.SimpleQueue[StageOrder] = queue.SimpleQueue()
        self.stage: Any = None
        self.model: Any = None

    def watch(self) -> None:
        """Answer the driver; end the process when the driver has ended."""
        driver = os.getppid()
        while True:
            try:
                # A process that the driver has forked may hold its ends of the connections.
                if not self.control.poll(WATCH_S):
                    if os.getppid() != driver:
                        self.end()
                    continue
                question, arguments = self.control.recv()
                if question == "load":
                    self.orders.put(*arguments)
                    continue
                self.control.send(self.answer(question, arguments))
            except (EOFError, OSError):
                self.end()

    def end(self) -> None:
        """End the process at once, whatever its other thread does."""
        os._exit(NEIGHBOUR_ENDED)

    def answer(self, question: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """("done", what was asked for) or ("failed", the exception)."""
        from serving.engines.passes import report_of

        try:
            if question == "report":
                return "done", report_of(self.stage, self.model)
            if question == "load adapter":
                folder, number = arguments
                self.stage.adapters.load_numbered(Path(folder), number)
            elif question == "drop adapter":
                self.stage.adapters.drop_numbered(*arguments)
            else:
                raise ValueError(f"no such question: {question!r}")
        except Exception as error:
            return "failed", plain_error(error)
        return "done", None

    def load(self) -> None:
        """Wait for the order, load the stage, and tell the driver."""
        import torch

        from finetune.evaluation.inference import pick_device
        from serving.engines.adapters import AdapterSet
        from serving.engines.stage_loading import OpenedModel, make_stage

        order = self.orders.get()
        try:
            device = torch.device(pick_device(order.part.spec.device))
            opened = OpenedModel(order.loading, getattr(torch, order.dtype))
            model = opened.keep(order.part, device)
            del opened
            adapters = AdapterSet(model, device)
            self.model = model
            self.stage = make_stage(model, order.part, device, adapters, order.lanes)
        except Exception as error:
            traceback.print_exc()
            self.control.send(("failed", plain_error(error)))
            sys.exit(1)
        self.control.send(("done", None))

    def run(self) -> None:
        """Compute passes until a neighbour ends."""
        from serving.engines.stage_links import dtype_name

        while True:
            try:
                message, hidden = self.incoming.receive()
            except (EOFError, OSError):
                sys.exit(NEIGHBOUR_ENDED)
            hidden = compute_message(self.stage, message, hidden)
            message = replace(message, dtype=dtype_name(hidden), shape=tuple(hidden.shape))
            self.outgoing.send(message, hidden)


def compute_message(stage: Any, message: Any, hidden: Any) -> Any:
    """The hidden states, on the CPU, after a stage has computed a pass that was sent to it."""
    import time

    from serving.engines.stage_links import on_host

    for lane, operation, arguments in message.operations:
        stage.memories[lane].do(operation, *arguments)
    if hidden is not None:
        hidden = hidden.to(stage.device)
    begin = time.perf_counter()
    before = stage.seconds
    hidden = on_host(stage.compute(message.plan, hidden))
    stage.seconds = before + time.perf_counter() - begin  # with what a GPU had not computed yet
    return hidden


def plain_error(error: Exception) -> Exception:
    """An error of a built-in type with the text of another."""
    for kind in (FileNotFoundError, ValueError, MemoryError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def take_sockets() -> list[Connection]:
    """Control, incoming and outgoing; nothing else reads the standard input then."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _, links, _, _ = socket.recv_fds(control, 1, 2)
    return [Connection(control.detach()), *map(Connection, links)]


def main(argv: list[str] | None = None) -> None:
    """Argument: threads, 0 for torch's own. The standard input is the driver's socket."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a group; the front handles them
        signal.signal(number, signal.SIG_IGN)
    [threads] = map(int, sys.argv[1:] if argv is None else argv)
    control, incoming, outgoing = take_sockets()
    import torch

    from serving.engines.stage_links import HiddenLink

    if threads:
        torch.set_num_threads(threads)
    worker = StageWorker(control, HiddenLink(incoming), HiddenLink(outgoing))
    threading.Thread(target=worker.watch, daemon=True).start()
    worker.load()
    worker.run()


if __name__ == "__main__":
    main()
