"""The server, driven by the openai client over a tiny random model; its parts by themselves.

The predictor is of synthetic lengths.
"""

import http.client
import json
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chatglm.families import family_of
from predictor.update import main as update
from serving.engines import Answer, Sampling
from serving.request import Limits, Request
from serving.scheduler import Replay, VirtualClock, run_scheduler
from serving.server.chat import encode_messages, parse_body, prompt_of
from serving.server.command import main
from serving.server.flags import parse_flags
from serving.server.monitor import Monitor
from serving.server.text_stream import TextStream
from serving.simulate.engine import LinearCost, SimulatedEngine
from tests.predictor import synthetic
from tests.serving.server.conftest import start

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "monitor.jsonl"
    process, url = start(folders, log)
    client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
    yield SimpleNamespace(
        url=url, root=url.removesuffix("/v1"), log=log, client=client, process=process
    )
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, (process.returncode, errors)


def ask(server, text="list river lamp", **options):
    options = {"max_tokens": 24, "temperature": 0} | options
    return server.client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": text}], **options
    )


def streamed(chunks):
    chunks = list(chunks)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def metric(server, name, **labels) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.root}/metrics").text)
    return sum(
        s.value
        for f in families
        for s in f.samples
        if s.name == name and labels.items() <= s.labels.items()
    )


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_asked_by_its_script(server, tmp_path, capsys):
    from scripts.ask_server import main as ask_all

    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"list river {i}"}) + "\n" for i in range(3))
    )
    words = [
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--json",
        tmp_path / "asked.json",
        "--clients",
        2,
        "--max_tokens",
        9,
    ]
    assert ask_all(["--server", server.url, *map(str, words)]) == 0
    found = json.loads((tmp_path / "asked.json").read_text())
    assert (
        found["answers"] == 3
        and [a["output_tokens"] for a in found["all"]] == [9] * 3
        and found["in_time"] == 1
    )
    assert "3 answers" in capsys.readouterr().out
    assert (
        ask_all(["--server", "http://127.0.0.1:9", "--prompts", str(tmp_path / "prompts.jsonl")])
        == 1
    )
    assert capsys.readouterr().err.startswith("ask_server.py: error: ")


