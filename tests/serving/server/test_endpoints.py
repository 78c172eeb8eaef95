"""Completions, embeddings and responses; several answers to a prompt; own fields of requests.

Driven by the openai client over tiny random models of every family; the reference is the model.
"""

import base64
import json
import math
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import torch

from chatglm import load_tokenizer
from chatglm.families import RAW_FAMILIES
from finetune.evaluation.inference import load_ready
from tests.causal_folders import make_causal_folder
from tests.serving.server.test_server_faults import running

FAMILIES = ["glm", "glm2", "glm3", "glm4", "llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def server(request, tiny_folders, tmp_path_factory):
    family = request.param
    if family == "llama":
        folder = make_causal_folder(tmp_path_factory.mktemp("llama"), "llama")
    else:
        folder = tiny_folders[family]
    words = ("--max_tokens", "200", "--served_model_name", "m", "--max_batch", "4")
    with running(folder, *words) as found:
        url = f"{found.root}/v1"
        found.client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
        found.family = family
        found.tokenizer = load_tokenizer(folder)
        found.model = load_ready(folder, device="cpu", precision="fp32").eval()
        yield found


def raw_ids(server, text: str) -> list[int]:
    family = RAW_FAMILIES[server.tokenizer.family]
    return family.encode_chat(server.tokenizer, text)


def greedy(server, prompt: list[int], tokens: int) -> list[int]:
    out = server.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=[10**9],
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def complete(server, prompt, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return server.client.completions.create(model="m", prompt=prompt, **options)


def post(server, path, **body):
    return httpx.post(f"{server.root}/v1/{path}", json=body, timeout=60)


# ---- completions


def test_texts_and_token_ids_are_gone_on_with(server):
    prompt = "list river"
    ids = raw_ids(server, prompt)
    reply = complete(server, [prompt, "lamp"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text
    made = greedy(server, ids, 8)
    whole = server.tokenizer.decode(ids + made, skip_special_tokens=True)
    before = server.tokenizer.decode(ids, skip_special_tokens=True)
    assert reply.choices[0].text == whole[len(before) :]
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == len(ids) + len(raw_ids(server, "lamp"))
    assert reply.usage.completion_tokens == 4 * 8
    assert complete(server, ids).choices[0].text == reply.choices[0].text
    assert complete(server, [ids, ids]).choices[1].text == reply.choices[0].text
    short = server.client.completions.create(model="m", prompt=prompt, temperature=0)
    assert short.usage.completion_tokens == 16  # OpenAI's default


def test_a_stream_gives_the_same_text(server):
    prompts = ["list river", "lamp list"]
    whole = complete(server, prompts, echo=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(server, prompts, echo=True, **options))
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("list river") and texts[1].startswith("lamp list")
    assert reasons == ["length", "length"]
    assert chunks[-1].usage.completion_tokens == 16


def test_prompts_have_log_probabilities(server):
    """As lm-evaluation-harness asks for them: ids, echo, logprobs 1, one token."""
    ids = raw_ids(server, "list river lamp list")
    if server.family == "glm":
        reply = post(server, "completions", prompt=ids, echo=True, logprobs=1, max_tokens=1)
        assert reply.status_code == 400 and "both directions" in reply.text
        return
    with torch.inference_mode():
        wanted = server.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    for tokens in (1, 0):
        reply = complete(server, ids, echo=True, logprobs=1, max_tokens=tokens)
        found = reply.choices[0].logprobs
        assert len(found.tokens) == len(ids) + tokens
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for place in range(1, len(ids)):
            value = float(wanted[place - 1, ids[place]])
            assert found.token_logprobs[place] == pytest.approx(value, abs=1e-3)
            likeliest = max(found.top_logprobs[place].values())
            assert likeliest == pytest.approx(float(wanted[place - 1].max()), abs=1e-3)
        assert reply.usage.completion_tokens == tokens
        assert found.text_offset == sorted(found.text_offset)
    chunks = list(complete(server, ids, echo=True, logprobs=1, max_tokens=1, stream=True))
    streamed = []
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.tokens
    assert (
        streamed
        == complete(server, ids, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs.tokens
    )


def test_an_end_token_has_its_log_probability(server):
    """lm-evaluation-harness leaves out the last entry, whatever it is."""
    ids = raw_ids(server, "list river")
    [token] = greedy(server, ids, 1)
    engine = server.service.backend.engine
    before, engine.stop_ids = engine.stop_ids, frozenset([token])
    try:
        reply = complete(server, ids, max_tokens=4, logprobs=1)
    finally:
        engine.stop_ids = before
    choice = reply.choices[0]
    assert choice.text == "" and choice.finish_reason == "stop"
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 1
    assert reply.usage.completion_tokens == 0


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "prompt is required"),
        ({"prompt": []}, "prompt must be 1 to 128"),
        ({"prompt": [["x"]]}, "token ids from 0"),
        ({"prompt": [10**8]}, "token ids must be below"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, or 0 with echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "best_of": 2}, "best_of must be n, which is 1"),
        ({"prompt": "x", "messages": []}, "messages is not supported"),
        ({"prompt": "list " * 300}, "leaves no room"),
        ({"prompt": ["x"] * 128, "n": 128}, "a request may ask for"),
    ],
)
def test_what_is_refused_of_completions(server, body, message):
    reply = post(server, "completions", **body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "path, methods",
    [
        ("completions", "POST"),
        ("models", "GET, HEAD"),
        ("predictor", "GET, HEAD, POST"),
    ],
)
def test_another_method_is_told_all_that_there_are(server, path, methods):
    reply = httpx.options(f"{server.root}/v1/{path}")
    assert reply.status_code == 405 and reply.headers["allow"] == methods


# ---- several answers


def chat(server, text="list river lamp", **options):
    options = {"max_tokens": 8} | options
    messages = [{"role": "user", "content": text}]
    return server.client.chat.completions.create(model="m", messages=messages, **options)


def test_n_answers_are_sampled_by_seeds_that_count_up(server):
    reply = chat(server, n=3, seed=5, temperature=1.0)
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for number, text in enumerate(texts):
        alone = chat(server, seed=5 + number, temperature=1.0)
        assert alone.choices[0].message.content == text
    assert reply.usage.completion_tokens == 24
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    assert len(reply.glm_foundry["answers"]) == 3 and reply.glm_foundry["output_tokens"] == 24
    streamed = ["", "", ""]
    for chunk in chat(server, n=3, seed=5, temperature=1.0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_a_report_says_when_the_answer_left_the_queue(server):
    report = chat(server, extra_body={"slo_s": 50, "priority": -3}).glm_foundry
    assert 0 <= report["queue_s"] <= report["latency_s"] < 50
    assert report["in_time"] is True and report["slo_s"] == 50
    late = chat(server, extra_body={"slo_s": 1e-6}).glm_foundry
    assert late["in_time"] is False
    refused = post(server, "completions", prompt="x", priority=10**6)
    assert refused.status_code == 400 and "priority must be" in refused.text


def test_banned_words_do_not_come(server):
    """A token that a bias brings everywhere comes no more; other requests still get it."""
    token = server.tokenizer.encode_text("list river")[-1]
    word = server.tokenizer.decode([token]).strip()
    options = {"logit_bias": {str(token): 100.0}, "temperature": 0, "max_tokens": 6}
    assert complete(server, "list", **options).choices[0].text.count(word) == 6
    reply = complete(server, "list", **options, extra_body={"bad_words": [word]})
    assert word not in reply.choices[0].text
    assert complete(server, "list", **options).choices[0].text.count(word) == 6


# ---- embeddings


def test_embeddings_are_the_mean_states(server):
    texts = ["list river", "lamp"]
    reply = server.client.embeddings.create(model="m", input=texts)
    plain = post(server, "embeddings", input=texts, encoding_format="float").json()
    for number, text in enumerate(texts):
        ids = torch.tensor([raw_ids(server, text)])
        with torch.inference_mode():
            states = server.model.base_model(input_ids=ids).last_hidden_state[0]
        wanted = states.float().mean(0)
        wanted = wanted / wanted.norm()
        found = np.array(reply.data[number].embedding)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
        np.testing.assert_allclose(plain["data"][number]["embedding"], found, atol=1e-6)
    assert reply.usage.prompt_tokens == sum(len(raw_ids(server, text)) for text in texts)
    packed = post(server, "embeddings", input="lamp", encoding_format="base64").json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, reply.data[1].embedding, atol=1e-6)
    assert math.isclose(np.linalg.norm(vector), 1, abs_tol=1e-5)
    wrong = post(server, "embeddings", input="x", dimensions=3)
    assert wrong.status_code == 400 and "dimensions is not supported" in wrong.text


# ---- responses


def test_a_response_is_a_chats_answer(server):
    asked = {"temperature": 0, "max_output_tokens": 8}
    reply = server.client.responses.create(model="m", input="list river lamp", **asked)
    text = chat(server, temperature=0).choices[0].message.content
    assert reply.output_text == text and reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage.output_tokens == 8 and reply.instructions is None
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "list river"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "lamp", "annotations": []}],
        },
        {"role": "user", "content": "river"},
    ]
    told = server.client.responses.create(model="m", input=items, instructions="list", **asked)
    messages = [
        {"role": "system", "content": "list"},
        {"role": "user", "content": "list river"},
        {"role": "assistant", "content": "lamp"},
        {"role": "user", "content": "river"},
    ]
    options = {"temperature": 0, "max_tokens": 8}
    same = server.client.chat.completions.create(model="m", messages=messages, **options)
    assert told.output_text == same.choices[0].message.content


