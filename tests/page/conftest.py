"""The page in a real Chromium, of a real server of a small random model with a predictor."""

import signal
from contextlib import contextmanager

import pytest

from benchmarks.page_paint import FLAGS, find_browser
from tests.serving.server.conftest import folders, start  # noqa: F401  # the fixture


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a profile.

    It goes with its file: as long as it is there, playwright keeps an event loop running in this
    thread, and no other test of the process could run one.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chromium (apt install chromium, or BROWSER=PATH)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def running_server(served, log, *flags):
    """The address of the page of a server with these flags, without a slash at its end."""
    process, address = start(served, log, *flags)
    try:
        yield address.removesuffix("/v1")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def address(folders, tmp_path_factory):  # noqa: F811
    """The page's address, of a server that all tests share."""
    log = tmp_path_factory.mktemp("page") / "served.jsonl"
    with running_server(folders, log) as found:
        yield found


class Watched:
    """What a page must not do: errors on the console, blocked content, requests to elsewhere."""

    def __init__(self, page, address: str) -> None:
        self.problems: list[str] = []
        self.address = address
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("request", self._request)

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _request(self, request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"asked elsewhere: {request.url}")


@pytest.fixture
def open_page(browser, address):
    """open_page(path="/", address=..., **context): a page; nothing may be wrong when it ends.

    A test that expects a problem takes it out of `page.watched.problems`.
    """
    contexts = []
    pages = []

    def opened(path="/", at=None, **options):
        context = browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.watched = Watched(page, at or address)
        pages.append(page)
        page.goto((at or address) + path)
        return page

    yield opened
    found = [page.watched.problems for page in pages]
    for context in contexts:
        context.close()
    assert not any(found), found


@pytest.fixture
def check_accessible():
    """Raises AssertionError with what axe-core finds on a page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")

    def check(page) -> None:
        # axe is a script of the test's own, which the page's content policy does not know
        results = axe.Axe().run(page)
        assert not results.violations_count, results.generate_report()

    return check
