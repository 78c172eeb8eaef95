"""How soon the page is there: first paint, and the first view ready, in a real headless Chromium.

    python benchmarks/page_paint.py            a server of a tiny random model, on loopback
    python benchmarks/page_paint.py --address http://HOST:PORT

Each load has a new browser profile, so nothing is cached. Needs playwright and a Chromium
(BROWSER=PATH names one).
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_attack import launch, make_model  # noqa: E402
from chatglm.commands import run_command  # noqa: E402
from finetune.files import write_json  # noqa: E402

FLAGS = [
    "--no-sandbox",  # this may run as root, in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWS = {"chat": "#content textarea", "live": "#content h1"}  # what must be there when it is ready
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
NOW = "performance.now()"
SENT = "performance.getEntriesByType('resource').reduce((sum, e) => sum + e.encodedBodySize, 0)"


def find_browser() -> str | None:
    """A program of the Chromium family; None where there is none."""
    names = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
    found = filter(None, map(shutil.which, names))
    return os.environ.get("BROWSER") or next(found, None)


@contextmanager
def served(address: str | None) -> Iterator[str]:
    """The page's address: the given one, or a server of a tiny model while this lasts."""
    if address is not None:
        yield address.rstrip("/")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        with open(Path(folder) / "errors.txt", "w") as errors:
            words = ["--model", model, "--policy", "fcfs", "--port", 0, "--device", "cpu"]
            process, port = launch(words, errors)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def load_once(browser: Any, address: str, view: str) -> dict[str, float]:
    """Milliseconds of one load: to the first paint, and until the view is ready; bytes sent."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}/#/{view}")
    page.locator(VIEWS[view]).first.wait_for(state="attached")
    ready_ms = page.evaluate(NOW)
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
    figures = {"paint_ms": page.evaluate(PAINT), "ready_ms": ready_ms}
    figures["kilobytes"] = page.evaluate(SENT) / 1000
    context.close()
    return figures


def measure(address: str | None, loads: int) -> dict[str, dict[str, float]]:
    """{view: medians, and the slowest paint} over so many loads of each."""
    from playwright.sync_api import sync_playwright

    program = find_browser()
    if program is None:
        raise ValueError("there is no Chromium (apt install chromium, or BROWSER=PATH)")
    figures: dict[str, dict[str, float]] = {}
    with served(address) as at, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for view in VIEWS:
            found: dict[str, list[float]] = {}
            for _ in range(loads):
                for name, value in load_once(browser, at, view).items():
                    found.setdefault(name, []).append(value)
            of = figures[view] = {}
            for name, values in found.items():
                of[name] = statistics.median(values)
            of["slowest_paint_ms"] = max(found["paint_ms"])
        browser.close()
    return figures


def paint(address: str | None, loads: int, json_path: Path | None) -> int:
    figures = measure(address, loads)
    print(f"{'view':<6} {'first paint':>12} {'slowest':>9} {'ready':>9} {'bytes':>9}")
    for view, of in figures.items():
        times = f"{of['paint_ms']:>9.0f} ms {of['slowest_paint_ms']:>6.0f} ms"
        print(f"{view:<6} {times} {of['ready_ms']:>6.0f} ms {of['kilobytes']:>6.0f} kB")
    if json_path is not None:
        write_json(json_path, {"loads": loads, "views": figures})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a running server's page (default: one is started)")
    parser.add_argument("--loads", type=int, default=10, help="of each view [10]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    return run_command("page_paint.py", lambda: paint(args.address, args.loads, args.json))


if __name__ == "__main__":
    sys.exit(main())