def test_a_responses_stream_has_openais_events(server):
    asked = {"temperature": 0, "max_output_tokens": 8, "input": "list river lamp"}
    events = list(server.client.responses.create(model="m", stream=True, **asked))
    whole = server.client.responses.create(model="m", **asked).output_text
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole
    assert events[-1].response.output_text == whole
    with server.client.responses.stream(model="m", **asked) as stream:
        for _ in stream:
            pass


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "input is required"),
        ({"input": []}, "input must be a text"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type must be message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "must be text"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id is not"),
        ({"input": "x", "text": 3}, "text must be an object"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0] must be an object of"),
    ],
)
def test_what_is_refused_of_responses(server, body, message):
    reply = post(server, "responses", **body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]


def test_calls_go_through_responses(tiny_folders):
    """A call and its output in the input; the tools of the request."""
    from serving.server.responses import parse_response

    tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
    items = [
        {"role": "user", "content": "?"},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "x"}'},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]
    asked = parse_response({"input": items, "tools": [tool], "tool_choice": "auto"})
    roles = [message.role for message in asked.messages]
    assert roles == ["user", "assistant", "observation"]
    assert asked.messages[1].calls[0]["function"]["arguments"] == {"city": "x"}
    assert asked.shown_tools[0]["function"]["name"] == "weather"


