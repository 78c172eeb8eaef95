"""Running a server: health, request ids, the access log, keys and their files, metrics.

One server in a process of its own, asked over HTTP; what a client cannot bring about is set in a
server of this process.
"""

import hmac
import json
import math
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from predictor.prediction import LengthPrediction
from serving.server import figures, keys
from serving.server.command import main
from serving.server.figures import refusal_reason
from serving.server.flags import parse_flags
from serving.server.keys import KeyRing, NamedKey, append_key, key_digest, read_keys
from tests.finetune.runs import ROOT
from tests.serving.server.conftest import start
from tests.serving.server.test_server_faults import running

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LONG_STREAM = {
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 900,
    "temperature": 0,
    "stream": True,
}
END_AT_ONCE = {"logit_bias": {"2": 100}}  # token 2 ends an answer
FIELDS = ["time", "request_id", "client", "method", "path", "status", "seconds", "bytes", "key"]


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("operation")
    file, log = folder / "keys.txt", folder / "log.jsonl"
    file.write_text(f"# the keys of this test\nalice {key_digest(b'alices-key')}  # first\n\n")
    words = ["--access_log", "--api_key", "flags-key", "--api_keys", file, "--max_queue", "1"]
    process, url = start(folders, log, *words, "--cors_origins", "http://one.example")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    client = httpx.Client(base_url=url.removesuffix("/v1"), timeout=60)
    client.headers["Authorization"] = "Bearer alices-key"
    yield SimpleNamespace(
        client=client, lines=lines, file=file, log=log, port=client.base_url.port, process=process
    )
    client.close()
    process.terminate()
    assert process.wait(60) == 0
    reader.join(10)
    odd = [line for line in lines if not line.startswith("{")]
    assert all(line.startswith("serving.server.keys: ERROR: ") for line in odd)


def ask(server, headers=None, **fields) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "list river lamp"}], "max_tokens": 4}
    return server.client.post(CHAT, json=body | {"temperature": 0} | fields, headers=headers)


def eventually(what, seconds=20):
    """What `what()` gives once that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def access_line(server, request_id: str) -> dict:
    """The access log's line of a request."""

    def find():
        for text in list(server.lines):
            if text.startswith("{") and json.loads(text)["request_id"] == request_id:
                return json.loads(text)
        return None

    return eventually(find)


def value(server, name, **labels) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


@contextmanager
def busy(server, answers: int):
    """So many long answers under way, as streams of one client."""
    streams = []
    try:
        for _ in range(answers):
            request = server.client.build_request("POST", CHAT, json=LONG_STREAM)
            streams.append(server.client.send(request, stream=True))
        yield streams
    finally:
        for stream in streams:
            stream.close()
        eventually(lambda: not value(server, "glm_running_requests"))


# ---- health


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_open_to_all(server, path):
    for method in ("GET", "HEAD"):
        reply = httpx.request(method, f"http://127.0.0.1:{server.port}{path}")
        assert reply.status_code == 200 and reply.headers["x-request-id"]
        assert reply.text == ("" if method == "HEAD" else '{"status":"ok"}')
    document = server.client.get("/openapi.json").json()
    assert document["paths"][path]["get"]["security"] == []


def test_a_busy_server_is_ready_and_says_429_with_when_to_retry(server):
    with busy(server, 5):
        assert server.client.get("/health/ready").status_code == 200
        reply = ask(server)
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
        assert reply.headers["x-request-id"]
        names = ("glm_running_requests", "glm_waiting_requests")
        eventually(lambda: [value(server, name) for name in names] == [4, 1])
        used = eventually(lambda: value(server, "glm_kv_used_tokens"))
        assert used <= value(server, "glm_kv_reserved_tokens")
    assert value(server, "glm_refused_requests_total", reason="queue_full") >= 1