def test_profiled_and_compared_with_its_simulation(folders, tmp_path, capsys):
    """scripts/profile_engine.py's file fits a server and a simulator.

    benchmarks/serving_real.py runs both on the same requests.
    """
    from benchmarks.serving_real import main as compare
    from scripts.profile_engine import main as profile
    from serving.cost_model.model import CostModel, ModelSizes, read_profile
    from serving.server.flags import parse_flags
    from serving.server.starting import load_service

    model, predictor = folders
    words = [
        "--model",
        model,
        "--device",
        "cpu",
        "--max_batch",
        2,
        "--max_tokens",
        128,
        "--kv_tokens",
        256,
    ]
    assert (
        profile(
            [
                *map(str, words),
                "--output",
                str(tmp_path / "p.json"),
                "--rows",
                str(tmp_path / "p.csv"),
                "--repetitions",
                "1",
            ]
        )
        == 0
    )
    cost = CostModel.of(ModelSizes.from_config(model, 4), "CPU", read_profile(tmp_path / "p.json"))
    assert 0 < cost.decode_step_s(1, 30) < 1 and 0 < cost.prefill_s(30) < 1
    assert 0 < cost.plan_s < 0.05  # which the simulator charges between steps
    phases = [line.split(",")[7] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert set(phases) == {"decode", "prefill"}
    service = load_service(
        parse_flags(
            [*map(str, words), "--predictor", str(predictor), "--profile", str(tmp_path / "p.json")]
        )
    )
    assert service.backend.engine.cost.decode_step_s(1, 30) == pytest.approx(
        cost.decode_step_s(1, 30)
    )

    (tmp_path / "merged").symlink_to(model)
    (tmp_path / "predictor").symlink_to(predictor)
    rows = [{"prompt": f"list river {i}", "output_tokens": 96, "finished": False} for i in range(4)]
    (tmp_path / "lengths_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--folder",
        tmp_path,
        "--policies",
        "fifo,deadline",
        "--at",
        "fifo",
        "--requests",
        6,
        "--repetitions",
        1,
        "--profile_repetitions",
        1,
    ]
    result = compare(
        [
            *map(str, words),
            "--max_batch",
            "4",
            "--threads",
            "1",
            "--json",
            str(tmp_path / "out.json"),
        ]
    )
    [load] = result["loads"]
    assert [row["policy"] for row in load["rows"]] == ["fifo", "deadline"] and all(
        row["other_answers"] == 0 for row in load["rows"]
    )
    assert all(
        0 < row[side]["latency_mean_s"][0] < 60
        for row in load["rows"]
        for side in ("measured", "simulated")
    )
    assert "deadline" in capsys.readouterr().out and (tmp_path / "out.json").is_file()


def test_plain_and_streaming_say_the_same(server):
    plain = ask(server)
    text, chunks = streamed(ask(server, stream=True, stream_options={"include_usage": True}))
    assert text == plain.choices[0].message.content and text
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 4
    assert chunks[-1].usage == plain.usage and plain.usage.completion_tokens == 24
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason == "length"
    report, other = plain.glm_foundry, chunks[-2].glm_foundry
    assert report["output_tokens"] == other["output_tokens"] == 24 and not report["finished"]
    assert report["predicted_tokens"] == other["predicted_tokens"]
    assert 0 < report["predicted_tokens"]["median"] < report["predicted_tokens"]["q90"]
    assert report["slo_s"] == 30 and report["in_time"] is True


def test_the_prompt_is_the_familys_chat(server, folders):
    import torch

    from chatglm import load_model, load_tokenizer

    model, tokenizer = load_model(folders[0], dtype=torch.float32), load_tokenizer(folders[0])
    messages = [
        {"role": "user", "content": "水泵漏油"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "灯泡"},
    ]
    found = server.client.chat.completions.create(
        model="m", messages=messages, max_tokens=16, temperature=0
    )
    answer, _ = model.chat(
        tokenizer, "灯泡", [("水泵漏油", "好")], do_sample=False, max_new_tokens=16
    )
    assert found.choices[0].message.content == answer
    messages[0] = {"role": "system", "content": "简短"}
    with pytest.raises(openai.BadRequestError, match="the first message must be the user's"):
        server.client.chat.completions.create(model="m", messages=messages)


def test_messages_that_do_not_take_turns(server):
    def answer(*messages, **options):
        given = [{"role": role, "content": text} for role, text in messages]
        options = {"max_tokens": 12, "temperature": 0} | options
        found = server.client.chat.completions.create(model="m", messages=given, **options)
        return found.choices[0].message.content

    joined = answer(("user", "水泵\n漏油"))
    assert answer(("user", "水泵"), ("user", "漏油")) == joined
    with pytest.raises(openai.BadRequestError, match="the last message"):
        answer(("user", "水泵"), ("assistant", ""))
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's"):
        answer(("user", "水泵"), ("assistant", "好"), ("system", "简短"))
    assert answer(("user", "水泵"), ("system", "简短")) == answer(("user", "简短\n\n水泵"))
    assert answer(("system", "水泵")) == answer(("user", "水泵"))
    with pytest.raises(openai.BadRequestError, match="not the assistant's"):
        answer(("assistant", "好"))


def test_top_p_0_is_greedy_and_biases_move_tokens(server):
    greedy = ask(server, "水泵", temperature=0).choices[0].message.content
    assert ask(server, "水泵", temperature=1, top_p=0).choices[0].message.content == greedy
    biased = ask(server, "水泵", temperature=0, max_tokens=3, logit_bias={"40": 100})
    plain = ask(server, "水泵", temperature=0, max_tokens=3)
    assert biased.choices[0].message.content != plain.choices[0].message.content
    assert ask(server, "水泵", temperature=0, logit_bias={"999999": 100}).choices[
        0
    ].message.content == (greedy)


def test_log_probabilities(server):
    options = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    found = ask(server, "水泵", **options).choices[0]
    entries = found.logprobs.content
    assert len(entries) == 8 and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in entries)
    streamed = []
    for chunk in ask(server, "水泵", stream=True, **options):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs true"):
        ask(server, "水泵", top_logprobs=2)


def test_no_path_redirects(server):
    body = {"messages": [{"role": "user", "content": "x"}]}
    found = httpx.post(f"{server.root}/v1/chat/completions/", json=body)
    assert found.status_code == 404


