"""What the page's live view costs of a server's CPU: a snapshot a second, under load.

    python benchmarks/live_view.py [--seconds 20] [--repetitions 3] [--running 16] [--waiting 200]
        [--quick] [--json FILE]

A server on a small random model, with so many answers running and waiting, all with predicted
lengths. Measured is the CPU time of the thread of its event loop, which has nothing else to do
here: the answers are submitted beside HTTP, and the engine has a thread of its own.
    off         --no_page
    0 viewers   snapshots are taken and kept, nobody looks
    1 viewer    one reads the stream
    10 viewers  ten do
Each repetition runs these one after another; the table shows medians of the share of a second, and
what they have more than `off`. Exit code 1 where one viewer costs LIMIT or more.
"""

import argparse
import http.client
import itertools
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_attack import make_model  # noqa: E402
from finetune.files import write_json  # noqa: E402

if TYPE_CHECKING:
    from predictor.prediction import LengthPrediction
    from serving.server.page.live import LiveView
    from serving.server.service import Service

SUBJECTS = {"off": None, "0 viewers": 0, "1 viewer": 1, "10 viewers": 10}
LIMIT = 0.02  # of a second
PROMPT, MOST_TOKENS = 100, 500


class Served(NamedTuple):
    """A server in a thread. loop_clock: of time.clock_gettime, of that thread's CPU time."""

    service: "Service"
    live: "LiveView | None"
    port: int
    loop_clock: int


class Load:
    """Keeps a service at so many answers, with predictions, until the block is left."""

    def __init__(self, service: "Service", count: int) -> None:
        self.service, self.count = service, count
        self.ids, self.draw = itertools.count(), random.Random(0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._feed)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _feed(self) -> None:
        while not self._ends.wait(0.02):
            while self.service.backend.count() < self.count:
                self.submit()

    def submit(self) -> None:
        from serving.engines import Sampling
        from serving.request import Request

        backend, tokens = self.service.backend, self.draw.randrange(50, MOST_TOKENS)
        prompt = [self.draw.randrange(10, 200) for _ in range(PROMPT)]
        predicted = prediction_near(tokens)
        request = Request(next(self.ids), PROMPT, backend.clock.now_s(), 60.0, predicted)
        sampling = Sampling(tokens, ignore_stops=True)
        answer = backend.submit(request, prompt, sampling)
        self.service.monitor.track(request, "", answer)
        backend.enqueue(request)


def prediction_near(tokens: int) -> "LengthPrediction":
    """A predicted length with 30 bins around so many tokens."""
    import numpy as np

    from predictor.prediction import from_bins, make_edges

    edges = make_edges(30, 2 * MOST_TOKENS)
    middles = (edges[:-1] + edges[1:]) / 2
    mass = np.exp(-np.square(np.log(middles / tokens)))
    return from_bins(mass / mass.sum(), edges)


@contextmanager
def serving(folder: Path, flags: argparse.Namespace, page: bool) -> Iterator[Served]:
    """A server in a thread of this process, with or without its page."""
    from serving.policies.continuous import POLICIES
    from serving.server.access import access_rules_of
    from serving.server.command import bind
    from serving.server.flags import parse_flags
    from serving.server.starting import load_service, make_server

    kv_tokens = flags.running * (PROMPT + MOST_TOKENS + 100)
    words = ["--model", folder, "--policy", "fcfs", "--device", "cpu", "--kv_tokens", kv_tokens]
    words += ["--max_batch", flags.running, "--max_queue", 2 * flags.waiting]
    words += ["--max_tokens", PROMPT + MOST_TOKENS, *([] if page else ["--no_page"])]
    args = parse_flags([str(word) for word in words])
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    service = load_service(args)
    service.backend.policy = POLICIES["deadline"]  # by predictions, which the requests bring
    server = make_server(service, access_rules_of(args, sock), args)
    thread = threading.Thread(target=server.serve_at, args=(sock,))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        yield Served(service, server.live, port, clock)
    finally:
        for _ in range(2):
            server.handle_exit(signal.SIGTERM, None)
        thread.join()


class Viewer(threading.Thread):
    """Reads the live stream until it ends. `seen`: its bytes."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.seen = port, 0
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/page/api/live")
        reply = connection.getresponse()
        while piece := reply.read1(65536):
            self.seen += len(piece)


def loop_share(folder: Path, flags: argparse.Namespace, viewers: int | None) -> dict[str, float]:
    """Of one run: "share", the CPU seconds of the event loop in a second; the load; "bytes"."""
    found: dict[str, float] = {}
    with serving(folder, flags, page=viewers is not None) as server:
        service = server.service
        with Load(service, flags.running + flags.waiting):
            watching = [Viewer(server.port) for _ in range(viewers or 0)]
            monitor = service.monitor
            until = time.monotonic() + 60
            while len(monitor.under_way()[0]) < flags.running and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(1)
            before, began = time.clock_gettime(server.loop_clock), time.monotonic()
            time.sleep(flags.seconds)
            used = time.clock_gettime(server.loop_clock) - before
            found["share"] = used / (time.monotonic() - began)
            found["running"], found["waiting"] = map(len, monitor.under_way())
            if server.live is not None:
                history = server.live.history
                found["bytes"] = len(history.body(history.end - 1))
        for viewer in watching:
            assert viewer.seen > 0, "a viewer got nothing"
    return found


def measure(flags: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    import torch

    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SUBJECTS}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for _ in range(flags.repetitions):
            for name, viewers in SUBJECTS.items():
                runs[name].append(loop_share(model, flags, viewers))
    return runs


def print_table(runs: dict[str, list[dict[str, float]]]) -> float:
    """Prints it; the share of one viewer that `off` has not."""
    print("             % of a second   more than off   running   waiting   bytes a snapshot")
    more = 0.0
    off = statistics.median(run["share"] for run in runs["off"])
    for name, of in runs.items():
        share = statistics.median(run["share"] for run in of)
        last = of[-1]
        if name == "1 viewer":
            more = share - off
        print(
            f"{name:12} {100 * share:13.2f} {100 * (share - off):15.2f} {last['running']:9} "
            f"{last['waiting']:9} {last.get('bytes', 0):18}"
        )
    return more


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--waiting", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="short runs, once")
    parser.add_argument("--json", help="write all figures there")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.seconds, flags.repetitions = 2.0, 1
    runs = measure(flags)
    more = print_table(runs)
    if flags.json:
        write_json(flags.json, {"runs": runs, "one_viewer": more, "limit": LIMIT})
    print(f"one viewer costs {100 * more:.2f} % of a second (limit {100 * LIMIT:g})")
    return 0 if more < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
