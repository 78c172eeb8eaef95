"""One request, client or fault never harms another's answer.

Real servers on a tiny model, each in a thread of this process.
"""

import http.client
import json
import logging
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.serving_attack import BODIES, legal
from benchmarks.serving_attack import main as attack
from serving.engines import Sampling, make_engine
from serving.engines import answers as sampling_code
from serving.request import Limits, Plan, Record, Request
from serving.server.access import access_rules_of
from serving.server.chat import parse_body
from serving.server.command import bind, main
from serving.server.fields import CHAT_REFUSED, CHAT_TABLE, FIELDS, REFUSED, Number
from serving.server.flags import parse_flags
from serving.server.starting import load_service, make_server
from serving.simulate.engine import LinearCost
from tests.conftest import tiny_model
from tests.warm import warm_python

ENDLESS = 250  # tokens of an answer that is under way for a while
JSON = {"Content-Type": "application/json"}


@contextmanager
def running(folder, *words, endless=True, prepare=None):
    """A server's root, port, service, uvicorn server and thread; its exit code once it ended."""
    flags = [
        "--model",
        folder,
        "--policy",
        "fcfs",
        "--device",
        "cpu",
        "--max_batch",
        2,
        "--kv_tokens",
        2048,
        "--max_tokens",
        1024,
    ]
    args = parse_flags([str(word) for word in (*flags, *words)])
    sock = bind("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    keys, service = access_rules_of(args, sock), load_service(args)
    if endless:
        service.backend.engine.stop_ids = frozenset()
    if prepare is not None:
        prepare(service)
    server = make_server(service, keys, args)
    port = sock.getsockname()[1]
    found = SimpleNamespace(
        root=f"http://127.0.0.1:{port}", port=port, service=service, server=server, code=None
    )

    def serve():
        found.code = server.serve_at(sock)

    found.thread = threading.Thread(target=serve)
    found.thread.start()
    try:
        yield found
    finally:
        for _ in range(2):
            server.handle_exit(signal.SIGTERM, None)
        found.thread.join(30)
        assert not found.thread.is_alive()


@pytest.fixture(scope="module")
def server(tiny_folders):
    with running(
        tiny_folders["glm2"], "--client_s", "1", "--max_connections", "20", "--max_tokens", "200"
    ) as found:
        yield found


def ask(server, text="你好", timeout=60, headers=JSON, **fields) -> httpx.Response:
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "temperature": 0,
    } | fields
    return httpx.post(
        f"{server.root}/v1/chat/completions",
        content=json.dumps(body),
        headers=headers,
        timeout=timeout,
    )


def answer_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    message = reply.json()["error"]["message"]
    assert "\n" not in message and len(message) < 400
    return message


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def idle(server) -> bool:
    """No answer is known, nothing is reserved, no row holds memory."""
    engine, monitor = server.service.backend.engine, server.service.monitor
    slabs = getattr(
        getattr(engine, "runner", None), "arena", SimpleNamespace(slabs={})
    ).slabs.values()
    return not (
        engine.count()
        or engine.rows
        or monitor._running
        or monitor.under_way()[1]
        or any(slab.rows for slab in slabs)
    )


class Together:
    """Requests asked at once, each in a thread; `replies` once all have come."""

    def __init__(self, server, *asked: dict):
        self.found: dict[int, httpx.Response] = {}
        self.threads = [
            threading.Thread(target=self._ask, args=(server, i, fields))
            for i, fields in enumerate(asked)
        ]
        for thread in self.threads:
            thread.start()

    def _ask(self, server, i: int, fields: dict):
        self.found[i] = ask(server, **fields)

    @property
    def replies(self) -> list[httpx.Response]:
        for thread in self.threads:
            thread.join(60)
        return [self.found[i] for i in range(len(self.threads))]


# ---- the numbers of a request


