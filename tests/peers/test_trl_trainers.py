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


class Trained:
    """A run of trl_runs.py on a family's tiny model.

    Attributes:
        found: {trainer: its log}.
        good, bad: log-probabilities of the answers' tokens by the model that was not trained.
    """

    def __init__(self, folder, place):
        self.folder = folder
        script = REPO_ROOT / "tests" / "peers" / "trl_runs.py"
        command = [environment_python("trl"), "-m", "chatglm", script, folder, place]
        done = subprocess.run(
            list(map(str, command)),
            cwd=place,
            env=child_env(HF_HUB_OFFLINE="1"),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.place = place
        self.found = json.loads((place / "found.json").read_text())
        self.tokenizer = load_tokenizer(folder)
        model = load_model(folder, dtype=torch.float32)
        self.good = log_probabilities(model, self.tokenizer, GOOD)
        self.bad = log_probabilities(model, self.tokenizer, BAD)


@pytest.fixture(scope="module", params=CHATGLM_FAMILIES)
def trained(request, tiny_folders, tmp_path_factory):
    return Trained(tiny_folders[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name", ["sft", "sft packed", "sft without padding"])
def test_sft(trained, name):
    wanted = -torch.cat(trained.good).mean().item()
    assert logged(trained.found[name], "loss") == pytest.approx([wanted], rel=1e-3)


@pytest.mark.slow
@pytest.mark.launch
def test_sft_of_plain_text_as_ids(trained):
    """TRL would write the end token as text, which stays text here."""
    tokenizer, losses = trained.tokenizer, []
    model = load_model(trained.folder, dtype=torch.float32)
    for question, text in zip(QUESTIONS, GOOD):
        prompt = tokenizer(question)["input_ids"]
        answer = [*tokenizer.encode_text(text), tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        losses.append(-scores[-len(answer) :])
    wanted = torch.cat(losses).mean().item()
    assert logged(trained.found["sft of ids"], "loss") == pytest.approx([wanted], rel=1e-3)


@pytest.mark.slow
@pytest.mark.launch
def test_dpo(trained):
    log = trained.found["dpo"]
    assert logged(log, "loss")[0] == pytest.approx(math.log(2), rel=1e-3)
    assert logged(log, "loss")[2] < math.log(2)
    for name, answers in (("chosen", trained.good), ("rejected", trained.bad)):
        mean = sum(answer.sum().item() for answer in answers) / len(answers)
        assert logged(log, f"logps/{name}")[0] == pytest.approx(mean, rel=1e-3)


@pytest.mark.slow
@pytest.mark.launch
def test_kto(trained):
    assert logged(trained.found["kto"], "loss")[0] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_online(trained, name):
    kl = logged(trained.found[name], "kl")
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] != 0


@pytest.mark.slow
@pytest.mark.launch
def test_reward(trained):
    losses = logged(trained.found["reward"], "loss")
    assert losses[-1] < losses[0]
    judge = AutoModelForSequenceClassification.from_pretrained(str(trained.place / "reward")).eval()
    scores = []
    for answers in (GOOD, BAD):
        rows = [sum(ids_of(trained.tokenizer, *pair), []) for pair in zip(QUESTIONS, answers)]
        with torch.no_grad():
            scores.append(torch.cat([judge(torch.tensor([row])).logits for row in rows]))
    assert (scores[0] > scores[1]).all()
