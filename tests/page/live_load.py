"""Keeps a server busy while a test looks on, and reads its metrics."""

import re
import threading
from contextlib import contextmanager

import httpx


def metric(address: str, name: str) -> float:
    """Of /metrics; the sum where the name has several labels; 0 before the first."""
    text = httpx.get(f"{address}/metrics").text
    pattern = rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$"
    return sum(map(float, re.findall(pattern, text, re.MULTILINE)))


def ask(address: str, **fields) -> dict:
    """A whole answer of a few tokens."""
    body = {"messages": [{"role": "user", "content": "list river lamp"}], "temperature": 0}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body | fields, timeout=60)
    return reply.raise_for_status().json()


class EndlessClient(threading.Thread):
    """Reads one long answer after another until `done` is set, and then leaves."""

    def __init__(self, address: str, done: threading.Event, fields: dict) -> None:
        super().__init__(daemon=True)
        self.url, self.done = f"{address}/v1/chat/completions", done
        self.body = {"messages": [{"role": "user", "content": "essay river lamp train"}]}
        self.body |= {"temperature": 0, "stream": True, "max_tokens": 900} | fields
        self.start()

    def run(self) -> None:
        while not self.done.is_set():
            with httpx.stream("POST", self.url, json=self.body, timeout=60) as reply:
                for _ in reply.iter_lines():
                    if self.done.is_set():
                        return


@contextmanager
def busy(address: str, clients: int, **fields):
    """So many clients that always want an answer."""
    done = threading.Event()
    threads = [EndlessClient(address, done, fields) for _ in range(clients)]
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
