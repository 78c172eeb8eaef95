"""The live stream: what a viewer gets, how many share it, how it ends."""

import asyncio
import itertools
import json
import logging
import signal
import socket
import time

import httpx
import pytest

from serving.server.page import live
from serving.server.page.live import EncodedSnapshot, LiveView, SnapshotHistory
from tests.serving.server.page.live_reader import LiveReader, refuse
from tests.serving.server.test_server_faults import ask, running, slow_steps, wait_for

HEADER = b"event: history\ndata: ["


@pytest.fixture(scope="module")
def server(tiny_folders):
    with running(tiny_folders["glm2"], "--client_s", "2", "--drain_s", "60") as found:
        yield found


@pytest.mark.slow
def test_history_then_a_snapshot_a_second(server):
    with LiveReader(server.root) as first:
        first.wait_for(lambda snapshot: True)
        wait_for(lambda: len(first.snapshots) >= 3)
    times = [snapshot["t"] for snapshot in first.history + first.snapshots]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap == pytest.approx(1, abs=0.5) for gap in gaps)
    assert first.type == "text/event-stream; charset=utf-8"
    with LiveReader(server.root) as second:
        second.wait_for(lambda snapshot: True)
    seen = [snapshot["t"] for snapshot in second.history]
    assert seen == sorted(seen) and set(times) <= set(seen)
    assert second.snapshots[0]["t"] > seen[-1]
    with LiveReader(server.root, seconds=2) as short:
        short.wait_for(lambda snapshot: True)
    assert 1 <= len(short.history) <= 3
    with LiveReader(server.root, seconds=0) as none:
        none.wait_for(lambda snapshot: True)
    assert none.history == []
    wait_for(lambda: server.server.live.viewers == 0)


@pytest.mark.parametrize("text", ["-1", "1.5", "", "x", "1e3", "٣", "9" * 30, "nan"])
def test_seconds_must_be_a_number(server, text):
    reply = httpx.get(f"{server.root}/page/api/live", params={"seconds": text})
    assert reply.status_code == 400
    assert "seconds must be a whole number" in reply.json()["error"]["message"]


def test_headers_of_the_stream(server):
    with httpx.stream("GET", f"{server.root}/page/api/live") as reply:
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-accel-buffering"] == "no"
        assert next(reply.iter_bytes()).startswith(HEADER)
    assert httpx.head(f"{server.root}/page/api/live").status_code == 404  # it would never end
    wait_for(lambda: server.server.live.viewers == 0)


def test_it_is_counted_once_under_its_route(server):
    with httpx.stream("GET", f"{server.root}/page/api/live?seconds=5") as reply:
        next(reply.iter_bytes())
    wait_for(lambda: server.server.live.viewers == 0)
    text = httpx.get(f"{server.root}/metrics").text
    assert 'route="/page/api/live",status="499"' in text and "seconds=5" not in text


def deaf_viewer(server):
    """A connection that asks for the stream and reads none of it."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", server.port))
    deaf.sendall(b"GET /page/api/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return deaf


@pytest.fixture
def long_snapshots(server, monkeypatch):
    """20 snapshots a second of 100 KB, so that nothing's buffers hold them all."""
    view = server.server.live
    monkeypatch.setattr(view, "take", lambda: {"t": time.time(), "text": "x" * 100_000})
    monkeypatch.setattr(view, "period_s", 0.05)
    wait_for(lambda: view.history.kept_bytes > 2_000_000)
    return view


def test_a_viewer_that_does_not_read(server, long_snapshots):
    deaf = [deaf_viewer(server) for _ in range(3)]
    wait_for(lambda: long_snapshots.viewers == 3)
    with LiveReader(server.root, seconds=0) as other:
        wait_for(lambda: len(other.snapshots) >= 20)
    assert ask(server).status_code == 200
    buffered = []
    for connection in list(server.server.server_state.connections):
        buffered.append(connection.transport.get_write_buffer_size())
    assert max(buffered) < 500_000  # of the 2 MB and more that it has asked for
    wait_for(lambda: long_snapshots.viewers == 0)  # --client_s 2
    for connection in deaf:
        connection.close()


def test_streams_end_when_the_server_does(tiny_folders):
    with running(tiny_folders["glm2"], "--drain_s", "60") as found:
        view = found.server.live
        view.take = lambda: {"t": time.time(), "text": "x" * 100_000}
        view.period_s = 0.02
        wait_for(lambda: view.history.kept_bytes > 2_000_000)
        deaf = deaf_viewer(found)
        with LiveReader(found.root, seconds=1) as viewer:
            viewer.wait_for(lambda snapshot: True)
            wait_for(lambda: view.viewers == 2)
            began = time.monotonic()
            found.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: viewer.ended)
            found.thread.join(20)
        assert not found.thread.is_alive() and time.monotonic() - began < 20 and found.code == 0
        deaf.close()


def test_streams_end_before_the_drain_does(tiny_folders):
    """Answers go on after the viewers have left."""
    words = ["--drain_s", "60"]
    with running(tiny_folders["glm2"], *words, prepare=slow_steps(0.003)) as found:
        with (
            httpx.stream(
                "POST",
                f"{found.root}/v1/chat/completions",
                json={
                    "messages": [{"role": "user", "content": "x"}],
                    "max_tokens": 900,
                    "stream": True,
                },
                timeout=60,
            ) as reply,
            LiveReader(found.root) as viewer,
        ):
            lines = reply.iter_lines()
            next(lines)
            viewer.wait_for(lambda snapshot: snapshot["running"] == 1)
            found.server.handle_exit(signal.SIGTERM, None)
            wait_for(lambda: viewer.ended)
            assert found.service.backend.count() == 1
            rest = list(lines)
        found.thread.join(30)
    assert rest[-2] == "data: [DONE]" and found.code == 0