def test_a_responses_stream_of_a_call(tiny_folders):
    import asyncio

    from serving.server.responses import ResponsesResponse, parse_response
    from serving.server.service import AnswerGroup
    from tests.serving.server.test_tools import WEATHER, call_text, ids_of

    tokenizer = load_tokenizer(tiny_folders["glm4"])
    ids = ids_of(tokenizer, call_text(tokenizer, {"city": "x"}))
    function = WEATHER["function"]
    asked = parse_response({"input": "?", "tools": [{"type": "function", **function}]})
    answer = SimpleNamespace(id=0, reason="stop", tokens=ids, prompt=[], logprobs=[])
    active = SimpleNamespace(answer=answer, request=SimpleNamespace(prompt_tokens=3))
    tokens = asyncio.Queue()
    for token in [*ids, tokenizer.stop_ids[0], None]:
        tokens.put_nowait((0, token))
    service = SimpleNamespace(
        tokenizer=tokenizer,
        backend=SimpleNamespace(stop_ids=frozenset(tokenizer.stop_ids)),
        name="m",
        report=lambda _: {},
        length=lambda _: len(ids),
        cancel=lambda _: None,
        release=lambda _: None,
    )

    async def receive():
        await asyncio.sleep(60)

    async def lines():
        http = SimpleNamespace(receive=receive)
        response = ResponsesResponse(service, asked, AnswerGroup([active], tokens), http)
        return [line async for line in response.events()]

    events = [json.loads(line.split("data: ")[1]) for line in asyncio.run(lines())]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    [item] = events[-1]["response"]["output"]
    assert item["name"] == function["name"] and json.loads(item["arguments"]) == {"city": "x"}


def test_embeddings_are_no_answers_in_the_log(tiny_folders, tmp_path):
    """predictor.update would take their one token for an answer's length."""
    log = tmp_path / "log.jsonl"
    with running(tiny_folders["glm2"], "--log", log, "--log_prompts") as server:
        assert post(server, "embeddings", input=["x", "y"]).status_code == 200
        reply = post(server, "completions", prompt="list river", max_tokens=3)
        assert reply.status_code == 200
    [line] = log.read_text().splitlines()
    assert json.loads(line)["output_tokens"] == 3 and json.loads(line)["prompt"] == "list river"
