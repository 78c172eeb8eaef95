"""Reads a server's live stream in a thread, as a page does."""

import json
import threading
import time

import httpx


class LiveReader(threading.Thread):
    """A viewer.

    Attributes:
        history: the first event's snapshots; None before it.
        snapshots: those that came after it.
        ended: the stream has.
    """

    def __init__(self, root, seconds=600, headers=None):
        super().__init__(daemon=True)
        self.url = f"{root}/page/api/live?seconds={seconds}"
        self.headers = headers or {}
        self.history = self.type = None
        self.snapshots, self.texts = [], []
        self.ended = False
        self._done = False
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._done = True
        self.join(5)

    def run(self):
        with httpx.stream("GET", self.url, headers=self.headers, timeout=30) as reply:
            self.type = reply.headers["content-type"]
            kind = None
            for line in reply.iter_lines():
                if self._done:
                    return
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.take(kind, line.removeprefix("data: "))
        self.ended = True

    def take(self, kind, text):
        self.texts.append(text)
        value = json.loads(text, parse_constant=refuse)
        if kind == "history":
            self.history = value
        else:
            assert kind == "snapshot"
            self.snapshots.append(value)

    def wait_for(self, condition, seconds=30):
        """The first snapshot of which it holds."""
        until = time.monotonic() + seconds
        place = 0
        while time.monotonic() < until:
            while place < len(self.snapshots):
                if condition(self.snapshots[place]):
                    return self.snapshots[place]
                place += 1
            time.sleep(0.02)
        raise AssertionError(f"waited in vain; the last: {self.snapshots[-1:]}")


def refuse(name):
    raise AssertionError(f"{name} is no JSON")