# ---- without a server


def snapshot_of(number, taken_s=None, size=10):
    taken_s = float(number) if taken_s is None else taken_s
    return EncodedSnapshot(taken_s, str(number).zfill(size).encode())


def test_history_is_bounded():
    history = SnapshotHistory(most=5, most_bytes=1000)
    for number in range(8):
        history.add(snapshot_of(number))
    assert (history.first, history.end, history.kept_bytes) == (3, 8, 50)
    assert history.body(3) == b"0000000003" and history.body(7) == b"0000000007"
    assert history.since(4.5) == 5 and history.since(-1.0) == 3 and history.since(7.0) == 8
    history.add(snapshot_of(8, size=980))
    assert (history.first, history.end, history.kept_bytes) == (6, 9, 1000)
    history.add(snapshot_of(9, size=2000))  # larger than all that may be kept
    assert (history.first, history.end, history.kept_bytes) == (10, 10, 0)


def decoded(pieces):
    """[(event, value)] of a stream's bytes."""
    found = []
    for text in b"".join(pieces).decode().split("\n\n")[:-1]:
        kind, data = text.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data[6:], parse_constant=refuse)))
    return found


def make_view(period_s=0.01, take=None):
    counted = itertools.count()
    return LiveView(take or (lambda: {"number": next(counted)}), asyncio.Event(), period_s=period_s)


def test_a_late_viewer_gets_the_history():
    async def look():
        view = make_view()
        view.start()
        while view.history.end < 5:
            await asyncio.sleep(0.01)
        pieces = []
        async for piece in view.events(600):
            pieces.append(piece)
            if len(pieces) == 4:
                view.closing.set()
        return decoded(pieces)

    (kind, history), *later = asyncio.run(look())
    assert kind == "history" and len(history) >= 5
    numbers = [value["number"] for value in history] + [value["number"] for _, value in later]
    assert numbers == list(range(len(numbers))) and len(later) == 3


def test_a_slow_viewer_misses_snapshots_and_keeps_none():
    async def look():
        view = make_view()
        view.history = SnapshotHistory(most=8)
        stream = view.events(0)
        numbers = [decoded([await anext(stream)])]
        for pause in (0, 0.0, 0.4, 0):
            await asyncio.sleep(pause)
            [(_, value)] = decoded([await anext(stream)])
            numbers.append(value["number"])
        await stream.aclose()
        view.closing.set()
        return numbers, view

    (history, *numbers), view = asyncio.run(look())
    assert history == [("history", [])]
    assert numbers == sorted(set(numbers)) and numbers[2] - numbers[1] > live.MOST_BEHIND
    assert view.viewers == 0


def test_a_history_that_is_dropped_while_it_is_read(monkeypatch):
    monkeypatch.setattr(live, "PIECE_BYTES", 1)

    async def look():
        view = make_view(period_s=10)
        view.history = SnapshotHistory(most=4)
        for number in range(4):
            view.history.add(EncodedSnapshot(time.monotonic(), str(number).encode()))
        stream = view.events(600)
        pieces = [await anext(stream)]
        for number in range(4, 10):
            view.history.add(EncodedSnapshot(time.monotonic(), str(number).encode()))
        async for piece in stream:
            pieces.append(piece)
            if piece.endswith(b"]\n\n"):
                break
        await stream.aclose()
        view.closing.set()
        return decoded(pieces)

    [(kind, values)] = asyncio.run(look())
    assert kind == "history" and values[0] == 0 and values == sorted(values)


def test_many_viewers_share_one_encoding():
    taken = itertools.count()
    look_s = 0.5

    async def view_all():
        view = make_view(0.05, lambda: {"number": next(taken)})
        viewers = [asyncio.create_task(read(view)) for _ in range(50)]
        await asyncio.sleep(look_s)
        assert view.viewers == 50
        view.closing.set()
        return await asyncio.gather(*viewers)

    async def read(view):
        return [piece async for piece in view.events(600)]

    all_pieces = asyncio.run(view_all())
    assert next(taken) <= look_s / 0.05 + 2
    assert all(decoded(pieces)[-1] == decoded(all_pieces[0])[-1] for pieces in all_pieces)


def test_a_snapshot_that_fails_ends_nothing(caplog):
    calls = itertools.count()

    def take():
        number = next(calls)
        if number == 1:
            raise RuntimeError("a bug")
        return {"number": number, "nan": float("nan") if number in (2, 3) else None}

    async def look():
        view = make_view(take=take)
        stream = view.events(0)
        await anext(stream)
        found = [await anext(stream) for _ in range(3)]
        view.closing.set()
        await stream.aclose()
        return decoded(found)

    with caplog.at_level(logging.ERROR):
        found = asyncio.run(look())
    assert [value["number"] for _, value in found] == [0, 4, 5]  # a NaN is no JSON
    assert caplog.text.count("no snapshot for the live view") == 1
