"""--task reward and --task dpo: rows, losses, references, and what is learnt."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from benchmarks.preferences import make_advice
from chatglm import kernels, load_model
from chatglm.kernels import OutputLayer
from finetune import score
from finetune.preference.dpo import PreferenceTraining
from finetune.preference.formats import (
    PREFERENCE_FORMATS,
    Preference,
    PreferenceReader,
    preference_format,
)
from finetune.preference.losses import LOSSES, Answers, make_loss
from finetune.preference.policy_loss import PreferenceLoss
from finetune.preference.reference import REFERENCE_FILE, reference_key, switched_off
from finetune.preference.reward import RewardTraining
from finetune.rows.arrays import EncodedRow, dataset_of
from finetune.rows.formats import BadRow
from finetune.rows.groups import RowGroups
from tests.conftest import REPO_ROOT, shared_file
from tests.finetune.runs import metrics, write_rows
from tests.finetune.tasks import CASES, last_metrics, make_pairs, parse, run, task_flags

SAMPLES = {  # of each format: a row, its pairs, and the turns before its answer
    "conversations": {
        "conversations": [{"from": "human", "value": "水泵漏油"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": "坏",
    },
    "prompt_pair": {"prompt": "水泵漏油", "chosen": "好", "rejected": "坏"},
    "instruction_pair": {"instruction": "水泵漏油", "chosen": "好", "rejected": "坏"},
    "question_pair": {
        "question": "水泵漏油",
        "response_chosen": "好",
        "response_rejected": "坏",
        "history": [["你好", "您好"]],
        "system": "简短",
    },
    "scored_answers": {
        "prompt": "水泵漏油",
        "answers": [{"answer": "坏", "score": 0}, {"answer": "好", "score": 2}],
    },
    "labelled_messages": {
        "messages": [
            {"role": "user", "content": "水泵漏油"},
            {"role": "assistant", "content": "好"},
        ],
        "label": True,
    },
    "labelled_completion": {"prompt": "水泵漏油", "completion": "好", "label": True},
    "whole_pair": {
        "chosen": [
            {"role": "user", "content": "水泵漏油"},
            {"role": "assistant", "content": "好"},
        ],
        "rejected": [
            {"role": "user", "content": "水泵漏油"},
            {"role": "assistant", "content": "坏"},
        ],
    },
}


# ---- rows


@pytest.mark.parametrize("name", PREFERENCE_FORMATS)
def test_formats(name):
    """Every format is found from its keys, and its better answer is the one it says."""
    item = SAMPLES[name]
    assert preference_format(item) == name
    labelled = name.startswith("labelled")
    row = PreferenceReader(pairing="labelled" if labelled else "all").row(item, "f:1")
    assert row.prompt == "水泵漏油" and row.place == "f:1"
    if labelled:
        assert row.labelled() == [(0, 1.0)]
    else:
        ((better, worse),) = row.pairs("all")
        assert (row.answers[better], row.answers[worse]) == ("好", "坏")
    turns = row.with_answer(0).turns
    assert [turn.role for turn in turns] == (
        ["system", "user", "assistant", "user", "assistant"] if name == "question_pair" else []
    )
    assert [turn.loss for turn in turns if turn.role == "assistant"] in ([], [False, True])
    for key in PREFERENCE_FORMATS[name].keys:
        with pytest.raises(BadRow, match=r"^f:1: "):
            PreferenceReader(data_format=name).row({**item, key: 3}, "f:1")
        rest = {k: v for k, v in item.items() if k != key}
        with pytest.raises(BadRow, match=r"^f:1: no key"):
            PreferenceReader(data_format=name).row(rest, "f:1")


def test_the_guide_shows_every_format():
    """docs/preferences.md has a row of each, under its name; both languages have the same code."""
    text = (REPO_ROOT / "docs" / "preferences.md").read_text("utf-8")
    shown = re.findall(r"^(\*\*\w+\*\*.*?)```json\n(.*?)\n```", text, re.DOTALL | re.MULTILINE)
    found = []
    for names, rows in shown:
        formats = [preference_format(json.loads(row)) for row in rows.splitlines()]
        assert formats == re.findall(r"\*\*(\w+)\*\*", names)
        found += formats
    assert set(found) == PREFERENCE_FORMATS.keys() and len(found) == len(PREFERENCE_FORMATS)


def test_the_guide_counts_the_lines():
    """An algorithm is short, and docs/preferences.md says how short."""
    text = (REPO_ROOT / "docs" / "preferences.md").read_text("utf-8")
    counts = {}
    for name in ("losses", "policy_loss", "dpo", "reward"):
        source = (REPO_ROOT / "finetune" / "preference" / f"{name}.py").read_text("utf-8")
        counts[name] = len(source.splitlines())
    assert max(counts.values()) < 200
    for sentence in (
        f"The losses are {counts['losses']} lines",
        f"{counts['policy_loss']} (`policy_loss.py`)",
        f"{counts['dpo']} (`dpo.py`)",
        f"{counts['reward']} (`reward.py`)",
    ):
        assert sentence in " ".join(text.split()), sentence


def test_pairs():
    """All that differ in score, or adjacent ones; RLHF's stale answer after a tie is not kept."""
    row = Preference("q", ("a", "b", "c", "", "b"), "f:1", (), (3.0, 1.0, 1.0, 0.0, 0.0))
    assert row.pairs("all") == [(0, 1), (0, 2), (0, 4), (2, 4)]
    assert row.pairs("adjacent") == [(0, 1)]
    assert Preference("q", ("a", "b", "c"), "f:1", (), (0.0, 2.0, 1.0)).pairs("adjacent") == [
        (1, 2),
        (2, 0),
    ]
    assert row.labelled() == [(0, 1.0), (4, 0.0)]
    assert Preference("q", ("a",), "f:1", (), (0.0,)).labelled() == [(0, 0.0)]


