"""The live view in a browser: what it shows is what the server does, now and at a chosen moment."""

import json
import re
import socket
import sys
import time

import pytest

from tests.page.conftest import running_server
from tests.page.live_load import ask, busy, metric
from tests.serving.server.test_replicas_served import CPU
from tests.serving.server.test_server_faults import running
from tests.warm import warm_python

STILL = {"reduced_motion": "reduce"}  # bars stand where they belong at once
LANE = """lane => {
    const left = lane.querySelector('.track').getBoundingClientRect().left;
    const width = lane.querySelector('.track').getBoundingClientRect().width;
    const box = name => lane.querySelector(name)?.getBoundingClientRect();
    return {
        made: Number(lane.dataset.made),
        q10: Number(lane.dataset.q10), q90: Number(lane.dataset.q90),
        end: (box('.made').right - left) / width,
        from: (box('.band').left - left) / width, to: (box('.band').right - left) / width,
        over: Boolean(box('.over')), label: lane.querySelector('.over-label')?.textContent,
    };
}"""


def figure(page, name: str) -> str:
    return page.locator(f"[data-figure={name}] b").inner_text()


def wait_for(condition, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def open_live(open_page, **options):
    page = open_page("/#/live", **options)
    page.locator(".live-page[data-time]").wait_for()
    return page


def shown_time(page) -> float:
    return float(page.locator(".live-page").get_attribute("data-time"))


@pytest.fixture
def saved(open_page, address, tmp_path):
    """(a page, the file that it saved after a busy second, its snapshots)."""
    with busy(address, 6):
        page = open_live(open_page, accept_downloads=True)
        wait_for(lambda: figure(page, "running") == "4")
        page.wait_for_timeout(1100)
    wait_for(lambda: figure(page, "running") == "0")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    file = tmp_path / "minutes.jsonl"
    download.value.save_as(file)
    return page, file, list(map(json.loads, file.read_text().splitlines()))


@pytest.mark.slow
def test_counts_and_lanes_are_the_servers(open_page, address):
    page = open_live(open_page, **STILL)
    with busy(address, 10):
        counts = ("running", "waiting")

        def agree():
            now = [metric(address, f"glm_{name}_requests") for name in counts]
            return now == [4, 6] and [figure(page, name) for name in counts] == ["4", "6"]

        wait_for(agree)
        page.locator(".lane.overran").first.wait_for()  # its 900 tokens exceed any prediction
        lanes = page.locator(".lane:not(.free):not(.ended)").evaluate_all(f"all => all.map({LANE})")
        axis = float(page.locator("[data-axis]").get_attribute("data-axis"))
        chips = page.locator(".chip").count()
    assert len(lanes) == 4 and chips == 6
    for lane in lanes:
        assert 0 <= lane["q10"] < lane["q90"] <= axis and 0 <= lane["made"] <= axis
        assert lane["end"] == pytest.approx(lane["made"] / axis, abs=0.01)
        assert lane["from"] == pytest.approx(lane["q10"] / axis, abs=0.01)
        assert lane["to"] == pytest.approx(lane["q90"] / axis, abs=0.01)
        assert lane["over"] == (lane["made"] > lane["q90"])
        if lane["over"]:
            assert lane["label"] == f"+{round(lane['made'] - lane['q90'])}"
    page.get_by_text("Nothing waits.").wait_for()


@pytest.mark.slow
def test_missed_deadlines_are_marked(open_page, address):
    page = open_live(open_page)
    late_before = metric(address, 'glm_slo_total{in_time="false"}')
    with busy(address, 6, slo_s=0.01):
        page.locator(".lane.late .ring", has_text="!").first.wait_for()
        page.locator(".chip.late").first.wait_for()
    ask(address, max_tokens=8, slo_s=0.001)
    page.locator("[data-event=late]").first.wait_for()
    ended = page.locator("[data-figure=in-time] .figure-note")
    wait_for(lambda: ended.inner_text().startswith(f"{late_before + 1:.0f} of "))


@pytest.mark.slow
def test_replay_shows_the_moment_and_live_returns(saved):
    page, _, snapshots = saved
    busiest = max(snapshots, key=lambda snapshot: snapshot["waiting"] + snapshot["running"])
    slider = page.get_by_role("slider", name="Moment shown")
    page.get_by_role("button", name="Pause").click()
    first = float(page.locator(".live-page").get_attribute("data-first"))
    slider.fill(str(round(busiest["t"] - first) + 0.0))
    wait_for(lambda: abs(shown_time(page) - busiest["t"]) < 1.2)
    [there] = [snapshot for snapshot in snapshots if snapshot["t"] == shown_time(page)]
    assert figure(page, "running") == str(there["running"])
    assert page.locator(".lane:not(.free):not(.ended)").count() == len(there["rows"])
    page.get_by_text("connected, showing the past").wait_for()
    held = shown_time(page)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    wait_for(lambda: shown_time(page) < held)
    before = shown_time(page)
    page.get_by_role("button", name="16×").click()
    page.get_by_role("button", name="Play").click()
    wait_for(lambda: shown_time(page) > before + 2)
    page.get_by_role("button", name="Live", exact=True).click()
    page.get_by_text("connected", exact=True).wait_for()
    wait_for(lambda: shown_time(page) > snapshots[-1]["t"])


@pytest.mark.slow
def test_a_saved_file_is_shown_elsewhere(saved, tmp_path):
    page, file, snapshots = saved
    chooser = page.get_by_label("Open a file of snapshots").and_(page.locator("input"))
    chooser.set_input_files(file)
    page.get_by_text(f"Showing the file minutes.jsonl: {len(snapshots)} snapshots").wait_for()
    assert shown_time(page) == snapshots[0]["t"]
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(file.read_text() + '{"policy": "no time"}\n')
    chooser.set_input_files(wrong)
    line = f"wrong.jsonl: line {len(snapshots) + 1} is not a snapshot"
    page.get_by_text(line).wait_for()
    hostile = tmp_path / "hostile.jsonl"
    row = {"id": "<img src=x onerror=alert(1)>", "made": "<b>", "adapter": {"a": 1}, "replica": [1]}
    text = "<img src=x onerror=alert(1)>"
    replica = row | {"stages": [{"layers": "all"}], "devices": {"a": [1]}, "state": text}
    lines = {"t": 5, "policy": text, "rows": [row, 7], "queue": [{"waited_s": text}, None]}
    lines |= {"replicas": [replica], "attainment": text, "kv": text, "totals": [text]}
    hostile.write_text(json.dumps(lines))
    chooser.set_input_files(hostile)
    page.get_by_role("heading", name=text, exact=True).wait_for()
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.slow
def test_a_cut_stream_is_said_and_taken_up_again(open_page, folders, tmp_path):  # noqa: F811
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    flags = ("--port", port)
    with running_server(folders, tmp_path / "first.jsonl", *flags) as address:
        page = open_live(open_page, at=address)
        ask(address, max_tokens=5)
        wait_for(lambda: figure(page, "rate") != "0")
        page.wait_for_timeout(1100)
    page.get_by_text("The connection to the server is cut.").wait_for()
    page.get_by_text(re.compile("Trying again in")).wait_for()
    with running_server(folders, tmp_path / "second.jsonl", *flags):
        page.get_by_text("connected", exact=True).wait_for(timeout=20_000)
        page.get_by_text("The server was started anew").wait_for()
    page.watched.problems[:] = [p for p in page.watched.problems if "ERR_" not in p]


@pytest.mark.slow
def test_leaving_the_view_ends_its_stream(open_page, address):
    name = 'glm_http_requests_total{route="/page/api/live",status="499"}'  # the client left
    page = open_live(open_page)
    before = metric(address, name)
    page.get_by_role("link", name="Chat", exact=True).click()
    wait_for(lambda: metric(address, name) == before + 1, 5)
    page.get_by_role("link", name="Live").click()
    page.locator(".live-page[data-time]").wait_for()


@pytest.mark.slow
def test_once_a_second_and_not_where_it_is_hidden(open_page, address):
    page = open_live(open_page)
    page.evaluate("""() => {
        window.renders = 0;
        const seen = new MutationObserver(() => { window.renders += 1; });
        seen.observe(document.querySelector('.live-page'), { attributeFilter: ['data-time'] });
    }""")
    page.wait_for_timeout(3000)
    assert 2 <= page.evaluate("window.renders") <= 4
    page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    page.wait_for_timeout(300)  # for one that was under way
    page.evaluate("window.renders = 0")
    page.wait_for_timeout(2200)
    assert page.evaluate("window.renders") == 0
    hidden_at = shown_time(page)
    page.evaluate("""() => {
        delete document.hidden;
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    wait_for(lambda: shown_time(page) > hidden_at + 1.5, 2)


@pytest.mark.slow
def test_two_languages_at_a_phones_width(open_page, address):
    page = open_live(open_page, locale="zh-CN", viewport={"width": 360, "height": 740})
    with busy(address, 6):
        page.locator(".chip").first.wait_for()
        assert page.locator("[data-figure=waiting] .figure-label").inner_text() == "排队中"
        width = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(width) <= 0
        page.get_by_role("button", name="以表格显示").click()
        page.locator("[data-table=running]").wait_for()
        assert page.evaluate(width) <= 0
        assert page.locator("[data-table=running] tbody tr").count() == 4
    page.get_by_role("button", name="Switch to English").click()
    page.get_by_role("button", name="Show as tables").wait_for()
    left = page.locator(".live-page").inner_text()
    assert not re.search("[\u4e00-\u9fff]", left)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible(open_page, address, check_accessible, theme):
    page = open_live(open_page, color_scheme=theme, **STILL)
    with busy(address, 6, slo_s=0.5):
        page.locator(".lane.late").first.wait_for()
        page.locator(".chip").first.wait_for()
        page.locator(".plot canvas").first.wait_for()
        check_accessible(page)
        page.get_by_role("button", name="Show as tables").click()
        page.locator("[data-table=running]").wait_for()
        check_accessible(page)


@pytest.mark.slow
def test_an_idle_server_explains_itself(open_page, folders, tmp_path, check_accessible):  # noqa: F811
    with running_server(folders, tmp_path / "idle.jsonl") as address:
        page = open_live(open_page, at=address)
        page.get_by_role("heading", name="Ready, and nothing to do yet").wait_for()
        assert f"--model {address}/v1" in page.locator(".empty code").inner_text()
        check_accessible(page)
        ask(address, max_tokens=3)
        page.locator(".stage").wait_for()


@pytest.mark.slow
def test_a_click_on_a_chart_goes_to_its_moment(open_page, address):
    page = open_live(open_page)
    page.wait_for_timeout(1500)
    plot = page.locator("[data-chart=rate] .u-over")
    box = plot.bounding_box()
    plot.click(position={"x": box["width"] - 2, "y": 20})
    page.get_by_text("connected, showing the past").wait_for()


SILENT = """() => {
    const real = window.fetch;
    window.fetch = async (path, options) => {
        const found = await real(path, options);
        if (!String(path).includes('api/live')) return found;
        window.fetch = real;
        const reader = found.body.getReader();
        const first = (await reader.read()).value;
        await reader.cancel();
        const body = new ReadableStream({ start: to => {
            to.enqueue(first);
            options.signal.onabort = () => to.error(options.signal.reason);
        } });
        return new Response(body, { headers: found.headers });
    };
}"""


@pytest.mark.slow  # the page gives a silent server some seconds
def test_a_silent_stream_is_left_and_its_gap_filled(open_page, address):
    page = open_page("/")
    page.get_by_role("link", name="Live", exact=True).wait_for()
    page.evaluate(SILENT)  # as a network that has gone: the stream neither ends nor goes on
    page.get_by_role("link", name="Live", exact=True).click()
    page.locator(".live-page[data-time]").wait_for()
    silent_at = shown_time(page)
    page.get_by_text("The connection to the server is cut.").wait_for()
    assert shown_time(page) == silent_at
    page.get_by_text("connected", exact=True).wait_for()
    wait_for(lambda: shown_time(page) > silent_at + 5)
    assert page.locator("[data-event=gap]").count() == 0


@pytest.fixture
def two_devices(tmp_path):
    """A file of two devices, which need not be measured."""
    file = tmp_path / "two.json"
    file.write_text(json.dumps({"devices": [CPU, CPU]}))
    return file


@pytest.mark.slow  # two replicas start, and one again
def test_a_lost_replica_is_shown(open_page, folders, two_devices, monkeypatch):  # noqa: F811
    model, predictor = folders
    monkeypatch.setattr(sys, "executable", warm_python())
    words = ["--deployer", "helr", "--cluster", two_devices, "--device", "0"]
    words += ["--predictor", predictor]
    with running(model, *words, endless=False) as server:
        page = open_live(open_page, at=server.root)
        assert page.locator(".replica[data-state=ready]").count() == 2
        with busy(server.root, 6):
            wait_for(lambda: figure(page, "running") == "4")
            assert page.locator(".group .lane:not(.free):not(.ended)").count() == 4
            server.service.backend.replicas[1].process.kill()
            page.locator("[data-event=lost], [data-event=bounced]").first.wait_for()
            page.locator("[data-event=requeued]").first.wait_for()
            page.locator("[data-event=ready], [data-event=bounced]").first.wait_for(timeout=60_000)
            wait_for(lambda: page.locator(".replica[data-state=ready]").count() == 2)
            assert "restarts: 1" in page.locator(".replica[data-replica='1']").inner_text()
        assert metric(server.root, "glm_replica_restarts") == 1


def test_a_view_that_did_not_come_is_asked_for_again(open_page):
    page = open_page()
    page.wait_for_selector("#content textarea")
    page.route("**/page/live/stage.js", lambda route: route.abort())
    page.click("nav a[href='#/live']")
    page.wait_for_selector("[role='alert']")
    page.watched.problems.clear()  # the browser's own line about it
    page.unroute("**/page/live/stage.js")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".live-page")