def test_who_drains_or_has_failed_lives_but_is_not_ready(tiny_folders):
    with running(tiny_folders["glm2"]) as found:
        for name, said in (("draining", True), ("failure", "the engine has failed: lost")):
            setattr(found.service if name == "draining" else found.service.backend, name, said)
            statuses = []
            for path in ("/health", "/health/live", "/health/ready"):
                statuses.append(httpx.get(found.root + path).status_code)
            assert statuses == [503, 200, 503]
            status = httpx.get(f"{found.root}/health/ready").json()["status"]
            assert status == ("draining" if said is True else said)
            body = {"messages": [{"role": "user", "content": "x"}]}
            reply = httpx.post(found.root + CHAT, json=body)
            assert reply.status_code == 503 and reply.headers["x-request-id"]
        found.service.draining, found.service.backend.failure = False, None

        async def broken(asked):
            raise KeyError("a bug")

        found.service.ask = broken
        reply = httpx.post(found.root + CHAT, json=body, headers={"X-Request-Id": "mine"})
        assert reply.status_code == 500 and reply.headers["x-request-id"] == "mine"
        assert reply.json()["error"]["message"] == "internal error: KeyError"
        text = httpx.get(f"{found.root}/metrics").text
        assert f'glm_http_requests_total{{route="{CHAT}",status="500"}} 1.0' in text
        assert 'glm_refused_requests_total{reason="unavailable"} 2.0' in text


# ---- request ids


def test_a_fit_id_of_the_client_is_kept(server):
    for fit in ("a", "~" * 128, 'q"{}\\<!'):
        reply = server.client.get("/health", headers={"X-Request-Id": fit})
        assert reply.headers["x-request-id"] == fit
    seen = set()
    for unfit in (b"", b"~" * 129, b"two words", b"\xc3\xa9", b"tab\there"):
        reply = server.client.get("/health", headers={b"X-Request-Id": unfit})
        seen.add(reply.headers["x-request-id"])
    assert len(seen) == 5 and all(re.fullmatch("[0-9a-f]{32}", one) for one in seen)