@pytest.mark.parametrize("engine, policy", [("continuous", "fcfs"), ("static", "fifo")])
def test_s1_numbers_too_small_to_matter_are_greedy(tiny_folders, engine, policy):
    """Also beside others under way; the server goes on."""
    with running(tiny_folders["glm2"], "--engine", engine, "--policy", policy) as server:
        greedy = answer_of(ask(server))
        odd = [{"temperature": t} for t in (1e-40, 5e-324, 1e-6)]
        odd += [{"temperature": 0.8, "top_p": p} for p in (1e-50, 5e-324)]
        odd += [
            {"temperature": 2, "min_p": 1},
            {"temperature": 1e-3, "top_k": 1},
            {"temperature": 2, "do_sample": False},
        ]
        replies = Together(server, *odd, {"text": "hello"}).replies
        assert [answer_of(reply) for reply in replies[:-1]] == [greedy] * len(odd)
        answer_of(
            ask(
                server,
                temperature=2,
                repetition_penalty=0.01,
                presence_penalty=-2,
                frequency_penalty=2,
                seed=2**63 - 1,
            )
        )
        assert httpx.get(f"{server.root}/health").status_code == 200
        wait_for(lambda: idle(server))


def test_s4_fields_that_change_answers_are_obeyed(server):
    plain = ask(server, max_tokens=30)
    assert answer_of(ask(server, max_tokens=30, repetition_penalty=2.0)) != answer_of(plain)
    assert answer_of(
        ask(server, max_tokens=30, presence_penalty=2.0, frequency_penalty=2.0)
    ) != answer_of(plain)
    prompt = plain.json()["usage"]["prompt_tokens"]
    assert (
        ask(server, max_tokens=30, max_length=prompt + 7).json()["usage"]["completion_tokens"] == 7
    )
    assert "counts the prompt too" in error_of(ask(server, max_length=prompt), 400)
    sampled = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 30}
    assert answer_of(ask(server, **sampled, seed=3)) != answer_of(ask(server, **sampled, seed=4))
    assert {answer_of(ask(server, **sampled, top_k=1, seed=seed)) for seed in (3, 4)} == {
        answer_of(plain)
    }
    found = ask(server, unknown_field=1, user="somebody").json()
    assert found["glm_foundry"]["ignored"] == ["unknown_field"]


