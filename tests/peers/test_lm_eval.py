"""Scores of lm-evaluation-harness beside forward passes with explicit control tokens.

The harness runs in an environment of its own (benchmarks/client_env.py), by python -m chatglm.
References of ChatGLM2, ChatGLM3 and GLM-4 are transformers' GlmForCausalLM and tokenizers on an
exported folder, in a process without this project; ChatGLM-6B's are SentencePiece's ids with
explicit positions and an explicit mask.
"""

import json
import os
import shutil
import subprocess

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from benchmarks.client_env import environment_python
from chatglm import load_model, load_tokenizer
from chatglm.configuration import ChatGLM1Config
from chatglm.export.folders import export_glm
from chatglm.families import CHATGLM_FAMILIES
from chatglm.modeling_glm import ChatGLM1ForConditionalGeneration
from tests.chatglm.export.outside import run_outside
from tests.conftest import REPO_ROOT

ROWS = 50
NEW = 6  # tokens of an answer, which TASKS and NATIVE name too
CHOICES = ["你好", "world a"]
DATA = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: ROWS}
test_split: train
"""
TASKS = {
    "tiny_choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["你好", "world a"]
""",
    "tiny_rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
    "tiny_written": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}
# For a context and what follows it, {context or "": ids, scored: ids} -> their log-likelihood.
NATIVE = """
import json
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

folder, rows = sys.argv[1:]
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
start = [tokenizer.token_to_id("[gMASK]"), tokenizer.token_to_id("<sop>")]
assert None not in start


def encode(text):
    return tokenizer.encode(text, add_special_tokens=False).ids


scores, greedy = [], []
for context, scored in json.load(open(rows, encoding="utf-8")):
    whole, count = start + encode(context + scored), len(start + encode(context))
    ids = torch.tensor([whole])
    with torch.no_grad():
        found = model(ids).logits[0, :-1].log_softmax(-1)
    scores.append(found.gather(1, ids[0, 1:, None])[count - 1 :].sum().item())
    prompt = torch.tensor([start + encode(context)])
    answer = model.generate(prompt, do_sample=False, max_new_tokens=6)[0, count:].tolist()
    greedy.append(answer)
print(json.dumps([scores, greedy]))
"""


def questions():
    return [f"hello world {i} 今天天气" + " 你好" * (i % 3) for i in range(ROWS)]