def test_every_error_has_the_id(server):
    post, get = server.client.post, server.client.get
    asked = {
        400: lambda h: ask(server, headers=h, temperature=9),
        401: lambda h: get("/metrics", headers=h | {"Authorization": "Bearer x"}),
        403: lambda h: get("/health", headers=h | {"Host": "evil.example"}),
        404: lambda h: get("/nothing", headers=h),
        405: lambda h: get(CHAT, headers=h),
        413: lambda h: post(CHAT, content=b" " * 2**22, headers=h | JSON),
        415: lambda h: post(CHAT, content=b"{}", headers=h),
    }
    for status, send in asked.items():
        reply = send({"X-Request-Id": f"error-{status}"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, f"error-{status}")
        assert reply.json()["error"]["message"]
        assert access_line(server, f"error-{status}")["status"] == status
        reason = refusal_reason(status, None)
        assert value(server, "glm_refused_requests_total", reason=reason) >= 1
    before = value(server, "glm_refused_requests_total", reason="too_long")
    assert ask(server, messages=[{"role": "user", "content": "x" * 5000}]).status_code == 400
    assert value(server, "glm_refused_requests_total", reason="too_long") == before + 1


def test_what_is_no_http_gets_an_error_with_an_id(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as odd:
        odd.sendall(b"no http at all\r\n\r\n")
        head, _, body = odd.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"x-request-id: " in head.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_pages_may_read_the_id(server):
    reply = server.client.get("/health", headers={"Origin": "http://one.example"})
    exposed = reply.headers["access-control-expose-headers"]
    assert reply.headers["access-control-allow-origin"] == "http://one.example"
    assert {"X-Request-Id", "Retry-After"} <= set(exposed.split(", "))


# ---- the logs


def test_a_request_in_both_logs(server):
    reply = ask(server, headers={"X-Request-Id": "in-both"})
    line = access_line(server, "in-both")
    assert list(line) == FIELDS and line["status"] == 200
    assert (line["client"], line["method"], line["path"]) == ("127.0.0.1", "POST", CHAT)
    assert line["bytes"] == len(reply.content) and line["key"] == "alice"
    assert 0 < line["seconds"] < 60
    age_s = time.time() - datetime.fromisoformat(line["time"]).timestamp()
    assert 0 <= age_s < 60 and datetime.fromisoformat(line["time"]).utcoffset() is not None

    def logged():
        rows = [json.loads(text) for text in server.log.read_text().splitlines()]
        return [row["output_tokens"] for row in rows if row["request_id"] == "in-both"]

    assert eventually(logged) == [4]
    other = server.client.get("/v1/models", headers={"Authorization": "Bearer flags-key"})
    assert access_line(server, other.headers["x-request-id"])["key"] == "--api_key"


def test_a_line_stays_one_line_without_queries(server):
    path = "/v1/models/a%0A%7B%22b%0d" + "c" * 400 + "?secret=1"
    reply = server.client.get(path, headers={"X-Request-Id": "odd-path"})
    assert reply.status_code == 404
    line = access_line(server, "odd-path")
    assert line["path"] == path[:200]
    assert not any("secret" in text or "alices-key" in text for text in server.lines)


def test_a_stream_that_its_client_leaves_is_499(server):
    headers = dict(server.client.headers) | {"X-Request-Id": "left"}
    url = f"http://127.0.0.1:{server.port}{CHAT}"
    with httpx.stream("POST", url, json=LONG_STREAM, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200 and next(reply.iter_lines())
    line = access_line(server, "left")
    assert line["status"] == 499 and line["bytes"] > 0
    assert value(server, "glm_http_requests_total", route=CHAT, status="499") >= 1
    assert value(server, "glm_requests_total", reason="cancelled") >= 1
    reply = ask(server, headers={"X-Request-Id": "stayed"}, stream=True)
    line = access_line(server, "stayed")
    assert reply.text.endswith("data: [DONE]\n\n")
    assert (line["status"], line["bytes"]) == (200, len(reply.content))


# ---- keys


def test_a_key_comes_and_goes_while_the_server_runs(server):
    words = [sys.executable, "-m", "serving.server.keys", "bob", "--file", server.file]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    key = made.stdout.strip()
    assert re.fullmatch(r"glm-[\w-]{43}", key) and not made.stderr
    assert (
        key not in server.file.read_text() and key_digest(key.encode()) in server.file.read_text()
    )

    def status(presented: str) -> int:
        headers = {"Authorization": f"Bearer {presented}"}
        return server.client.get("/v1/models", headers=headers).status_code

    eventually(lambda: status(key) == 200)
    assert status(key_digest(key.encode())) == 401  # a hash is no key
    assert value(server, "glm_key_requests_total", key="bob") == 1
    whole = server.file.read_text()
    server.file.write_text(whole + "carol not-a-hash\n")
    told = f"{server.file}:5: wanted a SHA-256 of 64 hexadecimal digits"
    eventually(lambda: status(key) == 200 and any(told in line for line in server.lines))
    assert sum("earlier keys stay in force" in line for line in server.lines) == 1
    server.file.write_text("\n".join(line for line in whole.splitlines() if "bob" not in line))
    eventually(lambda: status(key) == 401)
    assert status("alices-key") == status("flags-key") == 200


def test_new_keys_are_added_to_a_file_or_shown(tmp_path, capsys):
    file = tmp_path / "keys.txt"
    assert keys.main(["one", "--file", str(file)]) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    file.write_text(file.read_text().rstrip())  # no newline at its end
    link = tmp_path / "link.txt"
    link.symlink_to(file)
    assert keys.main(["two", "--file", str(link)]) == 0
    printed = capsys.readouterr().out.split()
    assert link.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o640
    assert len(set(printed)) == 2
    for key, entry in zip(printed, read_keys(file), strict=True):
        assert entry.digest == key_digest(key.encode())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.txt", "link.txt"]
    before = file.read_text()
    assert keys.main(["two", "--file", str(file)]) == 1 and file.read_text() == before
    assert "there is a key named 'two' already" in capsys.readouterr().err
    assert keys.main(["three"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"three {key_digest(shown.out.strip().encode())}\n"
    assert keys.main(["two words"]) == 1
    assert "NAME must be 1 to 64 letters" in capsys.readouterr().err


def test_keys_that_are_added_at_once_are_all_there(tmp_path):
    file = tmp_path / "keys.txt"
    names = [f"k{i}" for i in range(12)]
    threads = []
    for name in names:
        entry = NamedKey(name, key_digest(name.encode()))
        threads.append(threading.Thread(target=append_key, args=(file, entry)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(file)) == sorted(names)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no keys"),
        ("a\n", ":1: wanted NAME and the SHA-256 of a key, got 1 words"),
        (f"# x\n\na {'0' * 63}\n", ":3: wanted a SHA-256 of 64 hexadecimal digits"),
        (f"-a {'0' * 64}\n", ":1: a name must be"),
        (f"a {'0' * 64}\na {'1' * 64}\n", ":2: this name is in line 1 already"),
        (f"a {'0' * 64}\nb {'0' * 64}\n", ":2: this key is in line 1 already"),
        (b"\xff", ": a file of keys must be UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_keys_is_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "keys.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["--model", "x", "--policy", "fcfs", "--port", "0", "--api_keys", str(file)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


def test_keys_are_compared_in_constant_time_with_all(tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    file.write_text("".join(f"k{i} {key_digest(b'key%d' % i)}\n" for i in range(5)))
    ring = KeyRing("flag", file)
    compared = []
    real = hmac.compare_digest

    def counted(one, other):
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    found = {key: ring.find(key) for key in (b"flag", b"key0", b"key4", b"none", b"")}
    assert list(found.values()) == ["--api_key", "k0", "k4", None, None]
    assert len(compared) == 5 * 6  # each time with every key, wherever it was found
    assert "key0" not in repr(vars(ring)) and "'flag'" not in repr(vars(ring))


def test_loopback_and_no_key_are_the_defaults():
    flags = parse_flags(["--model", "x"])
    assert (flags.host, flags.api_key, flags.api_keys, flags.cors_origins) == (
        "127.0.0.1",
        None,
        None,
        "",
    )


# ---- metrics


def test_lengths_and_seconds_are_counted(server):
    whole = [ask(server, **END_AT_ONCE).json()["glm_foundry"] for _ in range(3)]
    assert all(report["finished"] and report["output_tokens"] == 0 for report in whole)
    ask(server, max_tokens=20)
    answers = eventually(lambda: value(server, "glm_answer_tokens_count"))
    assert value(server, "glm_predicted_tokens_count") == answers
    assert value(server, "glm_answer_tokens_sum") >= 20
    assert value(server, "glm_queue_seconds_count") >= 4
    assert 0 < value(server, "glm_time_per_output_token_seconds_sum") < 60
    ratios, within = [], []  # of the log's lines of whole answers
    for text in eventually(lambda: logged_lines(server, answers)):
        row = json.loads(text)
        if row["finished"]:
            prediction = LengthPrediction.from_dict(row["prediction"])
            ratios.append(math.log((1 + row["output_tokens"]) / (1 + prediction.median_tokens)))
            within.append(row["output_tokens"] <= prediction.quantile(0.9))
    assert len(ratios) >= 3
    drift = value(server, "glm_length_drift_log_ratio")
    assert drift == pytest.approx(sum(ratios) / len(ratios), abs=0.01)
    coverage = value(server, "glm_q90_coverage_ratio")
    assert coverage == pytest.approx(sum(within) / len(within))


def logged_lines(server, count: float) -> list[str]:
    """The log's lines once there are so many."""
    lines = server.log.read_text().splitlines()
    return lines if len(lines) >= count else []


def test_labels_are_of_fixed_sets(server):
    for i in range(5):
        server.client.get(f"/made-up-{i}")
        server.client.get(f"/v1/models/made-up-{i}")
        server.client.get("/v1/models", headers={"Authorization": f"Bearer made-up-{i}"})
    text = server.client.get("/metrics").text
    assert "made-up" not in text
    assert value(server, "glm_http_requests_total", route="other", status="404") >= 5
    named = value(server, "glm_http_requests_total", route="/v1/models/{name}", status="404")
    assert named >= 5


def test_metrics_are_described(server):
    """Each has a help text, a unit or _total at its end, and a row in both documents."""
    families = list(text_string_to_metric_families(server.client.get("/metrics").text))
    assert all(family.documentation for family in families)
    names = [*figures.COUNTERS, *figures.HISTOGRAMS, *figures.GAUGES]
    assert {f"glm_{name}" for name in names} <= {family.name for family in families}
    for document in ("docs/server.md", "docs/zh/server.md"):
        rows = (ROOT / document).read_text(encoding="utf-8")
        for name in [*names, *figures.DEVICE_GAUGES]:
            ending = "_total" if name in figures.COUNTERS else ""
            assert f"| `glm_{name}{ending}" in rows, (document, name)
