"""The gateway's live view in a browser: what it shows is what the gateway does."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is of the extra serve")

from tests.page.chat_pages import SHORT, ask, opened_chat, requests_of, texts
from tests.page.test_live_page import STILL, figure, wait_for
from tests.serving.gateway.engines import (
    PATH,
    RecordingEngine,
    WordPredictor,
    gateway_before,
    stream_of,
    wait_until,
)


@pytest.mark.slow
def test_the_live_view_is_the_gateway_s(open_page):
    """Three streams, two of which the engine has."""
    engine = RecordingEngine(pages={"/v1/models": {"data": [{"id": "m"}]}})
    engine.streams(stream_of(400, tokens=400), pause_s=0.1)
    words = ["--concurrency", 2, "--policy", "sjf"]
    before = gateway_before(engine, predictor=WordPredictor(), words=words)
    with before as gateway, ThreadPoolExecutor(3) as pool:
        done = threading.Event()

        def read(number: int) -> None:
            message = {"role": "user", "content": f"say {500 + number}"}
            body = {"model": "m", "stream": True, "messages": [message]}
            with gateway.client.stream("POST", PATH, json=body) as reply:
                for _ in reply.iter_raw():
                    if done.is_set():
                        return

        readers = [pool.submit(read, number) for number in range(3)]
        wait_until(lambda: len(gateway.gateway.view.under_way) == 3)
        page = open_page("/#/live", at=gateway.process.address, **STILL)
        page.locator(".live-page[data-time]").wait_for()
        wait_for(lambda: figure(page, "running") == "2" and figure(page, "waiting") == "1")
        assert page.locator(".policy h1").inner_text() == "sjf"
        lanes = page.locator(".lane[data-made]")
        assert lanes.count() == 2
        wait_for(lambda: int(lanes.first.get_attribute("data-made")) > 5)
        assert float(lanes.first.get_attribute("data-q90")) == pytest.approx(900, abs=2)
        assert engine.base in page.locator(".replica").inner_text()
        done.set()
        for reader in readers:
            reader.result()
        wait_for(lambda: figure(page, "running") == "0")
    engine.close()


@pytest.mark.slow
def test_a_chat_goes_through_the_gateway(open_page, address):
    """Two questions to a server of ours: answered and reported as on its own page."""
    with gateway_before(address, kind="glm-foundry") as gateway:
        page = opened_chat(open_page, gateway.process.address)
        sent = requests_of(page)
        answer = ask(page, "hello world")
        assert answer.locator(".rendered").inner_text()
        assert answer.locator(".report strong").first.inner_text() == str(SHORT["max_tokens"])
        assert answer.locator(".ending").inner_text() == "Cut at the longest length"
        ask(page, "and more")
        assert texts(page, ".bubble") == ["hello world", "and more"]
        assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
        [upstream] = gateway.status()["upstreams"]
        assert upstream["base"] == address and upstream["requests"] == 0