def harness(folder, place, *words):
    """{task: samples} of a run of the harness on a model's folder."""
    data = place / "rows.jsonl"
    lines = []
    for i, question in enumerate(questions()):
        lines.append(json.dumps({"question": question, "answer": CHOICES[i % 2]}) + "\n")
    data.write_text("".join(lines), encoding="utf-8")
    for name, task in TASKS.items():
        text = DATA.replace("NAME", name).replace("ROWS", str(data)) + task
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [environment_python("lm_eval"), "-m", "chatglm", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    command += ["--batch_size", 4, "--tasks", ",".join(TASKS), "--include_path", place]
    command += ["--output_path", place / "out", "--log_samples", *words]
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "cache"),
    }
    env["PYTHONPATH"] = str(REPO_ROOT)
    done = subprocess.run(
        list(map(str, command)), cwd=place, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in TASKS:
        [file] = (place / "out").rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        found[name] = sorted(samples, key=lambda sample: sample["doc_id"])
    return found


def pairs():
    """(context, scored) as the harness gives them: a space before what follows a context."""
    found = []
    for question in questions():
        found += [(question, f" {choice}") for choice in CHOICES]
    return found + [("", question) for question in questions()]


def native_scores(folder, place):
    """Log-likelihoods of `pairs`, and greedy ids after their contexts."""
    export_glm(str(folder), place / "native")
    rows = place / "pairs.json"
    rows.write_text(json.dumps(pairs()), encoding="utf-8")
    return json.loads(run_outside(NATIVE, place, place / "native", rows))


class ByHand:
    """A ChatGLM-6B by SentencePiece's ids, with explicit positions and an explicit mask."""

    def __init__(self, folder):
        config = ChatGLM1Config.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
        self.model = ChatGLM1ForConditionalGeneration(config).eval()
        state = load_file(folder / "model.safetensors")
        lost = self.model.load_state_dict(state, strict=False).missing_keys
        assert lost in ([], ["lm_head.weight"])
        self.model.tie_weights()
        self.pieces = sentencepiece.SentencePieceProcessor(str(folder / "ice_text.model"))
        self.marks = [self.pieces.piece_to_id(mark) for mark in ("[gMASK]", "<sop>")]

    @torch.no_grad()
    def logits(self, start, answer):
        """Of every place of: start, [gMASK], <sop>, answer."""
        ids = torch.tensor([start + self.marks + answer])
        before, count = len(start) + 1, len(answer) + 1
        place = [*range(before), *[before - 1] * count]
        block = [*[0] * before, *range(1, count + 1)]
        visible = torch.ones(before + count, before + count).tril().bool()
        visible[:, :before] = True
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        positions = torch.tensor([[place, block]])
        return self.model(ids, attention_mask=mask[None, None], position_ids=positions).logits[0]

    def score(self, context, scored):
        start = self.pieces.encode(context) if context else []
        answer = self.pieces.encode(scored.removeprefix(" "))
        found = self.logits(start, answer)[-len(answer) - 1 : -1].log_softmax(-1)
        return found.gather(1, torch.tensor(answer)[:, None]).sum().item()

    def answer(self, context):
        start, answer = self.pieces.encode(context), []
        while len(answer) < NEW and self.pieces.piece_to_id("<eop>") not in answer:
            answer.append(self.logits(start, answer)[-1].argmax().item())
        return answer


def untied(folder, output):
    """A ChatGLM-6B with a random output layer: tied, the tiny one repeats <sop>."""
    shutil.copytree(folder, output)
    (output / "checksums.json").unlink(missing_ok=True)
    model = load_model(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(weight)
    model.config.tie_word_embeddings = False
    model.save_pretrained(output)
    return output


class Scored:
    """What the harness finds on a family's tiny model, and the same by hand.

    Attributes:
        tasks: {task: its samples}.
        scores: log-likelihoods of `pairs`.
        answers: greedy ids after each question.
    """

    def __init__(self, folder, place):
        self.tokenizer = load_tokenizer(folder)
        is_glm = self.tokenizer.family == "glm"
        if is_glm:
            folder = untied(folder, place / "untied")
        self.tasks = harness(folder, place)
        if is_glm:
            model = ByHand(folder)
            self.scores = [model.score(*pair) for pair in pairs()]
            self.answers = [model.answer(question) for question in questions()]
        else:
            self.scores, answers = native_scores(folder, place)
            self.answers = answers[: 2 * ROWS : 2]


@pytest.fixture(scope="module", params=CHATGLM_FAMILIES)
def scored(request, tiny_folders, tmp_path_factory):
    return Scored(tiny_folders[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_choices(scored):
    found = []
    for sample in scored.tasks["tiny_choices"]:
        found += [float(resp[0][0]) for resp in sample["resps"]]
    assert len(found) == 2 * ROWS
    assert found == pytest.approx(scored.scores[: 2 * ROWS], rel=1e-4, abs=1e-3)


@pytest.mark.slow
def test_rolling(scored):
    found = []
    for sample in scored.tasks["tiny_rolling"]:
        [[total]] = sample["resps"]
        found.append(float(total[0] if isinstance(total, list) else total))
    assert len(found) == ROWS
    assert found == pytest.approx(scored.scores[2 * ROWS :], rel=1e-4, abs=1e-3)


@pytest.mark.slow
def test_written_answers(scored):
    """The end token's text is empty, and every text holds an empty text: none ends at once."""
    texts = [sample["resps"][0][0] for sample in scored.tasks["tiny_written"]]
    wanted = []
    for ids in scored.answers:
        wanted.append(scored.tokenizer.decode(ids, skip_special_tokens=True).split(".")[0])
    assert max(map(len, scored.answers)) == NEW and max(map(len, texts)) > 2
    assert texts == wanted