@pytest.mark.parametrize(
    "item, said",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "wanted two different answers"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "wanted two different answers"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": "q", "answers": [{"answer": "a", "score": "x"}]}, '"score" must be a number'),
        ({"prompt": "q", "answers": [{"answer": "a"}, {"answer": "b"}]}, "of the scores 0, 0"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            '"chosen" must have the higher score, got 1 and 2',
        ),
        (SAMPLES["labelled_messages"], "wanted two different answers"),
        ({"chosen": "a"}, "no format has these keys: chosen"),
        ({"conversations": [], "chosen": "a", "rejected": "b"}, "must be a list of turns"),
        (
            {
                "conversations": [{"from": "gpt", "value": "x"}],
                "chosen": "a",
                "rejected": "b",
            },
            "must end with a question, got assistant",
        ),
        ({"prompt": "q", "chosen": {"role": "user", "content": "a"}, "rejected": "b"}, "an answer"),
        (
            {
                "prompt": "q",
                "answers": [{"answer": "a", "score": 10**400}, {"answer": "b", "score": 10**400}],
            },
            '"score" must be a number of at most',
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": float("inf")},
            '"score" must be a number of at most',
        ),
        (
            {"prompt": [{"role": "user", "content": "q", "tool_calls": 5}]}
            | {"chosen": "a", "rejected": "b"},
            "turn 1: tool calls are not compared",
        ),
        (
            {
                "prompt": "q",
                "chosen": {
                    "role": "assistant",
                    "content": [{"type": "tool_call", "value": "{"}],
                },
                "rejected": "b",
            },
            "a tool call must be JSON, got",
        ),
        ([], "wanted an object, got list"),
        ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "half a surrogate pair"),
    ],
)
def test_bad_rows(item, said):
    with pytest.raises(BadRow, match=r"^f:1: ") as error:
        PreferenceReader().row(item, "f:1")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, rows, pairing",
    [
        ("dpo_zh_demo", 300, "all"),
        ("dpo_en_demo", 300, "all"),
        ("dpo_zh_500", 500, "all"),
        ("kto_en_demo", 300, "labelled"),
    ],
)
def test_real_files(name, rows, pairing):
    lines = shared_file(f"data/preference/{name}.jsonl").read_text("utf-8").splitlines()
    reader = PreferenceReader(pairing=pairing, family="glm2")
    read = [reader.row(json.loads(line), f"{name}:{n}") for n, line in enumerate(lines, 1)]
    assert len(read) == rows
    if pairing == "labelled":
        assert 0 < sum(row.scores[0] for row in read) < rows