def test_s4_penalties_are_those_of_transformers():
    """And top-k, min-p and top-p leave the tokens that transformers' warpers leave."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from serving.engines.answers import Answer, penalized, sample

    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    answer = Answer(0, [3, 4, 5, 4], Sampling(repetition_penalty=1.7), None)
    answer.tokens = [7, 7, 9]
    before = logits.clone()
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([[3, 4, 5, 4, 7, 7, 9]]), logits[None].clone()
    )[0]
    torch.testing.assert_close(penalized(logits, answer), wanted)
    answer.sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    wanted = logits.clone()
    wanted[7], wanted[9] = wanted[7] - 1.0, wanted[9] - 0.75
    torch.testing.assert_close(penalized(logits, answer), wanted)
    assert torch.equal(logits, before)

    options = {"top_k": 9, "top_p": 0.9, "min_p": 0.05}
    left = logits[None].clone() / 1.5
    for warper in (TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        left = warper(None, left)
    allowed = set(left[0].isfinite().nonzero().flatten().tolist())
    answer = Answer(0, [1], Sampling(temperature=1.5, seed=0, **options), None)
    assert {sample(logits, answer) for _ in range(2000)} == allowed


def test_s4_a_stop_token_ends_the_answer_before_it(server):
    tokenizer = server.service.tokenizer
    answers = server.service.backend.engine._answers
    watched = {}

    class Watching(dict):
        def __setitem__(self, key, answer):
            watched[key] = answer
            super().__setitem__(key, answer)

    server.service.backend.engine._answers = Watching(answers)
    text = answer_of(ask(server, max_tokens=30))
    server.service.backend.engine._answers = answers
    [answer] = watched.values()
    stop = answer.tokens[9]
    first = answer.tokens.index(stop)
    reply = ask(server, max_tokens=30, stop_token_ids=[stop, 2**31 - 1])
    assert answer_of(reply) == tokenizer.decode(
        answer.tokens[:first], skip_special_tokens=True
    ).strip() and text.startswith(answer_of(reply))
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("name", [name for name in CHAT_REFUSED])
def test_s4_fields_that_are_not_obeyed_are_refused_by_name(name):
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert parse_body(body | {name: None}) and all(
        parse_body(body | {name: neutral_values}) for neutral_values in CHAT_REFUSED[name]
    )
    with pytest.raises(ValueError, match=f"^{name} is not supported here"):
        parse_body(body | {name: 7})


@pytest.mark.parametrize("role", [["user"], {"a": 1}, None, 1, True, "bot"], ids=repr)
def test_s5_a_role_that_is_no_text_is_400(server, role):
    body = {"messages": [{"role": role, "content": "x"}]}
    reply = httpx.post(f"{server.root}/v1/chat/completions", json=body)
    roles = "system, developer, user, assistant, tool, function, observation"
    wanted = f"messages[0] must be an object with a role of {roles}, got {json.dumps(role)}"
    assert error_of(reply, 400) == wanted


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": "0.5"}, 'temperature must be a number .* at most 2, got "0.5"$'),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number .*, got 1.5$"),
        ({"stream": 1}, "stream must be true or false, got 1$"),
        ({"model": ["m"]}, r'model must be text, got \["m"\]$'),
        ({"stop": ["a", "b" * 300]}, "stop must be texts of 1 to 256 characters, got one of 300$"),
        ({"stop_token_ids": ["1"]}, r'token ids from 0 to \d+, got \["1"\]$'),
        ({"logit_bias": {"x": 1}}, 'logit_bias must name tokens .*, got "x"$'),
        ({"messages": {}}, "messages must be a list of at least one message, got {}$"),
        ({"tools": [{"function": {"name": "a b"}}]}, r"tools\[0\].name must be .*, got 'a b'$"),
        ({"tools": [{"function": {"name": [[]]}}]}, r"tools\[0\].name must be .*, got list$"),
        ({"tools": [{}] * 129}, "tools must be a list of at most 128 tools, got 129$"),
        ({"tool_choice": "any"}, 'tool_choice must be .*, got "any"$'),
        ({"response_format": {"type": "xml"}}, r'response_format must be .*, got {"type": "xml"}$'),
        ({"guided_choice": []}, "guided_choice must be a list of 1 to 1024 texts, got 0$"),
        ({"guided_regex": "x" * 5000}, "guided_regex must be a text of 1 to 4096 .*, got 5000$"),
    ],
)
def test_an_error_says_what_came(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_body({"messages": [{"role": "user", "content": "x"}]} | fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stop": "x" * 100_000}, "texts of 1 to 256 characters"),
        ({"stop": ["a"] * 5}, "at most 4 texts"),
        ({"model": "m" * 300}, "model must have at most 256"),
        ({"text": "\ud800"}, "messages[0].content holds half of a surrogate pair"),
        ({"stop_token_ids": [1] * 65}, "at most 64 token ids"),
        ({"stop_token_ids": [True]}, "token ids from 0"),
        ({"text": "x" * 300_000}, "300000 characters, which leaves no room"),
        ({"temperature": 10**400}, "at most 2"),
        ({"max_tokens": 2**31}, "at most 2147483647"),
        ({"top_p": -0.1}, "at least 0"),
        ({"logit_bias": {"a": 1}}, "token"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5] must be a number at least -100"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "at most 300"),
        ({"seed": 2**63}, "at most 9223372036854775807"),
    ],
)
def test_s2_everything_of_a_request_is_bounded(server, fields, message):
    assert message in error_of(ask(server, **fields), 400)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "9" * 5000])
def test_numbers_that_are_none_are_400(server, token):
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "temperature": {token}}}'
    assert "not valid JSON" in error_of(
        httpx.post(f"{server.root}/v1/chat/completions", content=body, headers=JSON), 400
    )


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=12), max_size=3))
def test_s2_what_a_stream_holds_back(text, stops):
    from serving.server.text_stream import longest_partial_match

    naive = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    assert longest_partial_match(text, tuple(stops)) == naive


def test_s2_the_worst_stops_cost_little(server):
    """Texts and stops that nearly match everywhere."""
    from serving.server.text_stream import longest_partial_match

    long = "a" * 100_000 + "b"
    begin = time.perf_counter()
    assert longest_partial_match("a" * 100_000, (long,)) == 100_000
    assert time.perf_counter() - begin < 2
    stops = ["a" * 255 + x for x in "bcde"]
    begin = time.perf_counter()
    assert ask(server, max_tokens=100, stop=stops).status_code == 200
    assert time.perf_counter() - begin < 10


# ---- queue and drain


def test_s3_a_full_queue_is_429(tiny_folders):
    with running(
        tiny_folders["glm2"], "--max_queue", "1", "--drain_s", "0", prepare=slow_steps(0.002)
    ) as server:
        alone = answer_of(ask(server))
        long = Together(server, *[{"max_tokens": ENDLESS}] * 3)
        wait_for(lambda: server.service.backend.engine.count() == 3)
        reply = ask(server)
        assert (
            "1 requests wait already (--max_queue)" in error_of(reply, 429)
            and int(reply.headers["Retry-After"]) >= 1
        )
        assert [len(reply.json()["choices"]) for reply in long.replies] == [1] * 3
        wait_for(lambda: idle(server))
        assert answer_of(ask(server)) == alone


def test_s3_who_leaves_the_queue_makes_room_at_once(tiny_folders):
    with running(tiny_folders["glm2"], "--max_queue", "1", prepare=slow_steps(0.01)) as server:
        stays = Together(server, *[{"max_tokens": 1000}] * 2)
        wait_for(lambda: len(server.service.backend.engine.rows) == 2)
        for _ in range(5):
            with pytest.raises(httpx.ReadTimeout):
                ask(server, timeout=0.1)
            wait_for(lambda: server.service.backend.engine.count() == 2)
        assert (
            len(server.service.backend.engine.rows) == 2
        )  # while the others are still being served
        server.service.cancel_all()
        assert [error_of(reply, 500) for reply in stays.replies] == ["the answer was cancelled"] * 2


@pytest.mark.parametrize("engine, policy", [("continuous", "fcfs"), ("static", "fifo")])
def test_s3_a_drains_end_answers_everybody(tiny_folders, caplog, engine, policy):
    words = ["--drain_s", "1.5", "--engine", engine, "--policy", policy]
    with running(tiny_folders["glm2"], *words, prepare=slow_steps(0.02)) as server:
        asked = Together(server, *[{"max_tokens": ENDLESS, "stream": i % 2 == 1} for i in range(8)])
        wait_for(
            lambda: (
                server.service.backend.engine.count() == 8 and server.service.backend.engine.rows
            )
        )
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        time.sleep(0.2)
        begin = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        assert (
            b" 503 " in half.recv(1000) and time.monotonic() - begin < 1.4
        )  # at once: it would be refused anyhow
        half.close()
        replies = asked.replies
        server.thread.join(20)
        assert not server.thread.is_alive() and 1.4 < time.monotonic() - begin < 10
    for i, reply in enumerate(replies):
        if i % 2 == 0:
            assert "shutting down" in error_of(reply, 503)
        else:
            last = reply.text.strip().split("\n\n")[-1]
            assert (
                "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
                and "[DONE]" not in reply.text
            )
    assert server.code == 0 and not caplog.records


def slow_steps(seconds: float):
    """A service's engine whose forward passes take so much longer."""

    def prepare(service):
        head = service.backend.engine.model.get_output_embeddings()
        return head.register_forward_hook(lambda *_: time.sleep(seconds))

    return prepare


