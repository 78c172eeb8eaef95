"""A server with LoRA adapters: requests choose one by `model`, clients load and unload them."""

import json
import os
import threading
from types import SimpleNamespace

import httpx
import pytest

from chatglm import load_model, load_tokenizer
from predictor.monitor_log import read_log
from serving.server.adapters import ADAPTER_NAME, folder_within
from serving.server.flags import parse_flags
from serving.server.starting import load_service
from tests.serving.lora_folders import merged_model, write_adapter
from tests.serving.server.test_server_faults import (
    answer_of,
    ask,
    error_of,
    idle,
    running,
    wait_for,
)

LAYERS = ("query_key_value", "dense", "dense_4h_to_h")
LONG = 400  # tokens of an answer that is under way for a while


@pytest.fixture(scope="module")
def here(tiny_folders, tmp_path_factory):
    """A base, adapters a and b (and c in the adapter root), what each says alone."""
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_folders["glm2"]
    model = load_model(base)
    root = folder / "root"
    adapters = {
        "a": write_adapter(folder / "a", model, 1, LAYERS, 4),
        "b": write_adapter(folder / "b", model, 2, LAYERS, 8, use_rslora=True),
        "c": write_adapter(root / "c", model, 3, LAYERS, 2),
    }
    tokenizer = load_tokenizer(base)
    said = {None: say(model, tokenizer)}
    for name, adapter in adapters.items():
        said[name] = say(merged_model(base, adapter, folder / f"m{name}", "glm2"), tokenizer)
    assert len(set(said.values())) == 4
    write_adapter(root / "deep" / "other", model, 5, LAYERS, 2)
    return SimpleNamespace(base=base, model=model, root=root, adapters=adapters, said=said)


def say(model, tokenizer) -> str:
    """The greedy answer of 12 tokens to the question of `ask`, stop tokens not heeded."""
    import torch

    ids = tokenizer("[Round 1]\n\n问：你好\n\n答：", return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=[1 << 20])
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(here):
    flags = []
    for name in "ab":
        flags += ["--adapter", f"{name}={here.adapters[name]}"]
    log = here.root.parent / "log.jsonl"
    flags += ["--adapter_dir", here.root, "--log", log, "--max_batch", 4]
    with running(here.base, *flags) as found:
        found.log = log
        found.name = found.service.name
        yield found


def post(server, path, **body) -> httpx.Response:
    return httpx.post(f"{server.root}{path}", json=body, timeout=60)


def load(server, name, folder) -> httpx.Response:
    return post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))


def unload(server, name) -> httpx.Response:
    return post(server, "/v1/unload_lora_adapter", lora_name=name)


def said_by(server, model) -> str:
    return answer_of(ask(server, model=model)).strip()


def test_a_request_chooses_by_model(server, here, tmp_path):
    answers = {}

    def one(name):
        reply = ask(server, model=name or server.name)
        answers[name] = reply.json()

    threads = [threading.Thread(target=one, args=[name]) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, body in answers.items():
        assert body["choices"][0]["message"]["content"].strip() == here.said[name].strip()
        assert body["model"] == (name or server.name)
        assert body["glm_foundry"].get("adapter") == name
    assert said_by(server, None) == here.said[None].strip()
    wait_for(lambda: idle(server))
    rows = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {row["served_model"] for row in rows} == {server.name}
    assert {row.get("adapter") for row in rows} == {"a", "b", None}
    with_prompts = []
    for row in rows:
        with_prompts.append(row | {"prompt": "x"})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, with_prompts)))
    kept = read_log([str(tmp_path / "log.jsonl")], server.name, "error").examples
    assert len(kept) == [row.get("adapter") for row in rows].count(None) < len(rows)


def test_a_stream_names_its_adapter(server, here):
    body = {"messages": [{"role": "user", "content": "你好"}], "stream": True, "model": "a"}
    body |= {"max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{server.root}/v1/chat/completions", json=body, timeout=60)
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert {chunk["model"] for chunk in chunks} == {"a"}
    assert chunks[-1]["glm_foundry"]["adapter"] == "a"


