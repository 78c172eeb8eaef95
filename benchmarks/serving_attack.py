"""One request never harms another: odd bodies against a real server, a probe and a watch beside.

    python benchmarks/serving_attack.py --bodies 4000 --seconds 600

starts serving.server on a tiny random model (or on --model) and sends it legal and illegal
requests: subnormal and huge numbers, wrong types, half-sent bodies, deep nesting, broken Unicode,
clients that disconnect. Meanwhile a probe sends a greedy request and /health is timed. Exit code 1
where a reply was 5xx, a probe's answer differed from its answer alone, /health took longer than
--health_s, memory stayed reserved, or the server did not end well on SIGTERM.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import table_text  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from chatglm.commands import run_command  # noqa: E402
from finetune.files import write_json  # noqa: E402
from serving.server.fields import FIELDS, REFUSED, Number  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROBES = ("水泵漏油", "list river lamp", "你好", "a b c")
PROBE_TOKENS = 24
TIMEOUT_S = 60.0
NUMBERS = (
    0,
    -0.0,
    1,
    -1,
    0.5,
    2,
    5e-324,
    1e-320,
    1e-45,
    1e-40,
    1e-7,
    1e38,
    1e308,
    2**31,
    2**63,
    -(2**63),
    10**400,
)
TOKENS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "1E-400",
    "-0",
    "00",
    "0x10",
    "9" * 5000,
)  # as they stand in the body
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "0.5",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [1, "a"],
    3,
    -3.5,
    ["user"],
    {"type": "text"},
)
TEXTS = (
    "",
    " ",
    "\n" * 50,
    "x",
    "水泵漏油",
    "\x00\x01\x7f",
    "\ud800",
    "a\udfffb",
    "😀é\u202e\ufeff",
    "<|user|>\n<|system|>",
    "[gMASK]<sop>",
    "[[训练时间]]",
    "\u0301" * 300,
    "a" * 3000,
    "长" * 3000,
    "ab " * 8000,
    "z" * 200_000,
    "<n><|blank_80|><|tab|>",
    "\U0010ffff",
)


ODD_TYPES = ("text/plain", "", "application/x-www-form-urlencoded", "x" * 5000)
ODD_HOSTS = ("evil.example", "", "[::", "localhost:99999999", "127.0.0.1.evil.example")
ODD_PATHS = (
    "/",
    "/v1/models/%00%ff%ed%a0%80",
    "/../etc/passwd",
    "/v1/models/" + "x" * 9000,
)


def legal_number(field: Number, draw: random.Random) -> float:
    """Within the field's range, its ends and what is barely above its least included."""
    tiny = 5e-324 if field.kind is float else 1
    edges = [field.most, field.least + tiny, field.least if not field.above else field.least + tiny]
    value = draw.choice([*edges, draw.uniform(field.least, min(field.most, field.least + 10))])
    return int(value) if field.kind is int else float(value)


def legal(draw: random.Random) -> dict:
    body = {
        "messages": [
            {
                "role": "user",
                "content": draw.choice(["水泵", "list river", "x", "你好吗", "a b c d e"]),
            }
        ]
    }
    for name in draw.sample(list(FIELDS), draw.randint(0, 6)):
        if isinstance(FIELDS[name], Number):
            body[name] = legal_number(FIELDS[name], draw)
    body |= {"do_sample": draw.random() < 0.7} if draw.random() < 0.3 else {}
    body |= {"stop": draw.choice(["a", ["漏", "b" * 256], "\n"])} if draw.random() < 0.2 else {}
    body |= {"stop_token_ids": [draw.randrange(300), 2**31 - 1]} if draw.random() < 0.2 else {}
    body |= (
        {"stream": True, "stream_options": {"include_usage": True}} if draw.random() < 0.4 else {}
    )
    if draw.random() < 0.9:
        body |= {"max_tokens": draw.randint(1, 30)}
        body.pop("max_completion_tokens", None)
    return body


def numbers(draw: random.Random) -> bytes:
    body = legal(draw)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(list(FIELDS))
        body[name] = draw.choice(NUMBERS)
    if draw.random() < 0.3:
        body[draw.choice(list(FIELDS))] = "@"
        return json.dumps(body).replace('"@"', draw.choice(TOKENS)).encode()
    return json.dumps(body).encode()


