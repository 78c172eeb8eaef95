"""The engine vllm: a real vLLM under our scheduler, and what is refused before it starts."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from chatglm import load_model, load_tokenizer
from finetune.placing import ReplicaSpec, StageSpec
from serving.batch.command import main as answer_files
from serving.engines import Sampling
from serving.engines.runner import EngineRunner
from serving.engines.stage_reports import ModelLoading
from serving.engines.vllm_engine import refuse_sampling, sampling_fields
from serving.policies.continuous import POLICIES
from serving.replicas.served_model import ServedModel
from serving.replicas.vllm_serving import open_vllm, server_words, with_parallel_sizes
from serving.request import Limits, Request
from tests.conftest import REPO_ROOT
from tests.peers.vllm_folders import draw_prompts, made_python, make_release

LIMITS = Limits(max_batch=4, kv_tokens=4096, max_tokens=256)
EAGER = ("--enforce-eager",)
TOKENS = 12


def served(folder, **fields):
    return ServedModel(ModelLoading(str(folder), precision="fp32"), engine="vllm", **fields)


def test_words_of_the_server():
    words = server_words(served("model", vllm_args=EAGER), LIMITS)
    assert words[:2] == ["--dtype", "float32"] and words[-1] == "--enforce-eager"
    assert words[words.index("--max-num-seqs") + 1] == "4"
    halves = (StageSpec("cuda:0", 0, 14), StageSpec("cuda:1", 14, 28))
    words = with_parallel_sizes(served("model"), [ReplicaSpec(halves)]).vllm_args
    assert words == ("--pipeline-parallel-size", "2")
    words = with_parallel_sizes(served("model"), [ReplicaSpec(halves[:1])] * 2).vllm_args
    assert words == ("--pipeline-parallel-size", "1", "--data-parallel-size", "2")
    with pytest.raises(ValueError, match="replicas that are alike"):
        with_parallel_sizes(served("model"), [ReplicaSpec(halves), ReplicaSpec(halves[:1])])


def test_sampling_as_vllm_takes_it():
    fields = sampling_fields(Sampling(temperature=1e-9, seed=3, logit_bias=((5, -1.0),)))
    assert fields["temperature"] == 0 and fields["seed"] == 3
    assert fields["logit_bias"] == {"5": -1.0}
    for sampling, what in (
        (Sampling(logprobs=1), "logprobs"),
        (Sampling(embeds=True), "embeddings"),
        (Sampling(bad_words=((3,),)), "bad_words"),
    ):
        with pytest.raises(ValueError, match=f"--engine vllm has no {what}"):
            refuse_sampling(sampling)


def test_what_is_refused_before_a_server_starts(tiny_folders, tmp_path):
    with pytest.raises(ValueError, match="ChatGLM-6B, for which vLLM has no class"):
        open_vllm(served(tiny_folders["glm"]), LIMITS)
    with pytest.raises(ValueError, match="--policy s3 makes static batches"):
        open_vllm(served(tiny_folders["glm2"], policy="s3"), LIMITS)
    with pytest.raises(ValueError, match="whole model's folder"):
        open_vllm(served(tmp_path), LIMITS)
    nothing = served(tiny_folders["glm2"], vllm_python=str(tmp_path / "python"))
    with pytest.raises(ValueError, match="wanted a python that has vLLM"):
        open_vllm(nothing, LIMITS)
    config = json.loads((tiny_folders["glm3"] / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    with pytest.raises(ValueError, match="int4 weights"):
        open_vllm(served(tmp_path), LIMITS)


# ---- with a real vLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made_python()
    return make_release(tmp_path_factory.mktemp("release"), "glm3-32k")


@pytest.fixture(scope="module")
def backend(folder):
    opened = served(folder, vllm_python=str(made_python()), vllm_args=EAGER)
    engine = open_vllm(opened, LIMITS)
    runner = EngineRunner(engine, POLICIES["fcfs"], closes_engine=True)
    events = []
    runner.start(events.append, lambda: None)
    yield runner
    assert runner.stop(60)
    assert engine.server.process.poll() is not None


def ask(backend, number, prompt, **sampling):
    request = Request(number, len(prompt), backend.clock.now_s(), 60.0)
    answer = backend.submit(request, prompt, Sampling(**sampling))
    backend.enqueue(request)
    return answer


@pytest.mark.slow
def test_greedy_answers_are_ours(backend, folder):
    prompts = draw_prompts(3)
    answers = []
    for number, prompt in enumerate(prompts):  # more than run at once
        answers.append(ask(backend, number, prompt, max_new_tokens=TOKENS))
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.wait(120), answer.tokens
        wanted = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS)
        assert answer.tokens == wanted[0, len(prompt) :].tolist()
        stops = answer.tokens[-1] in tokenizer.stop_ids
        assert answer.reason == ("stop" if stops else "length"), answer.refusal
    deadline = time.monotonic() + 30
    while backend.count() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert backend.count() == 0


@pytest.mark.slow
def test_seeds_limits_and_cancelling(backend):
    prompt = draw_prompts(0)[1]
    options = {"temperature": 1.0, "seed": 5, "max_new_tokens": TOKENS, "ignore_stops": True}
    first, second = ask(backend, 101, prompt, **options), ask(backend, 102, prompt, **options)
    assert first.wait(60) and second.wait(60) and first.tokens == second.tokens
    cut = ask(backend, 103, prompt, ignore_stops=True)
    assert cut.wait(120) and cut.reason == "cut"
    assert len(cut.tokens) == LIMITS.max_tokens - len(prompt)
    left = ask(backend, 104, prompt, ignore_stops=True)
    next(iter(left))
    backend.cancel(104)
    assert left.wait(5) and left.reason == "cancelled"
    with pytest.raises(ValueError, match="takes none"):
        ask(backend, 105, prompt, adapter="a")


SERVE = """
import sys, time
from serving.engines.vllm_process import VllmServer
server = VllmServer(sys.argv[1], python=sys.argv[2], words=["--enforce-eager"])
print(server.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_server_leaves_no_vllm(folder):
    words = [sys.executable, "-c", SERVE, str(folder), str(made_python())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.slow
def test_the_server_on_vllm(folder, tmp_path):
    """serving.server --engine vllm: chats as the continuous engine answers them, and refusals."""
    words = ["--model", folder, "--engine", "vllm", "--vllm_python", made_python(), "--port", "0"]
    words += ["--policy", "fcfs", "--precision", "fp32", "--max_batch", "4", "--no_page"]
    words += ["--max_tokens", "256", "--kv_tokens", "2048", "--vllm_args=--enforce-eager"]
    command = [sys.executable, "-m", "serving.server", *map(str, words)]
    errors = (tmp_path / "errors").open("w")
    process = subprocess.Popen(
        command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next((line for line in lines if "http://127.0.0.1:" in line), "")
        assert address, (tmp_path / "errors").read_text()
        url = f"{re.search('http://127.0.0.1:[0-9]+', address)[0]}/v1/chat/completions"
        messages = [{"role": "user", "content": "你好 <|user|> world"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS}
        reply = httpx.post(url, json=body, timeout=300)
        assert reply.status_code == 200, reply.text
        refused = httpx.post(url, json=body | {"logprobs": True}, timeout=60)
        assert refused.status_code == 400 and "--engine vllm has no logprobs" in refused.text
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.terminate()
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.communicate()
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    model = load_model(folder, dtype=torch.float32)
    wanted = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :]
    found = reply.json()
    assert found["usage"]["prompt_tokens"] == ids.shape[1]
    ends = wanted[-1].item() in tokenizer.stop_ids
    assert found["choices"][0]["finish_reason"] == ("stop" if ends else "length")
    assert found["glm_foundry"]["output_tokens"] == len(wanted) - ends


def vllm_children() -> set[str]:
    """The process ids of vLLM among this process's children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {child for child in children if "vllm" in Path(f"/proc/{child}/cmdline").read_text()}


@pytest.mark.slow
def test_rows_of_files_on_vllm(folder, tmp_path):
    """serving.batch --engine vllm: the answers of the continuous engine, and no vLLM left."""
    before = vllm_children()  # of this module's other tests
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "你好"}\n{"prompt": "hello world", "max_tokens": 5}\n', "utf-8")
    lines = {}
    for engine in ("continuous", "vllm"):
        output = tmp_path / f"{engine}.jsonl"
        words = ["--model", folder, "--input", rows, "--output", output, "--engine", engine]
        words += ["--precision", "fp32", "--max_new_tokens", TOKENS, "--max_tokens", 256]
        if engine == "vllm":
            words += ["--vllm_python", made_python(), "--vllm_args=--enforce-eager"]
        else:
            words += ["--device", "cpu"]
        assert answer_files([str(word) for word in words]) == 0
        lines[engine] = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    for ours, theirs in zip(lines["continuous"], lines["vllm"], strict=True):
        for key in ("answer", "output_tokens", "finish_reason"):
            assert ours[key] == theirs[key]
    assert len(lines["vllm"]) == 2
    assert vllm_children() <= before
