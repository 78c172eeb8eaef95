"""The scheduler under real time: a clock, and arrivals that come from other threads."""

import threading
import time
from collections import deque

from serving.engines.answers import TextEngine
from serving.request import Request

IDLE_S = 1.0  # the scheduler looks at an open inbox again within this time


class WallClock:
    """Seconds since the clock was made.

    advance() does nothing: a step of a real engine takes real time.

    Attributes:
        zero_s: when it was made, of time.perf_counter.
        changed: the condition that wait_until sleeps on; an Inbox of the same clock notifies it.
    """

    def __init__(self):
        self.zero_s = time.perf_counter()
        self.changed = threading.Condition()
        self.notified = False

    def now_s(self) -> float:
        return time.perf_counter() - self.zero_s

    def advance(self, seconds: float):
        pass

    def wait_until(self, time_s: float):
        """Sleep until then, or until notify() is called."""
        with self.changed:
            self.changed.wait_for(lambda: self.notified, max(time_s - self.now_s(), 0.0))
            self.notified = False

    def notify(self):
        with self.changed:
            self.notified = True
            self.changed.notify_all()


class Inbox:
    """Arrivals of a live system, as the scheduler takes them.

    put() may be called from any thread, after the engine's submit() of the same request; it wakes
    the clock and the engine. A request is due at once: its prediction was made before.
    """

    def __init__(self, clock: WallClock, engine: TextEngine | None = None):
        self._clock, self._engine = clock, engine
        self._waiting: deque[Request] = deque()
        self._withdrawn: deque[int] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed and not self._waiting

    def put(self, request: Request):
        """Raises RuntimeError when it is closed."""
        if self._closed:
            raise RuntimeError(f"request {request.id} comes too late: the inbox is closed")
        self._waiting.append(request)
        self._wake()

    def close(self):
        """No more arrivals: the scheduler ends when all are served."""
        self._closed = True
        self._wake()

    def next_s(self) -> float:
        if self._waiting:
            return 0.0
        return float("inf") if self._closed else self._clock.now_s() + IDLE_S

    def due(self, now_s: float) -> list[Request]:
        requests = []
        while self._waiting:
            requests.append(self._waiting.popleft())
        return requests

    def withdraw(self, request_id: int):
        """Cancel a request: if it is queued, the scheduler drops it.

        From any thread, after put().
        """
        self._withdrawn.append(request_id)
        self._wake()

    def withdrawn(self) -> list[int]:
        """Ids withdrawn since the last call."""
        return [self._withdrawn.popleft() for _ in range(len(self._withdrawn))]

    def _wake(self):
        """Wake the scheduler."""
        self._clock.notify()
        if self._engine is not None:
            self._engine.wake()
