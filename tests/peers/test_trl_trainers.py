"""TRL's trainers by a folder's name, in an environment of their own (benchmarks/client_env.py)."""

import json
import math
import subprocess

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.client_env import environment_python
from chatglm import load_model, load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env

QUESTIONS = ["你好", "hello world 今天天气"]
GOOD, BAD = ["世界 hello", "好"], ["天气", "a b c"]


def ids_of(tokenizer, question, answer):
    """(ids of a chat's prompt, of the answer to it with its end token), as fine-tuning has them."""
    family = FAMILIES[tokenizer.family]
    prompt = family.encode_chat(tokenizer, question)
    header = tokenizer.encode_text("\n") if family.roles else []
    end = tokenizer.get_command(family.end_token)
    return prompt, [*header, *tokenizer.encode_text(answer), end]


def log_probabilities(model, tokenizer, answers):
    """Of each answer's tokens."""
    found = []
    for question, answer in zip(QUESTIONS, answers):
        prompt, scored = ids_of(tokenizer, question, answer)
        ids = torch.tensor([prompt + scored])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(1, ids[0, 1:, None])[-len(scored) :])
    return found


def logged(log, name):
    return [line[name] for line in log if name in line]


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_trainers_by_a_folders_name(tiny_folders, family, tmp_path):
    folder = tiny_folders[family]
    script = REPO_ROOT / "tests" / "peers" / "trl_runs.py"
    command = [environment_python("trl"), "-m", "chatglm", script, folder, tmp_path]
    env = child_env(HF_HUB_OFFLINE="1")
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    good = log_probabilities(model, tokenizer, GOOD)
    wanted = -torch.cat(good).mean().item()
    for name in ("sft", "sft packed", "sft without padding"):
        assert logged(found[name], "loss") == pytest.approx([wanted], rel=1e-3), name
    assert logged(found["dpo"], "loss")[0] == pytest.approx(math.log(2), rel=1e-3)
    assert logged(found["dpo"], "loss")[2] < math.log(2)
    bad = log_probabilities(model, tokenizer, BAD)
    for name, answers in (("chosen", good), ("rejected", bad)):
        mean = sum(answer.sum().item() for answer in answers) / len(answers)
        assert logged(found["dpo"], f"logps/{name}")[0] == pytest.approx(mean, rel=1e-3)
    assert logged(found["kto"], "loss")[0] == pytest.approx(0.5, rel=1e-3)
    for name in ("grpo", "rloo"):
        kl = logged(found[name], "kl")
        assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] != 0, name
    losses = logged(found["reward"], "loss")
    assert losses[-1] < losses[0]
    judge = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "reward")).eval()
    scores = []
    for answers in (GOOD, BAD):
        rows = [sum(ids_of(tokenizer, *pair), []) for pair in zip(QUESTIONS, answers)]
        with torch.no_grad():
            scores.append(torch.cat([judge(torch.tensor([row])).logits for row in rows]))
    assert (scores[0] > scores[1]).all()