def test_concurrent_answers_are_those_of_one_at_a_time(server):
    texts = [
        f"{kind} garden {i}" for i, kind in enumerate(["name", "list", "explain", "essay"] * 3)
    ]
    alone = [ask(server, text).choices[0].message.content for text in texts]
    found = {}

    def one(text):
        found[text] = ask(server, text).choices[0].message.content

    threads = [threading.Thread(target=one, args=(text,)) for text in texts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [found[text] for text in texts] == alone


def test_seed_slo_and_stop(server):
    first, again, other = (
        ask(server, temperature=1.5, seed=s).choices[0].message.content for s in (3, 3, 4)
    )
    assert first == again != other
    assert ask(server, extra_body={"slo_s": 1e-6}).glm_foundry["in_time"] is False
    text = ask(server).choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    plain = ask(server, stop=[stop, "never said"])
    assert (
        plain.choices[0].message.content == text[: text.index(stop)]
        and plain.choices[0].finish_reason == "stop"
    )
    assert streamed(ask(server, stop=stop, stream=True))[0] == text[: text.index(stop)]


def test_a_client_that_goes_away_ends_its_answer(server):
    before = metric(server, "glm_requests_total", reason="cancelled")
    stream = ask(server, max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: metric(server, "glm_requests_total", reason="cancelled") == before + 1)
    plain = http.client.HTTPConnection(server.root.removeprefix("http://"))
    plain.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "temperature": 0}
        ),
        JSON,
    )
    wait_for(lambda: metric(server, "glm_running_requests") == 1)
    plain.close()
    wait_for(lambda: metric(server, "glm_requests_total", reason="cancelled") == before + 2)
    assert metric(server, "glm_running_requests") == 0


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "not valid JSON"),
        ([], "must be a JSON object"),
        ({}, "messages is required"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0] must be"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "not the assistant's"),
        ({"messages": [{"role": "user", "content": "x"}], "n": 0}, "n must be a whole"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
            "max_tokens must be a whole number at least 1",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "slo_s": -1},
            "slo_s must be a number above 0",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "stop": [""]}, "stop must be"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            "leaves no room for an answer within 1024 tokens",
        ),
    ],
)
def test_bad_bodies(server, body, message):
    reply = httpx.post(
        f"{server.url}/chat/completions",
        content=body if isinstance(body, bytes) else json.dumps(body),
        headers=JSON,
    )
    error = reply.json()["error"]
    assert reply.status_code == 400 and message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_paths(server):
    assert [m.id for m in server.client.models.list()] == ["m"] and server.client.models.retrieve(
        "m"
    ).id == "m"
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
        server.client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": "x"}]
        )
    reply = httpx.get(f"{server.url}/nothing")
    assert reply.status_code == 404 and "nothing" in reply.json()["error"]["message"]
    reply = httpx.post(f"{server.url}/chat/completions", content=b" " * (9 * 2**20), headers=JSON)
    assert reply.status_code == 413 and "larger" in reply.json()["error"]["message"]


def test_metrics_and_a_log_that_updates_the_predictor(server, folders, tmp_path, capsys):
    draw = random.Random(0)
    for i in range(60):
        ask(
            server,
            f"{draw.choice(list(synthetic.KINDS))} {draw.choice(synthetic.TOPICS)} {i}",
            max_tokens=draw.randint(1, 8),
        )
    ended = metric(server, "glm_requests_total", reason="length")
    wait_for(
        lambda: server.log.read_text().count('"reason": "length"') >= max(ended, 60)
    )  # a reply does not wait for its line
    rows = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert (
        metric(server, "glm_kv_limit_tokens") == 4096
        and metric(server, "glm_waiting_requests") == 0
    )
    assert (
        metric(server, "glm_latency_seconds_count") >= 60
        and 0 < metric(server, "glm_slo_attainment") <= 1
    )
    assert all(
        row["served_model"] == "m" and row["prediction"] and row["latency_s"] >= row["ttft_s"] >= 0
        for row in rows
        if row["output_tokens"]
    )
    # answers of a random model end by nobody's wish: say that some did, which an update must have
    log = synthetic.write_rows(
        tmp_path / "log.jsonl", [row | {"finished": row["output_tokens"] < 8} for row in rows]
    )
    assert (
        update(
            ["--predictor", str(folders[1]), "--log", str(log), "--output", str(tmp_path / "new")]
        )
        == 0
    ), capsys.readouterr().err