def types(draw: random.Random) -> bytes:
    names = [*FIELDS, *REFUSED, "unknown", "\ud800", "user"]
    body = legal(draw)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(names)
        body[name] = draw.choice(VALUES)
    return json.dumps(body).encode()


def texts(draw: random.Random) -> bytes:
    one = draw.choice(TEXTS)
    content = draw.choice(
        [one, one + draw.choice(TEXTS), [{"type": "text", "text": one}] * draw.randint(0, 3)]
    )
    body = legal(draw) | {
        "messages": [
            {"role": draw.choice(["user", "user", "system", "developer"]), "content": content}
        ]
    }
    if draw.random() < 0.3:
        several = draw.choices(TEXTS, k=draw.randint(0, 6))
        body["stop"] = draw.choice([draw.choice(TEXTS), several])
    if draw.random() < 0.1:
        body["model"] = draw.choice(TEXTS)
    return json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def shapes(draw: random.Random) -> bytes:
    deep = draw.choice([10, 900, 100_000])
    messages = draw.choice(
        [
            draw.choice(VALUES),
            [draw.choice(VALUES)],
            [{"role": draw.choice(VALUES), "content": draw.choice(VALUES)}],
            [{"role": "user", "content": "x"}] * draw.choice([2, 3000]),
            [{"role": "assistant"}, {"role": "user", "content": "x"}],
            [
                {
                    "role": "user",
                    "content": [{"type": draw.choice(VALUES), "text": draw.choice(VALUES)}],
                }
            ],
        ]
    )
    if draw.random() < 0.3:
        return b'{"messages":' + b"[" * deep + b"]" * draw.choice([deep, 0]) + b"}"
    return json.dumps(legal(draw) | {"messages": messages}).encode()


def garbage(draw: random.Random) -> bytes:
    whole = json.dumps(legal(draw)).encode()
    return draw.choice(
        [
            b"",
            whole[: draw.randrange(len(whole))],
            b"\xef\xbb\xbf" + whole,
            whole.decode().encode("utf-16"),
            draw.randbytes(200),
            whole * 2,
            b" " * (3 * 2**20),
            b"{" + b'"a":1,' * 100_000 + b'"b":2}',
            b"null",
            b'"x"',
            b"[" + b"{}," * 200_000 + b"1]",
            b"\x00" * 50,
        ]
    )


BODIES = {"numbers": numbers, "types": types, "texts": texts, "shapes": shapes, "garbage": garbage}