def made(task: str, base, folder, *more):
    """A task with its rows loaded."""
    kind = {"dpo": PreferenceTraining, "reward": RewardTraining}[task]
    found = kind(parse(task_flags(task, CASES[task], base, folder, *more)))
    found.load_rows()
    return found


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4", "qwen2"])
def test_conversations_are_compared(bases, tmp_path, family):
    """Only the last answer of a conversation carries loss, the same question stands before both."""
    row = {k: v for k, v in SAMPLES["question_pair"].items()}
    file = write_rows(tmp_path / "c.jsonl", [row, row])
    task = made("dpo", bases[family], tmp_path, "--train_path", file)
    rows, tokenizer = task.data.data, task.tokenizer
    assert len(task.data) == 2
    first, second = rows.n_masked(0), rows.n_masked(1)
    assert first == second and (rows.ids(0)[:first] == rows.ids(1)[:first]).all()
    for number, text in enumerate(("好", "坏")):
        labels = rows.labels(number)
        learnt = rows.ids(number)[first:] if labels is None else labels[labels >= 0]
        decoded = tokenizer.decode(learnt.tolist(), skip_special_tokens=True)
        assert decoded.strip().endswith(text) and "您好" not in decoded


def test_a_pair_that_was_cut_is_dropped_whole(bases, tmp_path):
    rows = make_pairs(3)
    rows[1]["rejected"] = "漏油" * 200
    file = write_rows(tmp_path / "c.jsonl", rows)
    words = ["--train_path", file, "--is_skip", "True"]
    task = made("reward", bases["glm2"], tmp_path, *words)
    assert len(task.data) == 2 and task.data.skipped == 1
    assert [task.data.place(n).rpartition(":")[2] for n in range(2)] == ["1", "3"]


# ---- log-probabilities and losses


