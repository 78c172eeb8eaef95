"""The live view's stream: a snapshot a second, for as many viewers as there are.

A task of the server's event loop takes and encodes each snapshot once, whoever looks on, and keeps
those of the last ten minutes. Free of torch.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from serving.server.access import ApiError

log = logging.getLogger(__name__)

LIVE_PATH = "/page/api/live"
PERIOD_S = 1.0
KEPT_S = 600
KEPT_BYTES = 16 * 2**20
PIECE_BYTES = 64 * 1024  # of the history, written at once
LIVE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes each event on at once
}
MOST_BEHIND = 5  # a viewer that misses more of them goes on with the newest


class EncodedSnapshot(NamedTuple):
    """A snapshot's JSON. taken_s: of time.monotonic."""

    taken_s: float
    body: bytes


class SnapshotHistory:
    """The encoded snapshots of the last KEPT_S seconds, by number.

    At most KEPT_S of them and KEPT_BYTES. One of 8 running and 12 waiting requests is 3 KB, the
    largest (48 of the queue, 64 rows, 64 ended) about 35 KB.

    Attributes:
        first: number of the oldest. end: the number that the next one gets.
    """

    def __init__(self, most: int = KEPT_S, most_bytes: int = KEPT_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.first = self.end = self.kept_bytes = 0
        self._kept: deque[EncodedSnapshot] = deque()

    def add(self, snapshot: EncodedSnapshot) -> None:
        self._kept.append(snapshot)
        self.end += 1
        self.kept_bytes += len(snapshot.body)
        while len(self._kept) > self.most or self.kept_bytes > self.most_bytes:
            self.kept_bytes -= len(self._kept.popleft().body)
            self.first += 1

    def body(self, number: int) -> bytes:
        """Of a number from `first` to below `end`."""
        return self._kept[number - self.first].body

    def since(self, taken_s: float) -> int:
        """The number of the first that was taken later; `end` where none was."""
        for place, snapshot in enumerate(self._kept):
            if snapshot.taken_s > taken_s:
                return self.first + place
        return self.end


class LiveView:
    """Takes snapshots and streams them. For one event loop.

    A viewer that is slow misses snapshots: it holds up nobody, and holds no snapshot but the one
    that is being written to it.

    Args:
        take: makes a snapshot, as JSON values.
        closing: ends the streams.
    """

    def __init__(
        self,
        take: Callable[[], dict[str, Any]],
        closing: asyncio.Event,
        period_s: float = PERIOD_S,
    ) -> None:
        self.take, self.closing, self.period_s = take, closing, period_s
        self.history = SnapshotHistory()
        self.viewers = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._has_failed = False

    def start(self) -> None:
        """Begin to take snapshots, in the running event loop; nothing happens where it has."""
        if self._task is None:
            self._task = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        """Take a snapshot each period, until `closing`."""
        while not self.closing.is_set():
            began_s = time.monotonic()
            self._take_one(began_s)
            self._wake_viewers()
            rest_s = max(began_s + self.period_s - time.monotonic(), 0.0)
            try:
                await asyncio.wait_for(self.closing.wait(), rest_s)
            except asyncio.TimeoutError:
                continue
        self._wake_viewers()

    def _take_one(self, taken_s: float) -> None:
        try:
            text = json.dumps(self.take(), separators=(",", ":"), allow_nan=False)
        except Exception:  # figures must not end the server; one traceback is enough
            if not self._has_failed:
                log.exception("no snapshot for the live view")
            self._has_failed = True
            return
        self.history.add(EncodedSnapshot(taken_s, text.encode()))

    def _wake_viewers(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def events(self, seconds: int) -> AsyncIterator[bytes]:
        """Server-sent events: `history` with the last seconds' snapshots, then each new one."""
        self.start()
        self.viewers += 1
        try:
            history = self.history
            number, end = history.since(time.monotonic() - seconds), history.end
            async for piece in self._history(number, end):
                yield piece
            number = max(end, history.first)
            while not self.closing.is_set():
                news = self._news
                if history.end - number > MOST_BEHIND:
                    number = history.end - 1
                number = max(number, history.first)
                while number < history.end and not self.closing.is_set():
                    yield b"event: snapshot\ndata: " + history.body(number) + b"\n\n"
                    number = max(number + 1, history.first)
                await news.wait()
        finally:
            self.viewers -= 1

    async def _history(self, number: int, end: int) -> AsyncIterator[bytes]:
        """The event of the snapshots from `number` to below `end`.

        Those that are dropped while it is written, because the viewer is slow, are left out.
        """
        piece = bytearray(b"event: history\ndata: [")
        separator = b""
        while number < end:
            piece += separator + self.history.body(number)
            separator = b","
            if len(piece) > PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
                if self.closing.is_set():
                    return
            number = max(number + 1, self.history.first)
        yield bytes(piece + b"]\n\n")


def read_seconds(text: str | None) -> int:
    """How much history a viewer wants; all there is without a number. Raises ApiError."""
    if text is None:
        return KEPT_S
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"seconds must be a whole number of at least 0, got {text[:32]!r}")
    return min(int(text), KEPT_S)
