"""What the processes of a pipeline say to each other, and how tensors get there.

A message is a pickled object and a tensor's bytes, over socket pairs that only the driver and the
workers that it has started hold. A tensor of a GPU goes by way of the CPU.
"""

import queue
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from serving.engines.pass_plans import PassPlan
from serving.engines.stage_loading import StagePart
from serving.engines.stage_types import ModelLoading


@dataclass(frozen=True)
class StageOrder:
    """What a worker is to load.

    Attributes:
        dtype: of its weights, as torch names it. lanes: micro-batches.
    """

    loading: ModelLoading
    part: StagePart
    dtype: str
    lanes: int


@dataclass(frozen=True)
class PassMessage:
    """A pass on its way through the stages.

    Attributes:
        operations: (lane, operation, arguments) of the KV memories before the pass.
        dtype, shape: of the hidden states that follow; None where none do.
    """

    plan: PassPlan
    operations: list[tuple[int, str, tuple[Any, ...]]]
    dtype: str | None = None
    shape: tuple[int, ...] = ()


class HiddenLink:
    """One end of a connection that carries passes and their hidden states.

    `send` returns at once: a thread sends, so a stage goes on computing while the next one is busy,
    and a ring of full buffers cannot lock.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._outbox: queue.SimpleQueue[tuple[PassMessage, Tensor | None] | None]
        self._outbox = queue.SimpleQueue()
        self._sender: threading.Thread | None = None

    def send(self, message: PassMessage, hidden: Tensor | None) -> None:
        """Send a pass, and hidden states on the CPU."""
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_all, daemon=True)
            self._sender.start()
        self._outbox.put((message, hidden))

    def _send_all(self) -> None:
        while (entry := self._outbox.get()) is not None:
            message, hidden = entry
            try:
                self._connection.send(message)
                if hidden is not None:
                    self._connection.send_bytes(host_bytes(hidden))
            except OSError:
                return  # the next stage has ended: whoever waits for the answer sees it

    def receive(self) -> tuple[PassMessage, Tensor | None]:
        """The next pass, and its hidden states on the CPU. Raises EOFError, OSError."""
        message: PassMessage = self._connection.recv()
        if message.dtype is None:
            return message, None
        hidden = torch.empty(message.shape, dtype=getattr(torch, message.dtype))
        self._connection.recv_bytes_into(host_bytes(hidden))
        return message, hidden

    def close(self) -> None:
        self._outbox.put(None)
        self._connection.close()


def host_bytes(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, of any dtype; not a copy."""
    array: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def on_host(x: Tensor) -> Tensor:
    """A contiguous tensor on the CPU."""
    return x.detach().to("cpu").contiguous()


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