def test_models_lists_base_and_adapters(server, here):
    cards = {card["id"]: card for card in httpx.get(f"{server.root}/v1/models").json()["data"]}
    assert set(cards) == {server.name, "a", "b"}
    assert cards["a"]["parent"] == server.name and cards[server.name]["parent"] is None
    assert cards["a"]["root"] == str(here.adapters["a"])
    assert httpx.get(f"{server.root}/v1/models/a").json() == cards["a"]
    said = error_of(ask(server, model="nobody"), 404)
    assert said == f"there is no model 'nobody' here, only '{server.name}', 'a', 'b'"


def test_loaded_and_unloaded_while_answers_run(server, here):
    """Answers with and without adapters run meanwhile, and none of them changes."""
    found = []

    def keep_asking(name):
        for _ in range(6):
            found.append((name, said_by(server, name)))

    threads = [threading.Thread(target=keep_asking, args=[name]) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        card = load(server, "c", "c")
        assert card.status_code == 200 and card.json()["parent"] == server.name, card.text
        assert said_by(server, "c") == here.said["c"].strip()
        assert unload(server, "c").json() == {"id": "c", "object": "model", "deleted": True}
        assert "no model 'c' here" in error_of(ask(server, model="c"), 404)
    assert len(found) == 18
    for name, text in found:
        assert text == here.said[name].strip()
    assert "no adapter 'c' is loaded" in error_of(unload(server, "c"), 404)


def test_an_unloaded_adapter_answers_to_the_end(server, here):
    assert load(server, "c", here.root / "c").status_code == 200
    replies = []
    asking = threading.Thread(
        target=lambda: replies.append(ask(server, model="c", max_tokens=LONG))
    )
    asking.start()
    wait_for(lambda: any(row.answer.tokens for row in server.service.backend.engine.rows.values()))
    assert unload(server, "c").status_code == 200
    error_of(ask(server, model="c"), 404)
    asking.join()
    text = answer_of(replies[0])
    assert text.strip().startswith(here.said["c"].strip()[:8])
    assert replies[0].json()["usage"]["completion_tokens"] == LONG

    def owners():
        found = set()
        for stack in server.service.backend.engine.adapters._stacks.values():
            found |= set(stack.owners.tolist())
        return found

    wait_for(lambda: len(owners()) == 2)


def test_a_bad_adapter_is_one_line_and_harms_nobody(server, here):
    from safetensors.torch import load_file, save_file

    bad = here.root / "bad"
    file = bad / "adapter_model.safetensors"
    write_adapter(bad, here.model, 7, ["query_key_value"], change=put_nan)
    before = said_by(server, "a")
    assert "are not finite numbers" in error_of(load(server, "bad", "bad"), 400)
    state = load_file(file)
    for name in state:
        if ".lora_A" in name:
            state[name] = state[name][:, :-1].contiguous()
    save_file(state, file)
    assert "does not fit" in error_of(load(server, "bad", "bad"), 400)
    file.write_bytes(os.urandom(2000))
    assert "cannot be read" in error_of(load(server, "bad", "bad"), 400)
    (bad / "adapter_config.json").write_text('{"peft_type": "LORA", "\\ud800": [1]}')
    assert "is not served" in error_of(load(server, "bad", "bad"), 400)
    file.unlink()
    os.mkfifo(file)
    assert "is no regular file" in error_of(load(server, "bad", "bad"), 400)
    assert said_by(server, "a") == before == here.said["a"].strip()
    assert server.service.adapters.names() == ["a", "b"]


def put_nan(state):
    state[min(state)][0, 0] = float("nan")


def test_paths_and_names_are_bounded(server, here):
    outside = here.adapters["a"]
    link = here.root / "link"
    link.symlink_to(outside)
    within = here.root / "within"
    within.mkdir(exist_ok=True)
    (within / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    for path in (outside, "../a", "/etc", "c/../../a", "link", "\0", "c\0"):
        said = error_of(load(server, "x", path), 400)
        assert said.startswith("lora_path must lie within --adapter_dir"), said
    assert "is a link out of --adapter_dir" in error_of(load(server, "x", "within"), 400)
    assert "no such folder within" in error_of(load(server, "x", "nowhere"), 404)
    error_of(load(server, "x", "n" * 1024), 400)
    error_of(load(server, "x", "n" * 1025), 400)
    for name in ("", "a b", "../x", "x" * 65, "é"):
        assert "an adapter's name must be" in error_of(load(server, name, "c"), 400)
    assert "is loaded already" in error_of(load(server, "a", "c"), 409)
    assert "is the served model's name" in error_of(load(server, server.name, "c"), 409)
    for body in ({}, {"lora_name": "x"}, {"lora_name": 3, "lora_path": "c"}):
        assert "must be text" in error_of(post(server, "/v1/load_lora_adapter", **body), 400)
    said = error_of(post(server, "/v1/load_lora_adapter", load_inplace=True), 400)
    assert said.startswith("load_inplace is not supported")
    reply = httpx.post(f"{server.root}/v1/load_lora_adapter", content="{}")
    assert "Content-Type" in error_of(reply, 415)
    assert load(server, "x", "deep/other").status_code == 200
    assert unload(server, "x").status_code == 200


def test_more_than_a_few_waiting_loads_are_busy(server, monkeypatch):
    registry = server.service.adapters
    monkeypatch.setattr(registry, "_waiting", 8)
    reply = load(server, "x", "c")
    assert "8 adapters wait" in error_of(reply, 429) and reply.headers["retry-after"] == "2"


def test_an_unexpected_fault_is_an_error_object(server, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(server.service.backend.engine.adapters, "load", fail)
    assert error_of(load(server, "x", "c"), 500).endswith("could not be loaded: MemoryError")


def test_openapi_has_the_routes(server):
    document = httpx.get(f"{server.root}/openapi.json").json()
    paths = {route.path for route in server.server.config.app.routes}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        said = document["paths"][path]["post"]
        assert path in paths and said["responses"]["409"]["description"] == "The name is taken"
    assert ADAPTER_NAME.fullmatch("a.b-c_1") and not ADAPTER_NAME.fullmatch("a/b")


def test_without_adapter_dir_there_are_no_routes(here):
    with running(
        here.base, "--engine", "static", "--policy", "fifo", "--adapter", f"a={here.adapters['a']}"
    ) as server:
        assert load(server, "c", "c").status_code == 404
        assert said_by(server, "a") == here.said["a"].strip()
        assert "only" in error_of(ask(server, model="b"), 404)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--adapter", "a"], "--adapter must be NAME=DIR, got 'a'"),
        (["--adapter", "a/b=X"], "--adapter a/b: an adapter's name must be 1 to 64"),
        (["--adapter", "a=/nowhere"], "--adapter a: /nowhere is no adapter"),
        (["--adapter_dir", "/nowhere"], "--adapter_dir: no such folder: /nowhere"),
        (["--adapter", "a=A", "--adapter", "a=A"], "--adapter a: an adapter 'a' is loaded already"),
    ],
)
def test_wrong_flags_are_one_line(here, flags, said):
    words = [word.replace("=A", f"={here.adapters['a']}") for word in flags]
    model = ["--model", str(here.base), "--policy", "fcfs", "--device", "cpu"]
    with pytest.raises(ValueError) as raised:
        load_service(parse_flags([*model, *words]))
    assert str(raised.value).startswith(said)


def test_a_loop_of_links_is_outside(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    with pytest.raises((ValueError, FileNotFoundError)):
        folder_within(tmp_path.resolve(), "x")