def test_the_policy_where_none_is_named():
    """Without a predictor a server starts all the same: first come, first served."""
    assert parse_flags(["--model", "m"]).chosen_policy == "fcfs"
    assert parse_flags(["--model", "m", "--predictor", "p"]).chosen_policy == "deadline"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--policy", "deadline"], "needs --predictor DIR; without one choose from"),
        (["--policy", "fcfs", "--max_tokens", "99999"], "max_tokens <= kv_tokens"),
        (["--policy", "fcfs", "--slo_s", "0"], "--slo_s must be above 0"),
        (["--policy", "fcfs", "--client_s", "nan"], "--client_s must be above 0"),
        (["--policy", "fcfs", "--drain_s", "-1"], "--drain_s must be at least 0"),
        (["--policy", "fcfs", "--max_queue", "-1"], "--max_queue must be"),
        (["--policy", "fcfs", "--max_connections", "0"], "--max_connections must be at least 1"),
        (["--policy", "fcfs", "--no_page", "--tools", "samples"], "are of the page, not --no_page"),
        (["--policy", "fcfs", "--log_prompts"], "--log_prompts needs --log FILE"),
        (["--policy", "fcfs", "--vllm_python", "x"], "--vllm_python needs --engine vllm"),
        (["--policy", "fcfs", "--measure_s", "9"], "--measure_s needs --measure"),
        (["--policy", "fcfs", "--model", "/nowhere"], "/nowhere"),
        (["--policy", "fcfs", "--port", "99999"], "--port 99999: bind"),
    ],
)
def test_flags_that_do_not_fit(folders, words, message, capsys):
    assert main(["--model", str(folders[0]), "--port", "0", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
def test_streams_never_take_back(tiny_folders, family):
    """Whatever tokens come, what was sent begins the answer, and no half of a character is sent."""
    from chatglm import load_tokenizer
    from chatglm.families import FAMILIES

    tokenizer = load_tokenizer(tiny_folders[family])
    draw = random.Random(1)
    texts = ["你好, 世界!中文 it 's n't , .", "水泵😀é[[训练时间]],好", "a ' s  b 're\n\nc :今天?"]
    first = tokenizer.get_command(FAMILIES[family].end_token)
    for case in range(120):
        ids = [
            i for text in draw.choices(texts, k=3 + case % 12) for i in tokenizer.encode_text(text)
        ]
        if case % 3:
            ids = [i for i in ids if draw.random() < 0.8] + [
                draw.randrange(3, 330) for _ in range(10)
            ]
            draw.shuffle(ids)
        ids = [i for i in ids if i != first and i not in (tokenizer.pad_token_id,)]
        stops = ("世界", "c :") if case % 5 == 0 else ()
        stream = TextStream(tokenizer, family_of(tokenizer), stops)
        sent = ""
        for i in ids:
            sent += stream.add(i)
            assert case % 3 or "\ufffd" not in sent
        hidden = set(map(tokenizer.get_command, family_of(tokenizer).role_tokens))
        shown = [i for i in ids if i not in hidden]
        whole = family_of(tokenizer).answer_text(tokenizer.decode(shown, skip_special_tokens=True))
        places = [whole.find(stop) for stop in stops if stop in whole]
        whole = whole[: min(places)] if places else whole
        assert (sent if stream.stopped else sent + stream.end()) == whole


def test_messages_become_each_familys_chat(tiny_folders):
    from chatglm import load_tokenizer
    from chatglm.families import FAMILIES

    asked = parse_body(
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": [{"type": "text", "text": "c"}]},
            ],
            "max_completion_tokens": 5,
            "user": "somebody",
        }
    )
    assert asked.max_tokens == 5 and prompt_of(asked.messages) == "s\n\nc"
    for family in ("glm", "glm2"):
        tokenizer = load_tokenizer(tiny_folders[family])
        assert encode_messages(tokenizer, asked.messages) == FAMILIES[family].encode_chat(
            tokenizer, "c", [("s\n\na", "b")]
        )
    tokenizer = load_tokenizer(tiny_folders["glm3"])
    history = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert encode_messages(tokenizer, asked.messages) == FAMILIES["glm3"].encode_chat(
        tokenizer, "c", history
    )


