"""Clients of a gateway, and an upstream that is killed while it answers them."""

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from tests.serving.gateway.engines import PATH, RunningGateway, wait_until


@dataclass
class Outcome:
    """What a client saw of one request.

    Attributes:
        text: of its answer, whole or not. status: 0 where the connection broke.
    """

    number: int
    is_stream: bool
    status: int
    text: str
    is_whole: bool


def body_of(number: int, is_stream: bool, tokens: int) -> dict:
    messages = [{"role": "user", "content": f"explain {'river lamp ' * (number % 5)}{number}"}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": tokens}
    return body | ({"stream": True} if is_stream else {})


def ask(address: str, number: int, is_stream: bool, tokens: int, begun=None) -> Outcome:
    body = body_of(number, is_stream, tokens)
    url = f"{address}{PATH}"
    if not is_stream:
        reply = httpx.post(url, json=body, timeout=120)
        text = reply.json()["choices"][0]["message"]["content"] if reply.is_success else reply.text
        return Outcome(number, False, reply.status_code, text, reply.is_success)
    text, status, is_whole = "", 0, False
    try:
        with httpx.stream("POST", url, json=body, timeout=120) as reply:
            status = reply.status_code
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith("data: "):
                    for choice in json.loads(line[6:])["choices"]:  # none where the usage is
                        text += choice["delta"].get("content") or ""
                    if begun is not None and text:
                        begun.set()
    except httpx.RemoteProtocolError:
        pass
    return Outcome(number, True, status, text, is_whole)


def same_names(answer: bytes) -> bytes:
    """An answer without what is another's at each request: its id and its second."""
    return re.sub(rb'"(id|created)": ?("[^"]*"|\d+)', b'"\\1"', answer)


def order_of_answers(
    gateway: RunningGateway, lengths: Sequence[int], tokens: int, pause_s: float = 0.0
) -> list[int]:
    """The predicted lengths of requests in the order in which their answers ended.

    The upstream takes one at a time, and all others have come before the first is answered;
    `pause_s` is for them to reach the upstream.
    """
    ended: list[tuple[float, int]] = []

    def ask_one(length: int) -> None:
        reply = gateway.ask(f"say {length}", max_tokens=tokens, temperature=0, ignore_eos=True)
        assert reply.status_code == 200, reply.text
        ended.append((time.monotonic(), length))

    with ThreadPoolExecutor(len(lengths)) as pool:
        futures = []
        for number, length in enumerate(lengths):
            futures.append(pool.submit(ask_one, length))
            wait_until(lambda n=number: gateway.gateway.open > n)
            time.sleep(pause_s)
        assert gateway.gateway.open == len(lengths)
        for future in futures:
            future.result()
    return [length for _, length in sorted(ended)]


def kill_under_load(
    bases: Sequence[str], address: str, kill: Callable[[], None], tokens: int, count: int = 24
) -> None:
    """Ask a gateway `count` times at once, and kill its last upstream once a stream has begun.

    Whatever had not begun is answered by another one, whole and once: greedy answers are compared
    with those that the upstreams give directly.
    """
    wanted: dict[int, set[str]] = {}
    for number in range(count):
        texts = [ask(base, number, number % 2 == 0, tokens).text for base in bases]
        wanted[number] = set(texts)
    with ThreadPoolExecutor(count) as pool:
        begun = threading.Event()
        futures = []
        for number in range(count):
            futures.append(pool.submit(ask, address, number, number % 2 == 0, tokens, begun))
        assert begun.wait(60)
        kill()
        outcomes = [future.result() for future in futures]
    status = httpx.get(f"{address}/gateway/status").json()
    assert [upstream["up"] for upstream in status["upstreams"]] == [True] * (len(bases) - 1) + [
        False
    ]
    for outcome in outcomes:
        if outcome.is_whole:
            assert outcome.status == 200 and outcome.text in wanted[outcome.number]
        else:  # it had begun, and nothing of it came twice
            assert outcome.is_stream and outcome.status == 200  # its role alone may have come
            assert any(text.startswith(outcome.text) for text in wanted[outcome.number])
    assert sum(outcome.is_whole for outcome in outcomes) >= count // 2
    assert ask(address, 3, False, tokens).text in wanted[3]  # it serves on without
