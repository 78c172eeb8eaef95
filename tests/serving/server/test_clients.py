"""Real clients against a real server of tiny random models.

The openai client is of this project's environment; the others have one of their own
(benchmarks/client_env.py) and run only with SLOW=1. benchmarks/client_calls.py has the calls.
"""

import contextlib
import json
import os
import subprocess

import pytest

from benchmarks.client_calls import CALLS, NOT_OFFERED, Target, run_call
from benchmarks.client_env import environment_python
from benchmarks.client_table import CALLS_FILE
from benchmarks.client_table import main as client_table
from tests.causal_folders import make_causal_folder
from tests.serving.server.test_server_faults import running

OURS = [(client, name) for client in ("openai", "http") for name in CALLS[client]]
OTHERS = ("langchain-openai", "instructor", "litellm")
# glm2 has no prompt format for tools; the rest of a chat is its own code path (rounds).
WITHOUT_TOOLS = [name for name in CALLS["openai"] if name.startswith(("chat", "completions"))]


@contextlib.contextmanager
def target_of(folder):
    flags = ["--served_model_name", "m", "--max_batch", 8, "--kv_tokens", 16384]
    with running(folder, *flags, "--max_tokens", 2048, endless=False) as server:
        yield Target(f"{server.root}/v1", "m")


@pytest.fixture(scope="module")
def glm4(tiny_folders):
    with target_of(tiny_folders["glm4"]) as target:
        yield target


@pytest.fixture(scope="module")
def glm2(tiny_folders):
    with target_of(tiny_folders["glm2"]) as target:
        yield target


def check_result(name, result, detail):
    assert result == ("refused" if name in NOT_OFFERED else "ok"), detail


@pytest.mark.parametrize("client, name", OURS)
def test_openai(glm4, client, name):
    check_result(name, *run_call(glm4, client, name))


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_openai_on_a_family_without_tools(glm2, name):
    check_result(name, *run_call(glm2, "openai", name))


@pytest.mark.slow
@pytest.mark.parametrize("client", OTHERS)
def test_other_clients(glm4, client, tmp_path):
    python, out = environment_python("clients"), tmp_path / "found.json"
    words = [python, CALLS_FILE, "--base_url", glm4.base_url, "--model", "m", "--json", out]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*words, "--clients", client], check=True, cwd=tmp_path, env=env, timeout=600)
    found = json.loads(out.read_text())
    assert [line["call"] for line in found] == list(CALLS[client])
    faults = [line for line in found if line["result"] != "ok"]
    assert not faults


@pytest.mark.slow
def test_the_table_in_miniature(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert client_table(["--here", "--clients", "http", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [line["result"] for line in found] == ["ok"] * len(CALLS["http"])
    printed = capsys.readouterr().out
    assert printed.count("| http |") == 3 and "all: 3 calls, 3 ok, 0 refused, 0 wrong" in printed


# ---- lm_eval

DATA = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: ROWS}
test_split: train
"""
TASKS = {  # one of each kind of request of lm_eval
    "tiny_choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["yes", "no"]
""",
    "tiny_written": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


def lm_eval_results(folder, target, tokenizer):
    """{task: figures} of lm_eval's own report."""
    rows = [{"question": f"Is {i} a number?", "answer": "yes"} for i in range(6)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        text = DATA.replace("NAME", name).replace("ROWS", str(data)) + task
        (folder / f"{name}.yaml").write_text(text)
    given = f"model=m,base_url={target.base_url}/completions,tokenizer={tokenizer}"
    words = [environment_python("lm_eval"), "-m", "lm_eval", "run", "--model", "local-completions"]
    words += ["--model_args", f"{given},max_length=1024,num_concurrent=2", "--batch_size", 2]
    words += ["--tasks", ",".join(TASKS), "--include_path", folder, "--output_path", folder / "out"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [report] = (folder / "out").rglob("results_*.json")
    return json.loads(report.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_lm_eval(kind, tmp_path):
    """The tokenizer_backend is huggingface (the default here): requests hold token ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_causal_folder(tmp_path / "model", kind)
    with target_of(folder) as target:
        found = lm_eval_results(tmp_path, target, folder)
    assert set(found) == set(TASKS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = words = 0
    for number in range(6):
        question = f"Is {number} a number?"
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else None
        first = tokenizer.eos_token_id if first is None else first
        ids = torch.tensor([[first, *tokenizer.encode(question, add_special_tokens=False)]])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, :-1]
        total += scores.gather(1, ids[0, 1:, None]).sum().item()
        words += len(question.split())
    wanted = 2.718281828459045 ** (-total / words)
    assert found["tiny_rolling"]["word_perplexity,none"] == pytest.approx(wanted, rel=1e-3)