@contextmanager
def slowed(service, seconds: float = 0.03):
    """Its answers last long enough to be looked at, however slow the one who looks."""
    hook = slow_steps(seconds)(service)
    try:
        yield
    finally:
        hook.remove()


# ---- who may come in


def test_s6_only_what_a_page_cannot_send_unasked(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        reply = ask(server, headers={"Content-Type": kind, "Origin": "http://evil.example"})
        assert "Content-Type: application/json" in error_of(reply, 415)
    reply = httpx.post(f"{server.root}/v1/chat/completions", content=b"{}")
    assert reply.status_code == 415
    assert (
        ask(server, headers={"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200
    )
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = httpx.options(f"{server.root}/v1/chat/completions", headers=preflight)
    assert reply.status_code == 405 and not [
        name for name in reply.headers if name.startswith("access-control")
    ]


@pytest.mark.parametrize(
    "host, status",
    [
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("localhost.evil", 403),
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
    ],
)
def test_s6_only_its_own_names_on_loopback(server, host, status):
    assert httpx.get(f"{server.root}/health", headers={"Host": host}).status_code == status
    assert ask(server, headers=JSON | {"Host": host}).status_code == status


def test_s6_keys_origins_and_hosts(tiny_folders, monkeypatch, capsys):
    monkeypatch.setenv("GLM_API_KEY", "from-the-environment")
    words = [
        "--cors_origins",
        "http://one.example, http://two.example",
        "--allowed_hosts",
        "glm.example",
    ]
    with running(tiny_folders["glm2"], *words) as server:
        assert "Authorization: Bearer" in error_of(ask(server), 401)
        for key in ("Bearer wrong", "Basic from-the-environment", "Bearer \xe9"):
            assert (
                ask(server, headers=JSON | {"Authorization": key.encode("latin-1")}).status_code
                == 401
            )
        right = JSON | {"Authorization": "Bearer from-the-environment"}
        assert ask(server, headers=right | {"Host": "glm.example:99"}).status_code == 200
        assert ask(server, headers=right | {"Host": "other.example"}).status_code == 403
        paths = {
            path: httpx.get(server.root + path).status_code
            for path in ("/health", "/metrics", "/v1/models", "/openapi.json")
        }
        assert paths == {"/health": 200, "/metrics": 401, "/v1/models": 401, "/openapi.json": 401}
        for origin, allowed in (("http://one.example", True), ("http://evil.example", False)):
            reply = ask(server, headers=right | {"Origin": origin})
            assert reply.headers.get("access-control-allow-origin") == (origin if allowed else None)
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            }
            reply = httpx.options(f"{server.root}/v1/chat/completions", headers=asked)
            assert (reply.status_code == 200) is allowed
    for key in ("", " x", "ключ"):
        assert main(["--model", "x", "--policy", "fcfs", "--port", "0", "--api_key", key]) == 1
        assert "--api_key (or GLM_API_KEY) must be printable ASCII" in capsys.readouterr().err


# ---- the log


def test_s7_a_log_goes_on_after_a_full_disk(tmp_path, caplog):
    """The limit on a file's size stands for the disk's end: writes stop in the middle of a line."""
    import resource

    from serving.server.monitor import LogFile

    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"torn": ')
    log = LogFile(path)
    log.write('{"b": 2}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        log.write('{"lost": 1}')
        log.write('{"lost": 2}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write('{"c": 3}')
    log.close()
    assert path.read_text().split("\n") == [
        '{"a": 1}',
        '{"torn": ',
        '{"b": 2}',
        '{"los',
        '{"c": 3}',
        "",
    ]
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "WARNING"] and "lines lost: 2" in said[1][1]


# ---- sockets and clients


def test_s8_a_port_is_taken_once_bound():
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: Address already in use"):
        bind("127.0.0.1", port)
    sock.close()


def test_s9_slow_clients_are_dropped(server):
    """Half a header: closed. Half a body: 408."""
    header, body = (
        socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(2)
    )
    header.sendall(b"GET /health HTTP/1.1\r\nHo")
    body.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    assert body.recv(1000).startswith(b"HTTP/1.1 408 ")
    with pytest.raises(ConnectionError):
        assert header.recv(1000) == b""
        raise ConnectionError("closed, not reset")
    wait_for(lambda: not server.server.server_state.connections)


def test_s9_who_does_not_read_is_dropped(server):
    """Small buffers, so that 40 replies fill them."""
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    deaf.connect(("127.0.0.1", server.port))
    deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
    wait_for(
        lambda: any(
            connection.flow.write_paused
            for connection in list(server.server.server_state.connections)
        )
    )
    wait_for(lambda: not server.server.server_state.connections)
    deaf.close()
    assert answer_of(ask(server))


def test_s9_who_sends_far_ahead_is_dropped(server):
    """uvicorn would read on and on; 16 MB ahead, its loop stands still for minutes."""
    ahead = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    with pytest.raises(ConnectionError):
        for _ in range(400):
            ahead.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    ahead.close()
    wait_for(lambda: not server.server.server_state.connections)
    assert answer_of(ask(server))


def test_s9_one_connection_too_many(server):
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    wait_for(lambda: len(server.server.server_state.connections) == 20)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one_more:
        assert b" 503 " in one_more.recv(1000)
    for connection in held:
        connection.close()
    wait_for(lambda: not server.server.server_state.connections)
    assert answer_of(ask(server))


def test_s9_head_and_a_line_for_each_request(tiny_folders, caplog):
    caplog.set_level(logging.INFO, "serving.access")
    with running(tiny_folders["glm2"], "--access_log") as server:
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
            reply = httpx.head(server.root + path)
            assert reply.status_code == 200 and not reply.content, path
        ask(server)
        httpx.get(f"{server.root}/v1/models/a%0Ab?secret=1")
    texts = [record.getMessage() for record in caplog.records if record.name == "serving.access"]
    lines = [json.loads(text) for text in texts[-3:]]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("HEAD", "/openapi.json", 200),
        ("POST", "/v1/chat/completions", 200),
        ("GET", "/v1/models/a%0Ab", 404),
    ]
    assert "secret" not in texts[-1] and lines[0]["bytes"] == 0 < lines[1]["bytes"]


def test_s9_the_openapi_document_says_what_is_served(server):
    document = httpx.get(f"{server.root}/openapi.json").json()
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in server.server.config.app.routes
        for method in route.methods
    }
    served = {
        (path, method)
        for path, method in routes
        if method in ("get", "post") and path != "/openapi.json"
    }
    assert served == {
        (path, method)
        for path, of in document["paths"].items()
        for method in of
        if method != "parameters"
    }
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema == CHAT_TABLE.schema() and set(schema["properties"]) == set(FIELDS)
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    for name, field in FIELDS.items():
        if isinstance(field, Number):
            said = schema["properties"][name]
            n = {"n": said["maximum"]} if name == "best_of" else {}
            assert parse_body(body | n | {name: said["maximum"]})
            for value in (
                said["maximum"] * 2 + 2,
                said.get("exclusiveMinimum", said.get("minimum", 0) - 1),
            ):
                with pytest.raises(ValueError, match=f"^{name} must be"):
                    parse_body(body | {name: value})
    reply = ask(server, temperature=3)
    assert set(reply.json()["error"]) == set(
        document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    )
    whole = document["components"]["schemas"]["ChatCompletion"]
    assert set(whole["required"]) == set(ask(server).json())


# ---- faults within


def failing(where, when, error):
    """A function that raises where `when(*args)` says so, else does what `where` did."""

    def call(*args, **more):
        if when(*args):
            raise error
        return where(*args, **more)

    return call


def test_a_rows_sampling_that_fails_ends_that_row_alone(tiny_folders, monkeypatch):
    with running(tiny_folders["glm2"]) as server:
        good = {"temperature": 1.0, "seed": 7, "max_tokens": 60}
        alone = answer_of(ask(server, **good))
        broken = failing(
            sampling_code.sample,
            lambda logits, answer: answer.sampling.seed == 13 and len(answer.tokens) > 3,
            RuntimeError("no"),
        )
        monkeypatch.setattr(sampling_code, "sample", broken)
        first, second = Together(server, good, good | {"seed": 13}).replies
        assert answer_of(first) == alone and "could not be sampled" in error_of(second, 500)
        wait_for(lambda: idle(server))
        assert answer_of(ask(server, **good)) == alone
    assert server.code == 0


def test_a_predictor_that_fails_ends_that_answer_alone(tiny_folders):
    def prepare(service):
        service.predictor = SimpleNamespace(
            predict=failing(lambda prompt: [None], lambda prompt: "bad" in prompt, ValueError("no"))
        )

    with running(tiny_folders["glm2"], prepare=prepare) as server:
        alone = answer_of(ask(server))
        assert "could not be predicted: ValueError" in error_of(ask(server, text="bad"), 500)
        assert answer_of(ask(server)) == alone
        wait_for(lambda: idle(server))
    assert server.code == 0


def test_a_monitor_that_fails_ends_no_answer(tiny_folders, tmp_path):
    def prepare(service):
        service.monitor._write = failing(None, lambda *_: True, TypeError("no"))

    with running(tiny_folders["glm2"], "--log", tmp_path / "log.jsonl", prepare=prepare) as server:
        assert answer_of(ask(server)) == answer_of(ask(server))
        assert httpx.get(f"{server.root}/health").status_code == 200
        wait_for(lambda: idle(server))
    assert server.code == 0


@pytest.mark.parametrize("part", ["engine", "policy", "model"])
def test_an_engine_that_is_lost_answers_everybody_and_ends_the_process(tiny_folders, part):
    """Exit code 1, so that a supervisor restarts it; plain and streaming, running and waiting."""
    broken = threading.Event()

    def prepare(service):
        if part == "policy":
            policy = service.backend.policy
            names = {"length": policy.length, "order": policy.order, "predicts": policy.predicts}

            class Policy(SimpleNamespace):
                def __call__(self, view, cost):
                    if broken.is_set():
                        raise ZeroDivisionError("no")
                    return policy(view, cost)

            service.backend.policy = Policy(**names)
        elif part == "engine":
            service.backend.engine.step = failing(
                service.backend.engine.step, lambda *_: broken.is_set(), MemoryError("no")
            )
        else:
            head = service.backend.engine.model.get_output_embeddings()
            head.register_forward_hook(
                failing(lambda *_: None, lambda *_: broken.is_set(), RuntimeError("no"))
            )

    with running(tiny_folders["glm2"], prepare=prepare) as server:
        asked = Together(server, *[{"max_tokens": ENDLESS, "stream": i % 2 == 1} for i in range(6)])
        wait_for(lambda: server.service.backend.engine.count() == 6)
        broken.set()
        if part != "model":  # a running step ends at the next arrival, which may come too late
            with suppress(httpx.TransportError):
                ask(server)
        replies = asked.replies
        server.thread.join(20)
        assert not server.thread.is_alive() and server.code == 1
    for reply in replies:
        last = reply.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert "the engine has failed" in json.loads(last)["error"][
            "message"
        ] and reply.status_code in (200, 500, 503)


@pytest.mark.parametrize("by", ["step", "end_all"])
def test_s10_a_static_engines_thread_ends_with_its_failed_step(by):
    def generating():
        return [thread for thread in threading.enumerate() if thread.name == "generate"]

    engine = make_engine(
        "static",
        tiny_model("glm2"),
        Limits(max_batch=2, kv_tokens=400, max_tokens=100),
        LinearCost(),
        [],
    )
    records = [Record(Request(i, 3, 0.0, 10.0)) for i in range(2)]
    for record in records:
        engine.submit(record.request, [31, 32, 33], Sampling(50))
    plans = [
        Plan((record,), reserve_tokens={i: 90}, together=True, horizon_steps=2)
        for i, record in enumerate(records)
    ]
    engine.step(plans[0])
    assert len(generating()) == 1
    if by == "step":
        with pytest.raises(RuntimeError, match="admits whole batches, when it is empty"):
            engine.step(plans[1])
    else:
        engine.end_all("failed")
    wait_for(lambda: not generating(), 5)


def test_s10_a_monitor_is_closed_last(tiny_folders, tmp_path, caplog):
    """Not while a step that outlives the wait for it may still write."""
    with running(
        tiny_folders["glm2"], "--log", tmp_path / "log.jsonl", prepare=slow_steps(4.0)
    ) as server:
        asked = Together(server, {})
        lane = server.service.backend.engine.runner.lanes[0]
        wait_for(lambda: lane.in_flight)  # in the slow pass, which no longer can be left out
        server.service.stop(0.05)
        assert server.service.monitor._file is not None and "has not ended its step" in caplog.text
        assert "shutting down" in error_of(asked.replies[0], 503)
        server.service.backend._thread.join(20)
        server.service.stop()
        assert server.service.monitor._file is None


# ---- bodies at random

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(categories=["Cs"]), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
messages = st.just([{"role": "user", "content": "你好"}])
numbers = st.one_of(
    [st.floats(), st.integers(), st.sampled_from([5e-324, 1e-45, 1e308, 10**400, -(10**400)])]
)
letters = SimpleNamespace(encode_text=lambda text: [ord(letter) % 64 for letter in text])
bodies = st.builds(
    lambda base, odd: base | odd,
    st.fixed_dictionaries({"messages": messages | any_json}),
    st.dictionaries(st.sampled_from([*FIELDS, *REFUSED]), numbers | any_json, max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(bodies | any_json)
def test_any_body_is_a_request_or_one_line(body):
    """And a request's numbers are ones that sampling takes."""
    import torch

    from serving.engines.answers import Answer, choose_tokens
    from serving.server.generation import banned_sequences
    from serving.server.service import Service

    try:
        asked = parse_body(body)
        service = SimpleNamespace(defaults={"temperature": 0.8, "top_p": 0.8})
        sampling = replace(
            Service.sampling_of(service, asked, 5),
            bad_words=banned_sequences(letters, asked.bad_words),
        )
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    answer = Answer(0, [1, 2, 3], sampling, None)
    answer.tokens = [4, 4]
    [token] = choose_tokens(torch.linspace(-30, 40, 64)[None], [answer])
    assert token in range(64)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=True), kind=st.sampled_from(["legal", *BODIES]))
def test_no_body_harms_a_probes_answer(server, draw, kind):
    """By the real door; the probe's answer is, token for token, what it is alone."""
    if not hasattr(server, "alone"):
        server.alone = answer_of(ask(server, "hello"))
    body = json.dumps(legal(draw)).encode() if kind == "legal" else BODIES[kind](draw)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, JSON)
    probe = answer_of(ask(server, "hello"))
    reply = connection.getresponse()
    said = reply.read()
    connection.close()
    assert reply.status < 500 and b'"server_error"' not in said, (body[:300], said[-300:])
    assert probe == server.alone


def test_a_connection_in_use_is_not_dropped_for_being_idle_now_and_then(server):
    """It waits for its client whenever the server looks, but never for client_s at a stretch."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.connect()
    begin = connection.sock
    for _ in range(14):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        assert connection.sock is begin
        time.sleep(0.3)
    connection.close()


def test_the_attack_in_miniature(tiny_folders, tmp_path, capsys, monkeypatch):
    """On a server of its own; a busy machine's /health may take longer than the script's limit."""
    monkeypatch.setattr(sys, "executable", warm_python())  # what it starts the server with
    words = [
        "--bodies",
        "40",
        "--seconds",
        "8",
        "--model",
        str(tiny_folders["glm2"]),
        "--health_s",
        "5",
        "--json",
        str(tmp_path / "a.json"),
    ]
    code = attack(words)
    out = capsys.readouterr()
    assert code == 0, out.err
    found = json.loads((tmp_path / "a.json").read_text())
    assert (
        found["requests"] > 10
        and found["probes"] > 0
        and not found["faults"]
        and "| legal |" in out.out
    )