@pytest.mark.parametrize("bias", [False, True])
def test_log_probs_and_their_gradients(monkeypatch, bias):
    """In pieces of a few rows, as log_softmax over whole logits."""
    torch.manual_seed(0)
    layer = OutputLayer(6, 11, bias=bias).double()
    hidden = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 10, 3, -100, 5])
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 2 * 11 * 8)
    weights = torch.randn(7)
    found = layer(hidden, targets, log_probs=True)
    parameters = [hidden, *layer.parameters()]
    gradients = torch.autograd.grad((found * weights).sum(), parameters)
    logits = torch.log_softmax(layer(hidden), -1)
    plain = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    assert torch.allclose(found.double(), plain, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad((plain * weights).sum(), parameters)):
        assert torch.allclose(a, b, atol=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def test_losses_by_hand():
    """Each formula of LOSSES in plain arithmetic."""
    policy, reference, tokens = (-5.0, -9.0), (-6.0, -7.5), (4, 6)
    answers = Answers(torch.tensor([policy]), torch.tensor([reference]), torch.tensor([tokens]))
    h = (policy[0] - reference[0]) - (policy[1] - reference[1])
    mean_h = (policy[0] - reference[0]) / 4 - (policy[1] - reference[1]) / 6
    means = (policy[0] / 4, policy[1] / 6)
    wanted = {
        "sigmoid": -math.log(sigmoid(0.3 * h)),
        "ipo": (mean_h - 1 / 0.6) ** 2,
        "hinge": max(0.0, 1 - 0.3 * h),
        "orpo": -means[0] - 0.3 * math.log(sigmoid(log_odds(means[0]) - log_odds(means[1]))),
    }
    for name, value in wanted.items():
        loss = LOSSES[name](beta=0.3)
        assert loss.losses(answers).tolist() == pytest.approx([value], rel=1e-5), name
    kto = LOSSES["kto"](beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    labelled = Answers(
        torch.tensor([[-5.0], [-9.0]]),
        torch.tensor([[-6.0], [-7.5]]),
        torch.tensor([[4], [6]]),
        torch.tensor([1.0, 0.0]),
        torch.tensor(0.25),
    )
    wanted_kto = [1.5 * (1 - sigmoid(0.3 * 0.75)), 0.5 * (1 - sigmoid(0.3 * (0.25 + 1.5)))]
    assert kto.losses(labelled).tolist() == pytest.approx(wanted_kto, rel=1e-5)
    assert {"kto", *wanted} == LOSSES.keys()


def adapted(task, base):
    """The task's model with an adapter that changes what it says, and the base alone."""
    torch.manual_seed(3)
    model = task.build_model(torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), load_model(base, dtype=torch.float32)


def plain_log_prob(model, ids, first: int) -> torch.Tensor:
    """The log-probability of the ids from `first` on, of one sequence in a plain forward pass."""
    tensor = torch.tensor(np.asarray(ids).astype(np.int64))[None]
    logits = model(input_ids=tensor).logits[0, first - 1 : -1]
    return -F.cross_entropy(logits, tensor[0, first:], reduction="sum")


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("family, method", [("glm", "lora"), ("glm2", "ptuning-v2"),
                                            ("glm2", "ptuning-v1"), ("qwen2", "lora")])  # fmt: skip
def test_loss_and_gradients_are_a_plain_forward_passs(bases, tmp_path, loss_type, family, method):
    """Ragged, with shared prompts and the reference by the switch; an empty place adds nothing."""
    words = ["--loss_type", loss_type, "--per_device_train_batch_size", 3]
    words += ["--lora_module_name", "q_proj,v_proj"] if family == "qwen2" else []
    folder = tmp_path / "f"
    folder.mkdir()
    task = PreferenceTraining(
        parse(task_flags("dpo", CASES["dpo"], bases[family], folder, *words, method=method))
    )
    task.load_rows()
    model, base = adapted(task, bases[family])
    module = PreferenceLoss(model, task.loss).eval()
    rows = task.data.data
    numbers = [0, 1, 2]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = module(scale=0.5, **task.collate(task.data, [*numbers, -1]))
    gradients = torch.autograd.grad(found, trained)

    def log_prob(of, ids, first):
        return plain_log_prob(of, ids, first)

    size = task.group_size
    policy, reference, tokens, liked = [], [], [], []
    for row in range(size * len(numbers)):
        ids, first = rows.ids(row), rows.n_masked(row)
        policy.append(log_prob(model, ids, first))
        with torch.no_grad():
            reference.append(log_prob(base, ids, first) if task.loss.has_reference else
                             torch.zeros(()))  # fmt: skip
        tokens.append(len(ids) - first)
        liked.append(rows.score(row))
    drift = None
    if loss_type == "kto":
        ratios = []
        for row in numbers:
            other = (row + 1) % len(numbers)
            first = rows.n_masked(row)
            ids = [*rows.ids(row)[:first], *rows.ids(other)[rows.n_masked(other) :]]
            with torch.no_grad():
                ratios.append(log_prob(model, ids, first) - log_prob(base, ids, first))
        drift = torch.stack(ratios).mean().clamp(min=0)
    answers = Answers(
        torch.stack(policy).view(-1, size),
        torch.stack(reference).view(-1, size),
        torch.tensor(tokens).view(-1, size),
        torch.tensor(liked) if loss_type == "kto" else None,
        drift,
    )
    plain = 0.5 * make_loss(task.config).losses(answers).sum()
    assert float(found) == pytest.approx(float(plain), rel=1e-4)
    for a, b in zip(gradients, torch.autograd.grad(plain, trained)):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)


def test_answers_to_other_questions_fit_max_len(bases, tmp_path):
    """KTO's drift: a long question with a long answer to another one is cut as rows are."""
    rows = [
        {"prompt": "水泵漏油" * 20, "completion": "好", "label": True},
        {"prompt": "水", "completion": "不用管" * 60, "label": False},
    ]
    file = write_rows(tmp_path / "c.jsonl", rows)
    task = made("dpo", bases["glm2"], tmp_path, "--train_path", file, "--loss_type", "kto")
    batch = task.mismatched(task.data, [0, 1], torch.ones(2))
    assert max(batch["lengths"]) < 96  # of --max_len; a sequence's last token predicts nothing
    assert batch["counts"][0] > 1


@pytest.mark.parametrize("family", ["glm", "glm2", "qwen2"])
def test_reward_loss_is_a_plain_forward_passs(bases, tmp_path, family):
    words = ["--margin", "0.1", "--score_margin", "0.2", "--center", "0.01"]
    words += ["--lora_module_name", "q_proj,v_proj"] if family == "qwen2" else []
    task = made("reward", bases[family], tmp_path, *words)
    torch.manual_seed(3)
    network = task.build_model(torch.float32).eval()
    module = task.loss_module(network).eval()
    trained = [p for p in network.parameters() if p.requires_grad]
    found = module(**task.collate(task.data, [0, 1, -1]))
    gradients = torch.autograd.grad(found, trained)
    scores = []
    for row in range(4):
        ids = torch.tensor(task.data.data.ids(row).astype(np.int64))[None]
        states = network.model.get_base_model().base_model(input_ids=ids).last_hidden_state
        scores.append(network.value_head(states[0, -1])[0])
    better, worse = torch.stack(scores).view(2, 2).unbind(1)
    plain = -F.logsigmoid(better - worse - 0.1 - 0.2) + 0.01 * (better + worse) ** 2
    assert float(found) == pytest.approx(float(plain.sum()), rel=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(plain.sum(), trained)):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


# ---- the reference


def test_switched_off_is_the_base_and_keeps_the_graph(bases, tmp_path):
    task = made("dpo", bases["glm2"], tmp_path)
    model, base = adapted(task, bases["glm2"])
    ids = torch.tensor([task.data.data.ids(0).astype(np.int64)])
    before = model(input_ids=ids).logits
    with torch.no_grad(), switched_off(model):
        off = model(input_ids=ids).logits
    assert torch.equal(off, base(input_ids=ids).logits)
    assert not torch.equal(off, before)
    before.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_prefix_that_does_not_train_is_not_switched_off(bases):
    """Of LoRA on a model with a prefix: it is a part of what the run starts from."""
    model = load_model(bases["glm2"], pre_seq_len=4, dtype=torch.float32).eval()
    model.requires_grad_(False)
    ids = torch.arange(5, 15)[None]
    logits = model(input_ids=ids).logits
    with switched_off(model):
        assert torch.equal(model(input_ids=ids).logits, logits)
    model.transformer.prefix_encoder.requires_grad_(True)
    with torch.no_grad(), switched_off(model):
        assert not torch.equal(model(input_ids=ids).logits, logits)


def test_the_key_of_a_reference_knows_which_rows_are_evaluated():
    """Not only which rows there are in all."""

    def part(start, stop):
        rows = [(f"f:{n}", EncodedRow([n, n + 1], 1, False)) for n in range(start, stop)]
        return RowGroups(dataset_of(rows), np.arange(stop - start + 1))

    keys = [reference_key([part(0, n), part(n, 3)], []) for n in (1, 2)]
    assert keys[0] != keys[1]


def test_a_computed_reference_is_the_switchs(bases, tmp_path, capsys):
    """With --adapter the reference is the adapter as it was: at the start the margin is 0."""
    first = run(task_flags("dpo", CASES["dpo"], bases["glm2"], tmp_path / "a"))
    words = ["--adapter", first, "--learning_rate", "0", "--max_steps", "1"]
    flags = task_flags("dpo", CASES["dpo"], bases["glm2"], tmp_path / "b", *words)
    cut = flags.index("--train_type")
    flags = flags[:cut] + flags[cut + 4 :]  # the adapter says what LoRA is
    folder = run(flags)
    assert "computing the reference's log-probabilities" in capsys.readouterr().out
    assert metrics(tmp_path / "b" / "out") == pytest.approx([math.log(2)], rel=1e-6)
    assert last_metrics(folder)["margin"] == pytest.approx(0, abs=1e-6)
    stored = load_file(tmp_path / "b" / "out" / REFERENCE_FILE)
    assert {name: len(values) for name, values in stored.items()} == {"train": 26, "eval": 10}
    again = run([*flags, "--overwrite_output_dir"])
    assert "computing the reference" not in capsys.readouterr().out and again.name == folder.name
    # of another adapter it is computed anew
    second = run(task_flags("dpo", CASES["dpo"], bases["glm2"], tmp_path / "c", "--seed", "5"))
    folder = run([*flags, "--overwrite_output_dir", "--adapter", str(second)])
    assert "computing the reference's log-probabilities" in capsys.readouterr().out
    assert last_metrics(folder)["margin"] == pytest.approx(0, abs=1e-6)


def test_a_reference_is_that_of_its_prefix(bases, tmp_path):
    """Kept log-probabilities of a model with a P-Tuning prefix are not those of another prefix."""
    case = CASES["finetune"]
    keys = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        words = ["--max_steps", "1", "--seed", seed, "--eval_path="]
        tuned = run(
            task_flags("finetune", case, bases["glm2"], folder, *words, method="ptuning-v2")
        )
        words = ["--model_name_or_path", tuned]
        more = task_flags("dpo", CASES["dpo"], tuned, tmp_path / "dpo", method="ptuning-v2")
        task = PreferenceTraining(parse([*more, *words]))
        task.load_rows()
        assert task.keeps_reference
        keys.append(task.key([task.data]))
    assert keys[0] != keys[1]


# ---- what is learnt


@pytest.mark.parametrize("method", ["lora", pytest.param("all", marks=pytest.mark.slow)])
def test_a_reward_model_learns(bases, tmp_path, method):
    """Accuracy 0.9 on unseen pairs, by the command of scores too."""
    train = write_rows(tmp_path / "t.jsonl", make_advice(200))
    unseen = write_rows(tmp_path / "u.jsonl", make_advice(60, 1))
    words = task_flags("reward", CASES["reward"], bases["glm2"], tmp_path, method=method)
    words += ["--train_path", str(train), "--eval_path", str(unseen), "--max_steps", "20"]
    words += ["--learning_rate", "1e-3" if method == "all" else "5e-3"]
    folder = run([*words, "--per_device_train_batch_size", "10"])
    found = last_metrics(folder)
    print(found)
    assert found["accuracy"] >= 0.9 and found["margin"] > 1
    output = tmp_path / "scores.tsv"
    flags = ["--model_path", folder, "--file", unseen, "--output", output, "--device", "cpu"]
    assert score.main(list(map(str, flags))) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "prompt\tanswer\tscore" and len(lines) == 121
    values = [float(line.split("\t")[2]) for line in lines[1:]]
    right = sum(a > b for a, b in zip(values[::2], values[1::2]))
    assert right / 60 == pytest.approx(found["accuracy"], abs=1e-3)


QUICK_LOSSES = ("sigmoid", "kto")


@pytest.mark.parametrize(
    "loss_type",
    [pytest.param(n, marks=[] if n in QUICK_LOSSES else pytest.mark.slow) for n in LOSSES],
)
def test_a_preference_is_learnt(bases, tmp_path, loss_type):
    """The margin of rewards on unseen pairs grows."""
    train = write_rows(tmp_path / "t.jsonl", make_advice(200))
    unseen = write_rows(tmp_path / "u.jsonl", make_advice(40, 1))
    words = task_flags("dpo", CASES["dpo"], bases["glm2"], tmp_path, "--loss_type", loss_type)
    words += ["--train_path", str(train), "--eval_path", str(unseen), "--max_steps", "24"]
    words += ["--learning_rate", "5e-3", "--lora_module_name", "all-linear", "--eval_step", "8"]
    folder = run([*words, "--per_device_train_batch_size", "16"])
    margins = metrics(tmp_path / "out", "eval_margin")
    print(loss_type, margins, last_metrics(folder))
    assert margins[0] < margins[-1] and margins[-1] > (0.01 if loss_type == "orpo" else 0.3)
    if loss_type != "kto":
        assert last_metrics(folder)["accuracy"] >= 0.9


def test_freeze_ratio(bases, tmp_path):
    """The first half of the layers stays as it is; RLHF reads this flag and never uses it."""
    words = ["--train_type", "freeze", "--freeze_ratio", "0.5", "--max_steps", "1"]
    flags = task_flags("reward", CASES["reward"], bases["glm2"], tmp_path, *words, method="all")
    folder = run(flags)
    base, tuned = (load_model(f, dtype=torch.float32).state_dict() for f in (bases["glm2"], folder))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and not any(".layers.0." in name for name in changed)
    assert any(".layers.1." in name for name in changed)
    assert any("embedding" in name for name in changed)


@pytest.mark.parametrize(
    "task, method, words",
    [
        ("dpo", "lora", ["--ds_file", "ds_zero3_no_offload.json"]),
        ("dpo", "ptuning-v2", ["--precision", "bf16"]),
        ("reward", "lora", ["--precision", "bf16", "--gradient_checkpointing", "True"]),
        pytest.param("dpo", "all", ["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param("reward", "all", ["--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param("dpo", "lora", ["--gradient_checkpointing", "True"], marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_split_or_in_halves(bases, ds_files, tmp_path, task, method, words):
    """The loss falls, and in fp32 it is the plain run's."""
    more = ["--num_train_epochs", 3]
    flags = task_flags(task, CASES[task], bases["glm2"], tmp_path / "a", *more, method=method)
    run([*flags, *[ds_files.get(word, word) for word in words]])
    losses = metrics(tmp_path / "a" / "out")
    assert losses[-1] < losses[0]
    if "bf16" not in words:
        run(task_flags(task, CASES[task], bases["glm2"], tmp_path / "b", *more, method=method))
        assert losses == pytest.approx(metrics(tmp_path / "b" / "out"), rel=1e-4)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_stream_of_pairs(bases, tmp_path, task):
    """Both answers of a pair come together, whichever row it is of."""
    words = ["--streaming", "--max_steps", 4, "--shuffle_buffer", 5]
    found = made(task, bases["glm2"], tmp_path, *words)
    data, order, _ = found.rows_of_step(0, 1, 4, 4)
    assert len(data) == 4 and order.tolist() == [0, 1, 2, 3]
    for group in range(4):
        better, worse = data.rows(group)
        assert data.data.place(better) == data.data.place(worse)
        assert data.data.score(better) > data.data.score(worse)
    run(task_flags(task, CASES[task], bases["glm2"], tmp_path / "run", *words))


@pytest.mark.parametrize(
    "words, said",
    [
        ("dpo --loss_type kto --per_device_train_batch_size 1", "must be at least 2; got 1"),
        ("dpo --loss_type kto --eval_path e --per_device_eval_batch_size 1", "at least 2; got 1"),
        ("dpo --train_type all --streaming", "--streaming needs a reference"),
        ("dpo --adapter a --loss_type kto", "no such"),
        ("dpo --init_lora_weights pissa --loss_type kto", "--loss_type kto needs a reference"),
        ("dpo --beta 0", "--beta must be above 0"),
        ("dpo --desirable_weight 2", "--desirable_weight needs --loss_type kto"),
        ("dpo --loss_type kto --pairs adjacent", "--pairs needs another --loss_type"),
        ("dpo --batching padded", "--batching ragged; got padded"),
        ("dpo --margin 1", "unrecognized arguments: --margin"),
        ("reward --center=-1", "--center must be a number not below 0"),
        ("reward --prompt_text x", "--prompt_text needs another --task"),
        ("reward --columns chosen=a,output=b", "--columns wants"),
    ],
)
def test_refused(capsys, words, said):
    with pytest.raises(SystemExit):
        parse(f"--model_name_or_path m --train_path t --task {words}".split())
    assert said in capsys.readouterr().err


def test_scores(bases, tmp_path, capsys):
    """Rows of questions and answers have scores too; a folder without a head is one line."""
    folder = run(task_flags("reward", CASES["reward"], bases["glm3"], tmp_path, "--max_steps", "1"))
    rows = [{"prompt": "水泵漏油", "response": "换油封"}, SAMPLES["question_pair"]]
    rows += [SAMPLES["labelled_completion"]]
    file = write_rows(tmp_path / "r.jsonl", rows)
    output = tmp_path / "s.jsonl"
    flags = ["--model_path", folder, "--file", file, "--output", output, "--device", "cpu"]
    scores = []
    for batch in ("1", "8"):
        assert score.main([*map(str, flags), "--batch_size", batch]) == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["answer"] for line in lines] == ["换油封", "好", "坏", "好"]
        found = [line["score"] for line in lines]
        assert len(set(found)) > 1
        scores.append(pytest.approx(found, abs=1e-5))
    assert scores[0] == scores[1].expected
    assert "4 answers to 3 questions" in capsys.readouterr().out
    assert score.main(["--model_path", str(bases["glm3"]), "--file", str(file)]) == 1
    assert "is no reward model: it has no reward.json" in capsys.readouterr().err
    head = folder / "value_head.safetensors"
    save_file({"weight": load_file(head)["weight"] * float("nan")}, head)
    (folder / "checksums.json").unlink()
    assert score.main(list(map(str, flags))) == 1
    assert "r.jsonl:1: wanted a finite score, got nan" in capsys.readouterr().err
    assert output.read_text().splitlines()[0] == json.dumps(lines[0], ensure_ascii=False)
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    assert score.main(["--model_path", str(folder), "--file", str(tmp_path / "bad.jsonl")]) == 1
    assert "bad.jsonl:1: no format has these keys: a" in capsys.readouterr().err