def test_a_monitor_of_a_simulated_run(tmp_path):
    """It needs no server; without log_prompts there is no prompt in the log."""
    from serving.policies.continuous import POLICIES

    limits = Limits(max_batch=2, kv_tokens=400, max_tokens=200)
    monitor = Monitor("m", limits, tmp_path / "log.jsonl")
    requests = [Request(i, 10, i * 0.01, 5.0, output_tokens=20 + i) for i in range(9)] + [
        Request(9, 300, 1.0, 5.0)
    ]
    for request in requests:
        answer = Answer(request.id, [], Sampling(), None)
        answer.add(None, "stop")
        monitor.track(request, "secret", answer)
    list(
        run_scheduler(
            POLICIES["fcfs"],
            SimulatedEngine(LinearCost(), limits),
            VirtualClock(),
            Replay(requests),
            monitor,
        )
    )
    monitor.close()
    text = (tmp_path / "log.jsonl").read_text()
    rows = sorted(map(json.loads, text.splitlines()), key=lambda row: row["output_tokens"])
    assert (
        "secret" not in text
        and [row["output_tokens"] for row in rows] == list(range(19, 28))
        and all(row["finished"] for row in rows)
    )
    assert (
        b'glm_requests_total{reason="refused"} 1.0' in monitor.exposition()
        and monitor.attainment() == 1
    )


def test_gpu_figures_where_there_are_any(monkeypatch):
    from unittest.mock import MagicMock

    nvml = MagicMock(**{"nvmlDeviceGetCount.return_value": 1})
    nvml.nvmlDeviceGetUtilizationRates.return_value.gpu = 40
    nvml.nvmlDeviceGetMemoryInfo.return_value.used = 7
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    text = Monitor("m", Limits()).exposition().decode()
    assert 'glm_device_load{gpu="0"} 0.4' in text and 'glm_device_memory_bytes{gpu="0"} 7.0' in text
    nvml.nvmlInit.side_effect = OSError("no driver")
    assert b"glm_device" not in Monitor("m", Limits()).exposition()


def test_an_engine_that_fails_lets_nobody_wait(tiny_folders, caplog):
    """Running and waiting requests get an error; later ones, and the health check, get 503."""
    from fastapi.testclient import TestClient

    from chatglm import load_tokenizer
    from serving.engines import TextEngine
    from serving.engines.runner import EngineRunner
    from serving.policies.continuous import POLICIES
    from serving.server.api import make_app
    from serving.server.service import Service

    class Broken(TextEngine):
        def check_prompt(self, prompt):
            pass

        def step(self, plan, budget_s=0.0):
            raise MemoryError("no memory\nleft")

    limits = Limits(max_batch=2, kv_tokens=400, max_tokens=200)
    service = Service(
        EngineRunner(Broken(None, limits, LinearCost(), [2]), POLICIES["fcfs"]),
        load_tokenizer(tiny_folders["glm2"]),
        None,
        Monitor("m", limits),
        name="m",
        slo_s=5.0,
        defaults={},
        prompt_options={},
    )
    client = TestClient(make_app(service))
    body = {"messages": [{"role": "user", "content": "x"}]}
    service.start()
    first, second = (client.post("/v1/chat/completions", json=body) for _ in range(2))
    assert (first.status_code, second.status_code, client.get("/health").status_code) == (
        500,
        503,
        503,
    )
    assert (
        first.json()["error"]["message"]
        == second.json()["error"]["message"]
        == "the engine has failed: MemoryError: no memory left"
    )
    service.backend.failure, service.draining = None, True
    assert (
        client.post("/v1/chat/completions", json=body).json()["error"]["message"]
        == "the server is shutting down"
    )
    service.stop()


def test_sigterm_drains(server):
    """The last to use the server."""
    stream = iter(ask(server, max_tokens=300, stream=True))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert (
        chunks[-1].choices[0].finish_reason == "length"
        and chunks[-1].glm_foundry["output_tokens"] == 300
    )
    assert server.process.wait(60) == 0
    with pytest.raises(openai.APIConnectionError):
        ask(server)
    row = json.loads(server.log.read_text().splitlines()[-1])
    assert row["output_tokens"] == 300 and row["reason"] == "length" and not row["finished"]