def post(
    port: int,
    body: bytes,
    headers: dict | None = None,
    method: str = "POST",
    path: str = "/v1/chat/completions",
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(
            method, path, body, {"Content-Type": "application/json"} | (headers or {})
        )
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def leave(port: int, draw: random.Random) -> tuple[int, bytes]:
    """Go away while a body is half sent, while an answer is waited for, or within a stream."""
    body = json.dumps(legal(draw) | {"stream": draw.random() < 0.5, "max_tokens": 200}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body if draw.random() < 0.7 else body[: draw.randrange(len(body))])
        time.sleep(draw.choice([0, 0.01, 0.1]))
    finally:
        connection.close()
    return 0, b""


def ahead(port: int) -> tuple[int, bytes]:
    """Requests without end, and no reply read."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
        for _ in range(40):
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
    return 0, b""


def oddities(port: int, draw: random.Random) -> tuple[int, bytes]:
    """Requests that are odd outside their bodies."""
    body = json.dumps(legal(draw)).encode()
    kind = draw.choice(["type", "host", "method", "path", "headers", "ahead", "chunked"])
    if kind == "method":
        return post(port, b"", method=draw.choice(["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]))
    if kind == "path":
        return post(port, b"", method="GET", path=draw.choice(ODD_PATHS))
    if kind == "ahead":
        return ahead(port)
    if kind == "chunked" and draw.random() >= 0.1:
        return post(port, b"", method="TRACE")
    headers = {
        "type": {"Content-Type": draw.choice(ODD_TYPES)},
        "host": {"Host": draw.choice(ODD_HOSTS)},
        "headers": {
            "Origin": "http://evil.example",
            "Authorization": "Bearer \xff",
            "Accept": "x" * 9000,
        },
        "chunked": {"Transfer-Encoding": "chunked"},
    }
    return post(port, body, headers[kind])


class Attack:
    """Senders, a probe and a watch over /health, against the server at a port.

    Its figures grow while it runs.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.seed = port, seed
        self.sent: Counter = (
            Counter()
        )  # (kind, status); status 0: no reply was waited for, or the connection was closed
        self.faults: list[str] = []
        self.probes, self.slowest_s = 0, 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()

    def probe(self, text: str) -> tuple[str, int]:
        body = {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": PROBE_TOKENS,
        }
        status, reply = post(self.port, json.dumps(body).encode())
        found = json.loads(reply)
        if status != 200:
            raise ValueError(f"a probe got {status} {found}")
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]

    def run(self, bodies: int, seconds: float, threads: int) -> None:
        alone = {text: self.probe(text) for text in PROBES}
        until = time.monotonic() + seconds
        watchers = [
            threading.Thread(target=self._watch),
            threading.Thread(target=self._compare, args=(alone,)),
        ]
        senders = []
        for i in range(threads):
            share = bodies // threads + (i < bodies % threads)
            senders.append(threading.Thread(target=self._send, args=(share, until, self.seed + i)))
        for thread in watchers + senders:
            thread.start()
        for thread in senders:
            thread.join()
        self._stop.set()
        for thread in watchers:
            thread.join()

    def _send(self, bodies: int, until: float, seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(bodies):
            if time.monotonic() > until:
                return
            kind = draw.choice(["legal", *BODIES, "leaves", "oddities"])
            body = b""
            try:
                if kind == "leaves":
                    status, reply = leave(self.port, draw)
                elif kind == "oddities":
                    status, reply = oddities(self.port, draw)
                else:
                    body = (
                        json.dumps(legal(draw)).encode() if kind == "legal" else BODIES[kind](draw)
                    )
                    status, reply = post(self.port, body)
            except (http.client.HTTPException, ConnectionError, BrokenPipeError):
                status, reply = 0, b""
            except OSError as error:
                status, reply = 599, repr(error).encode()
            with self._lock:
                self.sent[kind, status] += 1
                if status >= 500 or b'"server_error"' in reply:
                    self.faults.append(f"{kind} got {status} {reply[-300:]!r} for {body[:500]!r}")

    def _compare(self, alone: dict) -> None:
        while not self._stop.is_set():
            for text, wanted in alone.items():
                try:
                    found = self.probe(text)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    found = error
                self.probes += 1
                if found != wanted:
                    self.faults.append(f"the probe {text!r} got {found!r}, alone {wanted!r}")

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            begin = time.monotonic()
            try:
                status, _ = post(self.port, b"", method="GET", path="/health")
            except (OSError, http.client.HTTPException) as error:
                status = error
            if status != 200:
                self.faults.append(f"/health said {status!r}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - begin)

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing runs, waits or holds memory; what still does is noted."""
        names = ("glm_running_requests", "glm_waiting_requests", "glm_kv_reserved_tokens")
        until = time.monotonic() + seconds
        while True:
            lines = post(self.port, b"", method="GET", path="/metrics")[1].decode().splitlines()
            left = [line for line in lines if line.startswith(names) and not line.endswith(" 0.0")]
            if not left or time.monotonic() > until:
                self.faults += [f"after everything: {line}" for line in left]
                return
            time.sleep(0.1)


def make_model(folder: Path, **sizes: int) -> Path:
    """A random ChatGLM2 with a tokenizer of 400 pieces; of 2 layers of 64 without `sizes`."""
    from scripts.prepare_small_model import make_model as make
    from scripts.prepare_tokenizer import main as make_tokenizer

    words = [
        "水泵漏油了",
        "list river lamp garden",
        "name a b c",
        "你好吗今天",
        "explain essay 1 2 3",
    ]
    rows: list[dict] = []
    for i, a in enumerate(words * 12):
        rows += [{"prompt": f"{a} {i}", "response": f"{b} {a}"} for b in words[:2]]
    write_rows(folder / "rows.json", rows)
    flags = ["--input", folder / "rows.json", "--output_dir", folder / "tokenizer"]
    if make_tokenizer([*map(str, flags), "--vocab_size", "400", "--family", "glm2"]):
        raise ValueError("no tokenizer could be made")
    sizes = {"hidden_size": 64, "num_layers": 2, "heads": 4, "ffn": 128} | sizes
    return make("glm2", folder / "tokenizer", folder / "model", **sizes)


@dataclass(frozen=True)
class AttackFlags:
    """The command's flags; see main."""

    bodies: int
    seconds: float
    threads: int
    seed: int
    health_s: float
    model: str | None
    predictor: str | None
    policy: str
    engine: str
    device: str
    json: Path | None


def start_server(
    flags: AttackFlags, model: str | Path, errors: TextIO
) -> tuple[subprocess.Popen, int]:
    """(the server's process, its port)."""
    words = [
        "--model",
        model,
        "--policy",
        flags.policy,
        "--engine",
        flags.engine,
        "--port",
        0,
        "--device",
        flags.device,
        "--client_s",
        5,
    ]
    words += ["--max_batch", 8, "--kv_tokens", 4096, "--max_tokens", 512, "--drain_s", 10]
    words += ["--predictor", flags.predictor] if flags.predictor else []
    return launch(words, errors)


def launch(words: list, errors: TextIO) -> tuple[subprocess.Popen, int]:
    """(process, port) of serving.server with these flags, once it serves.

    Raises:
        ValueError: it ended first; its last words.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.server", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    line = process.stdout.readline()
    if " at http" not in line:
        raise ValueError(f"the server did not start: {Path(errors.name).read_text()[-300:]}")
    return process, int(line.rsplit(":", 1)[1].split("/")[0])


def table(sent: Counter) -> str:
    statuses = sorted({status for _, status in sent})
    heads = ["sent", "bodies"]
    for status in statuses:
        heads.append(str(status) if status else "no reply")
    lines = []
    for kind in ("legal", *BODIES, "leaves", "oddities"):
        counts = [sent[kind, status] for status in statuses]
        cells = [kind, str(sum(counts))]
        for count in counts:
            cells.append(str(count) if count else "")
        lines.append(cells)
    return table_text(heads, lines)


def attack(flags: AttackFlags) -> int:
    """Attack a server, print and write the figures; 1 where a fault was found, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        model = flags.model or make_model(Path(folder))
        with open(Path(folder) / "errors.txt", "w") as errors:
            process, port = start_server(flags, model, errors)
        try:
            found, begin = Attack(port, flags.seed), time.monotonic()
            found.run(flags.bodies, flags.seconds, flags.threads)
            took = time.monotonic() - begin
            found.wait_until_idle()
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        errors_text = (Path(folder) / "errors.txt").read_text()
    if code:
        found.faults.append(f"the server ended with {code}")
    if "Traceback" in errors_text:
        found.faults.append(f"the server wrote a traceback: ...{errors_text[-1500:]}")
    if found.slowest_s > flags.health_s:
        found.faults.append(f"/health took {found.slowest_s:.2f} s")
    print_figures(found, took)
    if flags.json:
        write_json(flags.json, figures_of(found, took))
    return 1 if found.faults else 0


def figures_of(found: Attack, seconds: float) -> dict:
    """What --json writes."""
    sent = []
    for (kind, status), count in sorted(found.sent.items()):
        sent.append({"kind": kind, "status": status, "count": count})
    return {
        "requests": found.sent.total(),
        "seconds": seconds,
        "probes": found.probes,
        "slowest_health_s": found.slowest_s,
        "sent": sent,
        "faults": found.faults,
    }


def print_figures(found: Attack, seconds: float) -> None:
    print(table(found.sent))
    print(
        f"{found.sent.total()} requests in {seconds:.0f} s; {found.probes} probe answers compared"
    )
    print(f"slowest /health {found.slowest_s * 1000:.0f} ms")
    print(f"faults: {len(found.faults)}")
    for line in found.faults[:10]:
        print(f"  {line}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", type=int, default=4000, help="requests to send [4000]")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="stop sending after so many seconds [600]"
    )
    parser.add_argument("--threads", type=int, default=4, help="senders at once [4]")
    parser.add_argument("--seed", type=int, default=0, help="of the requests [0]")
    parser.add_argument(
        "--health_s", type=float, default=0.5, help="seconds that /health may take [0.5]"
    )
    parser.add_argument("--model", help="folder of a model (default: a tiny random one)")
    parser.add_argument("--predictor", help="folder of a length predictor")
    parser.add_argument("--policy", default="fcfs", help="as of serving.server [fcfs]")
    parser.add_argument("--engine", default="continuous", help="as of serving.server [continuous]")
    parser.add_argument("--device", default="cpu", help="as of serving.server [cpu]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    flags = AttackFlags(**vars(parser.parse_args(argv)))
    return run_command("serving_attack", lambda: attack(flags))


if __name__ == "__main__":
    sys.exit(main())
