"""--task grpo and --task ppo: rewards, prompts, advantages, losses, resumes, and what is learnt."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file

from chatglm import load_model, load_tokenizer
from chatglm.conversations import Turn
from chatglm.families import family_of
from finetune.epochs import StepBatches
from finetune.memory.command import make_run
from finetune.memory.formula import estimate
from finetune.reinforcement.experience import (
    Experience,
    Sample,
    load_experience,
    save_experience,
    summary_of,
)
from finetune.reinforcement.grpo import Grpo, GrpoTraining
from finetune.reinforcement.policy_loss import clipped_losses
from finetune.reinforcement.ppo import Ppo, PpoTraining, advantages_of, token_rewards, whitened
from finetune.reinforcement.prompts import PromptReader, with_reply
from finetune.reinforcement.rewards import REWARDS, RewardKnobs, ScoredAnswer, parse_rewards
from finetune.reinforcement.rollout import RolloutRequest, RolloutSampling
from finetune.reinforcement.sampling import answer_requests
from finetune.reinforcement.scoring import AnswerScoring
from finetune.rows.formats import BadRow
from serving.rollouts.continuous import ContinuousRollouts, make_rollouts
from serving.rollouts.order import GuessedOrder, LengthHistory
from tests.conftest import REPO_ROOT
from tests.finetune.runs import metrics
from tests.finetune.tasks import CASES, make_pairs, parse, run, task_flags
from tests.finetune.test_checkpoint import same_losses

ADAPTER = "adapter_model.safetensors"

# ---- rewards


@pytest.mark.parametrize(
    "name, text, tokens, wanted",
    [
        ("length", "", 10, 1.0),
        ("length", "", 5, 0.5),
        ("length", "", 30, 0.0),
        ("pattern", "ab12", 4, 1.0),
        ("pattern", "abc", 3, 0.0),
        ("pattern_share", "ab12", 4, 0.5),
        ("pattern_share", "", 0, 0.0),
        ("contains", "先检查油封。", 6, 1.0),
        ("contains", "不用管", 3, 0.0),
        ("exact_match", "油封", 2, 1.0),
        ("exact_match", "油封。油封", 5, 0.0),
        ("rougeL", "油封", 2, 1.0),
        ("bleu4", "不用管", 3, 0.0),
        ("triple_f1", "不用管", 3, 0.0),
    ],
)
def test_rewards_by_hand(name, text, tokens, wanted):
    answer = ScoredAnswer(text, tokens, ("油封",))
    assert REWARDS[name](answer, RewardKnobs(10, r"\d")) == pytest.approx(wanted)


def test_a_row_without_answers_has_no_metric():
    assert REWARDS["exact_match"](ScoredAnswer("油封", 2, ()), RewardKnobs()) == 0


def test_a_reward_that_fails_names_the_row_and_itself(monkeypatch):
    """One line also where a function of REWARDS has an error of its own."""
    words = ["--task", "grpo", "--model_name_or_path", "m", "--train_path", "t"]
    config = parse([*words, "--rewards", "length,contains"])
    scoring = AnswerScoring(config, None, None)
    for wrong in (lambda answer, knobs: 1 / 0, lambda answer, knobs: None):
        monkeypatch.setitem(REWARDS, "contains", wrong)
        with pytest.raises(ValueError, match="^f:7: --rewards contains failed on '油封': "):
            scoring.reward(ScoredAnswer("油封", 2, ()), 0.0, True, "f:7")
    monkeypatch.setitem(REWARDS, "contains", lambda answer, knobs: float("inf"))
    clipped = AnswerScoring(replace(config, reward_clip=5.0), None, None)
    with pytest.raises(ValueError, match="^f:7: wanted a finite reward .* contains inf"):
        clipped.reward(ScoredAnswer("油封", 2, ()), 0.0, True, "f:7")


@pytest.mark.parametrize(
    "words, error",
    [
        (["--rewards", "nothing"], "wanted names of model, length"),
        (["--rewards", "length,length"], "each once"),
        (["--rewards", "length:x"], "wants a number after :"),
        (["--rewards", "length:nan"], "finite weight"),
        (["--rewards", "model"], "needs --reward_model"),
        (["--rewards", "pattern"], "needs --reward_pattern"),
        (["--rewards", "pattern", "--reward_pattern", "("], "no regular expression"),
        (["--rewards", "length", "--reward_pattern", "a"], "--reward_pattern needs --rewards with"),
        (["--rewards", "contains", "--reward_length", "3"], "--reward_length needs --rewards with"),
        ([], "--rewards or --reward_model is required"),
        (["--rewards", "length", "--num_generations", "1"], "at least 2; got 1"),
        (["--rewards", "length", "--max_new_tokens", "999"], "must be at most --max_len"),
        (["--rewards", "length", "--temperature", "0"], "--temperature must be a number from 0.01"),
        (["--rewards", "length", "--top_p", "0"], "--top_p must be above 0"),
        (["--rewards", "length", "--kl_coef", "-1"], "--kl_coef must be a number not below 0"),
        (["--rewards", "length", "--batching", "padded"], "--batching ragged; got padded"),
    ],
)
def test_wrong_flags_are_one_line(words, error, capsys):
    needed = ["--task", "grpo", "--model_name_or_path", "m", "--train_path", "t"]
    with pytest.raises(SystemExit):
        parse([*needed, *words])
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_ppo_refuses_a_discount_above_one(capsys):
    needed = ["--task", "ppo", "--model_name_or_path", "m", "--train_path", "t"]
    with pytest.raises(SystemExit):
        parse([*needed, "--rewards", "length", "--gamma", "1.5"])
    assert "--gamma must be from 0 to 1" in capsys.readouterr().err


def test_weights_of_rewards():
    assert parse_rewards("length, exact_match:0.5") == {"length": 1.0, "exact_match": 0.5}


# ---- prompts

ASKED = [{"role": "user", "content": "水泵"}]
ANSWERED = {"role": "assistant", "content": "好"}
CALLED = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
SCORED = [{"answer": "坏", "score": 0}, {"answer": "好", "score": 1}]


@pytest.mark.parametrize(
    "item, answers",
    [
        ({"prompt": "水泵"}, ("",)),
        ({"instruction": "水", "input": "泵"}, ("",)),
        ({"prompt": "水泵", "response": "好"}, ("好",)),
        ({"prompt": "水泵", "chosen": "好", "rejected": "坏"}, ("好",)),
        ({"messages": [{"role": "user", "content": "水泵"}]}, ("",)),
        ({"conversations": [{"from": "human", "value": "水泵"}]}, ("",)),
        ({"prompt": [{"role": "user", "content": "水泵"}]}, ("",)),
        ({"question": "水泵", "response_chosen": "好", "response_rejected": "坏"}, ("好",)),
        ({"prompt": "水", "prefix": "泵", "answers": SCORED}, ("好",)),
        (
            {"chosen": [*ASKED, ANSWERED], "rejected": [*ASKED, ANSWERED | {"content": "坏"}]},
            ("好",),
        ),
        ({"prompt": ASKED, "chosen": [ANSWERED], "rejected": "坏"}, ("好",)),
        ({"messages": [*ASKED, ANSWERED], "label": True}, ("好",)),
        ({"messages": [*ASKED, ANSWERED], "label": False}, ("",)),
        ({"prompt": "水泵", "completion": "坏", "label": False}, ("",)),
        ({"messages": [*ASKED, CALLED, {"role": "tool", "content": "5"}]}, ("",)),
    ],
)
def test_rows_need_no_answers(item, answers):
    row = PromptReader(family="glm3").row(item, "f:1")
    assert (row.prompt, row.answers) == ("水泵", answers)


def test_columns_are_renamed():
    row = PromptReader(columns={"prompt": "q"}).row({"q": "水泵", "prompt": "x"}, "f:1")
    assert row.prompt == "水泵"
    with pytest.raises(BadRow, match=r'^f:1: no column "q"'):
        PromptReader(columns={"prompt": "q"}).row({"prompt": "x"}, "f:1")


def test_a_preference_that_is_no_text_is_one_line():
    with pytest.raises(BadRow, match='^f:1: "chosen" must be text, got 5'):
        PromptReader(family="glm3").row({"prompt": "水泵", "chosen": 5, "rejected": "坏"}, "f:1")


def test_a_text_is_no_prompt():
    with pytest.raises(BadRow, match="^f:1: wanted a question"):
        PromptReader(data_format="document").row({"text": "水泵"}, "f:1")


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4", "qwen2"])
def test_prompts_are_the_serving_ones(bases, tmp_path, family):
    """A prompt's ids are those that serving gives the model; a conversation's end before its
    answer.
    """
    flags = ["--lora_module_name", "q_proj"] * (family == "qwen2")
    rows = [{"prompt": "水泵漏油"}, {"prompt": "它", "response": "好", "history": [["水泵", "是"]]}]
    task = GrpoTraining(
        parse(task_flags("grpo", CASES["grpo"], bases[family], tmp_path, *flags)), make_rollouts
    )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.load_rows()
    tokenizer = load_tokenizer(bases[family])
    wanted = family_of(tokenizer).encode_prompt(tokenizer, "水泵漏油", 48).input_ids
    assert task.data.prompt(0) == list(wanted)
    assert task.data.question(0).answers == ("",)
    turns = task.data.question(1).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    text = tokenizer.decode(task.data.prompt(1))
    assert "水泵" in text and "它" in text and "好" not in text
    chat = family_of(tokenizer).encode_chat(tokenizer, "它", [("水泵", "是")])
    assert task.data.prompt(1)[-1] == chat[-1]  # such as ChatGLM-6B's <sop>
    reply = with_reply(task.data.question(1), "新")
    assert reply.answers == ("新",) and reply.turns[-1] == Turn("assistant", "新")
    assert [turn.loss for turn in reply.turns if turn.role == "assistant"] == [False, True]
    assert task.data.row_lengths.tolist() == [len(task.data.prompt(i)) for i in (0, 1)]


def test_a_conversation_without_room_for_an_answer_is_dropped(bases, tmp_path):
    """Cut in its middle it would ask for nothing; one with little room gets short answers."""
    words = task_flags("grpo", CASES["grpo"], bases["glm3"], tmp_path, "--max_new_tokens", 48)
    task = GrpoTraining(parse(words), make_rollouts)
    rows = [{"prompt": "它", "response": "", "history": [["水泵" * n, "是"]]} for n in (1, 90, 45)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.load_rows()
    assert [task.data.place(row)[-2:] for row in range(len(task.data))] == [":1", ":3"]
    assert (task.data.skipped, task.data.truncated) == (1, 2)
    short, long = answer_requests(task.config, {0: task.data}, [(0, 0), (0, 1)], 1)
    assert short.max_new_tokens == 48
    assert 0 < long.max_new_tokens == 96 - len(long.prompt) < 48


def test_evaluation_rows_keep_all_their_references(bases, tmp_path):
    """As training rows: an answer may equal any of them."""
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)
    row = json.dumps({"prompt": "水泵", "response": ["好", "行"]}) + "\n"
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    task = GrpoTraining(parse(words), make_rollouts)
    task.load_rows()
    assert task.data.question(0).answers == task.eval_data.question(0).answers == ("好", "行")


# ---- advantages and losses


def samples(*rewards, tokens=3):
    made = []
    for reward in rewards:
        old = np.linspace(-1, -2, tokens, dtype=np.float32)
        columns = {"old": old, "reference": old - 0.1, "values": np.zeros(tokens, np.float32)}
        made.append(Sample(np.arange(tokens, dtype=np.int32), True, float(reward), columns))
    return made


def grpo(**knobs):
    given = {
        "kl_coef": 0.1,
        "unbiased_kl": True,
        "clip_range": 0.2,
        "clip_range_high": None,
        "advantage_scale": "group",
        "loss_norm": "sequence",
        "max_new_tokens": 8,
    }
    return Grpo(**(given | knobs))


@pytest.mark.parametrize(
    "scale, divisor", [("group", 2**0.5 / 2), ("batch", (11 / 12) ** 0.5), ("none", 1)]
)
def test_advantages_of_groups(scale, divisor):
    groups = {(0, 0): samples(1, 2), (0, 1): samples(3, 3)}
    grpo(advantage_scale=scale).add_advantages(Experience(0, groups))
    found = [sample.columns["advantages"][0] for sample in groups[(0, 0)]]
    assert found == pytest.approx([-0.5 / divisor, 0.5 / divisor], rel=1e-3)
    assert [sample.columns["advantages"][2] for sample in groups[(0, 1)]] == [0, 0]


@pytest.mark.parametrize(
    "norm, weight, count", [("sequence", 0.25, 2.0), ("token", 1.0, 8.0), ("constant", 1 / 8, 2.0)]
)
def test_norms_of_the_loss(norm, weight, count):
    algorithm = grpo(loss_norm=norm)
    assert algorithm.weight(4) == weight
    assert algorithm.count(torch.full((8,), weight), 2.0) == count


def test_clipping_by_hand():
    old = torch.zeros(4)
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    losses = clipped_losses(ratios.log(), old, advantages, 0.2, 0.3)
    assert losses.tolist() == pytest.approx([-1.3, 0.8, 1.5, -0.5])


def test_kl_of_grpo_by_hand():
    """e^u - u - 1 of u = log(ref / pi): at 0 where they agree, above it elsewhere."""
    batch = {"old": torch.zeros(2), "advantages": torch.zeros(2)}
    batch["reference"] = torch.tensor([0.0, 0.7])
    found = grpo(kl_coef=0.5).policy_losses(torch.zeros(2), batch)
    assert found.tolist() == pytest.approx([0, 0.5 * (np.exp(0.7) - 1.7)])


def test_the_unbiased_kl_has_the_gradient_of_kl():
    """Over all tokens, weighted by an older policy: that of sum pi log(pi / ref)."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=draw, requires_grad=True)
    old, reference = (torch.randn(5, generator=draw).log_softmax(0) for _ in range(2))
    batch = {"old": old, "reference": reference, "advantages": torch.zeros(5)}
    pi = logits.log_softmax(0)
    expected = (old.exp() * grpo(kl_coef=1.0).policy_losses(pi, batch)).sum()
    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-6)


def plain_ppo(log_probs, old, reference, values, old_values, reward, knobs):
    """(advantages, returns, policy loss, value loss) of one answer, from the papers' equations by
    sums over all later tokens: nothing of finetune.reinforcement.
    """
    n, gamma, lam = len(old), knobs["gamma"], knobs["gae_lambda"]
    rewards = [-knobs["kl_coef"] * (old[t] - reference[t]) for t in range(n)]
    rewards[-1] += reward
    later = [*old_values[1:], 0.0]
    surprises = [rewards[t] + gamma * later[t] - old_values[t] for t in range(n)]
    advantages = []
    for t in range(n):  # eq. 16: the sum of (gamma lambda)^l d_(t + l)
        advantages.append(sum((gamma * lam) ** (s - t) * surprises[s] for s in range(t, n)))
    returns = [a + v for a, v in zip(advantages, old_values)]
    mean = sum(advantages) / n
    variance = sum((a - mean) ** 2 for a in advantages) / n
    white = [(a - mean) / (variance + 1e-8) ** 0.5 for a in advantages]
    policy = value = 0.0
    for t in range(n):
        ratio = np.exp(log_probs[t] - old[t])
        low, high = 1 - knobs["clip_range"], 1 + knobs["clip_range"]
        policy += max(-ratio * white[t], -min(max(ratio, low), high) * white[t]) / n
        bound = knobs["clip_range_value"]
        near = old_values[t] + min(max(values[t] - old_values[t], -bound), bound)
        error = max((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
        value += knobs["vf_coef"] / 2 * error / n
    return white, returns, policy, value


def test_ppo_is_the_papers():
    """Advantages, returns and both losses equal a plain reference; gradients its differences."""
    draw = np.random.default_rng(0)
    old, reference, old_values = draw.normal(size=(3, 6))
    log_probs, values = old + 0.3 * draw.normal(size=6), old_values + 0.3 * draw.normal(size=6)
    knobs = {"kl_coef": 0.1, "clip_range": 0.2, "clip_range_value": 0.15, "vf_coef": 0.5}
    knobs |= {"gamma": 0.9, "gae_lambda": 0.8}
    white, returns, policy, value = plain_ppo(
        log_probs, old, reference, values, old_values, 1.7, knobs
    )
    columns = {"old": old, "reference": reference, "values": old_values}
    sample = Sample(np.arange(6, dtype=np.int32), True, 1.7, columns)
    algorithm = Ppo(clip_range_high=None, whiten_rewards=False, **knobs)
    algorithm.add_advantages(Experience(0, {(0, 0): [sample]}))
    assert sample.columns["advantages"] == pytest.approx(white, rel=1e-5)
    assert sample.columns["returns"] == pytest.approx(returns, rel=1e-5)
    batch = {name: torch.tensor(values) for name, values in sample.columns.items()}
    pi = torch.tensor(log_probs, requires_grad=True)
    v = torch.tensor(values, requires_grad=True)
    loss = algorithm.policy_losses(pi, batch).mean() + algorithm.value_losses(v, batch).mean()
    assert float(loss.detach()) == pytest.approx(policy + value, rel=1e-5)
    loss.backward()
    for t in range(6):
        for tensor, array in ((pi, log_probs), (v, values)):
            moved = array.copy()
            moved[t] += 1e-6
            pair = (moved, values) if tensor is pi else (log_probs, moved)
            above = sum(plain_ppo(pair[0], old, reference, pair[1], old_values, 1.7, knobs)[2:])
            slope = (above - policy - value) / 1e-6
            assert float(tensor.grad[t]) == pytest.approx(slope, abs=1e-5)


def test_gae_at_its_ends():
    """lambda 1: the return less the value; lambda 0: one step's surprise."""
    rewards, values = np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.25, 0.75])
    assert advantages_of(rewards, values, 1.0, 1.0) == pytest.approx(1 - values)
    assert advantages_of(rewards, values, 1.0, 0.0) == pytest.approx([-0.25, 0.5, 0.25])
    parts = whitened([np.array([1.0, 2.0]), np.array([6.0])])
    assert np.concatenate(parts).mean() == pytest.approx(0)
    assert np.concatenate(parts).std() == pytest.approx(1)


@pytest.mark.parametrize("rewards, wanted", [((2, 2), (2, 2)), ((1, 3), (1, 3)), ((0, 8), (3, 5))])
def test_whitened_rewards_keep_their_mean(rewards, wanted):
    """Equal ones stay as they are: nothing is divided by no deviation."""
    given = samples(*rewards)
    Ppo(0.0, 0.2, None, 0.2, 0.1, 1.0, 1.0, True).add_advantages(Experience(0, {(0, 0): given}))
    assert [s.columns["returns"][-1] for s in given] == pytest.approx(wanted, rel=1e-4)


def test_the_reward_is_the_last_tokens():
    (sample,) = samples(2.0)
    assert token_rewards(sample, 2.0, 0.5) == pytest.approx([-0.05, -0.05, 1.95], rel=1e-4)
    assert summary_of([sample])["kl"] == pytest.approx(0.3, rel=1e-4)


# ---- the order of answers


def test_unknown_groups_begin_one_answer_first_then_the_longest():
    order = GuessedOrder(["a", "a", "b", "b", "c", "c"], {"c": 5.0})
    begun = [order.begin() for _ in range(2)]
    assert begun == [0, 2]  # nothing is known of a and b
    order.end(0, 9)
    assert order.begin() == 1  # a's sibling had 9 tokens, c's prior is 5, b is still unknown
    order.end(2, 3)
    assert [order.begin() for _ in range(3)] == [4, 5, 3]
    assert len(order) == 0


def test_an_answer_that_outgrows_the_guess_counts():
    order = GuessedOrder(["a", "a", "b"], {"a": 4.0, "b": 6.0})
    assert order.begin() == 2
    assert order.begin() == 0
    tokens = [0] * 3
    order.watch(0, tokens)
    assert order.guess("a") == 4
    tokens += [0] * 9
    assert order.guess("a") == 8


def test_the_history_remembers_the_newest_most():
    history = LengthHistory()
    history.learn({"a": [2, 4]})
    history.learn({"a": [9]})
    again = LengthHistory()
    again.load_state(json.loads(json.dumps(history.state())))
    assert again.means == {"a": 6.0}
    with pytest.raises(ValueError, match="wanted the mean lengths"):
        again.load_state({})
    with pytest.raises(ValueError, match="wanted the mean length of a prompt's answers, got None"):
        again.load_state({"means": {"a": None}})


def requests_of(base, count=12):
    tokenizer = load_tokenizer(base)
    family = family_of(tokenizer)
    made = []
    for number, row in enumerate(make_pairs(count)):
        ids = list(family.encode_prompt(tokenizer, row["prompt"], 48).input_ids)
        for sample in range(2):
            made.append(
                RolloutRequest(ids, row["prompt"], str(number), 7 * number + sample, 3 + number)
            )
    return tokenizer, made


@pytest.mark.parametrize("family", ["glm", "glm2", "qwen2"])
def test_the_order_changes_no_token(bases, family):
    """By guesses, by arrival, after a history, one at a time: the same answers."""
    from chatglm.loading import stop_ids

    tokenizer, requests = requests_of(bases[family])
    model = load_model(bases[family])
    found = []
    for ordered, batch in ((True, 4), (False, 4), (True, 1)):
        rollouts = ContinuousRollouts(stop_ids(tokenizer), batch, ordered=ordered)
        found.append(rollouts.answers(model, requests, RolloutSampling(1.0, 0.9, 50)))
        rollouts.learn({request.group: [request.max_new_tokens] for request in requests})
        found.append(rollouts.answers(model, requests, RolloutSampling(1.0, 0.9, 50)))
    assert all(answers == found[0] for answers in found)
    for request, answer in zip(requests, found[0]):
        assert answer.finished or len(answer.tokens) == request.max_new_tokens
    assert len({tuple(answer.tokens) for answer in found[0]}) > 12


class Foreseen:
    """A predictor that knows."""

    def predict(self, prompts):
        from predictor.prediction import from_bins

        made = []
        for prompt in prompts:
            made.append(from_bins(np.ones(1), np.array([0.0, 2.0 * len(prompt)])))
        return made


def test_a_predictor_orders_what_history_does_not():
    rollouts = ContinuousRollouts([], 4, Foreseen())
    rollouts.learn({"b": [7]})
    requests = [RolloutRequest([1], "abc", "a", 0, 9), RolloutRequest([1], "abcd", "b", 0, 9)]
    assert rollouts.priors(requests) == {"a": 3.0, "b": 7.0}


# ---- runs


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_a_resume_amid_a_rollout_is_bit_identical(bases, tmp_path, task):
    """A checkpoint between two passes over the same answers has the answers."""
    more = ["--rollout_steps", 2, "--max_steps", 6, "--save_model_step", 3, "--eval_path="]
    words = [str(w) for w in task_flags(task, CASES[task], bases["glm2"], tmp_path / "a", *more)]
    last = run(words)
    again = task_flags(task, CASES[task], bases["glm2"], tmp_path / "b", *more)
    run([str(word) for word in again])
    out = tmp_path / "b" / "out"
    amid = next(folder for folder in out.glob("epoch-*-step-3"))
    experience, state = load_experience(amid / "rollouts.safetensors")
    assert experience is not None and len(state["means"]) > 4
    resumed = run([*map(str, again), "--resume_from_checkpoint", str(amid)])
    assert same_losses(tmp_path / "a" / "out", out)
    for file in last.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


def test_a_torn_rollout_is_one_line(tmp_path):
    path = tmp_path / "rollouts.safetensors"
    groups = {(0, 1): samples(1.0, 2.0), (1, 0): samples(3.0, tokens=5)}
    save_experience(path, Experience(4, groups), {"means": {}})
    experience, _ = load_experience(path)
    assert experience is not None and experience.phase == 4
    for place, wanted in groups.items():
        for a, b in zip(experience.groups[place], wanted, strict=True):
            assert (a.tokens == b.tokens).all() and a.reward == b.reward and a.finished
            assert all((a.columns[name] == b.columns[name]).all() for name in b.columns)
    whole = load_numpy(path)
    header = {"rollouts": json.dumps({"phase": 4, "state": {}})}
    for name in whole:
        save_numpy(whole | {name: whole[name][:-1]}, path, header)
        with pytest.raises(ValueError, match="not the rollouts of a checkpoint .*wanted"):
            load_experience(path)
    save_numpy(whole, path, {"rollouts": json.dumps({"phase": 4, "state": [1]})})
    with pytest.raises(ValueError, match="wanted a state"):
        load_experience(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not the rollouts of a checkpoint"):
        load_experience(path)


def test_a_checkpoint_without_a_step_keeps_the_loaded_answers(bases, tmp_path):
    """A run that resumes amid a rollout and ends at once saves what it loaded."""
    more = ["--max_steps", 1, "--eval_path=", "--rollout_epochs", 2]
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path, *more)
    first = run(words)
    again = [*words, "--resume_from_checkpoint", str(first), "--output_dir", str(tmp_path / "b")]
    second = run(again)
    name = "rollouts.safetensors"
    assert load_experience(first / name)[0] is not None
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_resume_amid_a_rollout_needs_its_answers(bases, tmp_path):
    """Others would be sampled, by other weights."""
    task = GrpoTraining(
        parse(task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)), make_rollouts
    )
    with pytest.raises(ValueError, match="lacks the answers of its step"):
        task.step_batches(None, StepBatches(None, [], 0, []), 1)


def test_a_reward_model_scores(bases, tmp_path):
    """A checkpoint of --task reward gives the rewards, beside a function."""
    folder = run(task_flags("reward", CASES["reward"], bases["glm2"], tmp_path / "reward"))
    case = CASES["grpo"]
    more = ["--reward_model", folder, "--rewards", "model:0.5,pattern_share", "--max_steps", 2]
    task_folder = tmp_path / "grpo"
    run(task_flags("grpo", case, bases["glm2"], task_folder, *more))
    rewards = metrics(task_folder / "out", "reward")
    assert len(rewards) == 1 and np.isfinite(rewards[0])
    only = tmp_path / "function"
    run(task_flags("grpo", case, bases["glm2"], only, "--max_steps", 2))
    assert metrics(only / "out", "reward")[0] != rewards[0]


def test_a_folder_that_is_no_reward_model_is_one_line(bases, tmp_path):
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)
    words += ["--rewards", "model", "--reward_pattern=", "--reward_model", str(bases["glm2"])]
    earlier = tmp_path / "out" / "epoch-1-step-1"
    earlier.mkdir(parents=True)
    with pytest.raises(ValueError, match="^--reward_model .* is no reward model"):
        run([*words, "--overwrite_output_dir"])
    assert earlier.is_dir()


def test_a_folder_that_is_no_predictor_is_one_line(bases, tmp_path):
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)
    with pytest.raises(ValueError, match="^--length_predictor: .* is no length predictor"):
        run([*words, "--length_predictor", str(bases["glm2"])])


def test_rewards_by_answers_need_answers(bases, tmp_path):
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path, "--reward_pattern=")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="--rewards contains compares .* no row of --train_path"):
        run([*words, "--rewards", "length,contains"])


def test_rewards_that_are_not_finite_are_one_line(bases, tmp_path):
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)
    with pytest.raises(ValueError, match=r"train.jsonl:\d+: wanted a finite reward"):
        run([*words, "--rewards", "pattern_share:1e300,length:1e300"])


def test_answers_that_are_not_finite_are_one_line(bases):
    _, requests = requests_of(bases["glm2"], 1)
    model = load_model(bases["glm2"])
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(ValueError, match=f"no answer could be sampled to '{requests[0].question}'"):
        ContinuousRollouts([], 4).answers(model, requests, RolloutSampling())


def test_other_rows_are_learnt_beside(bases, tmp_path):
    """PPO-ptx: with a large weight the loss of --pretrain_path's rows falls."""
    rows = tmp_path / "pretrain.jsonl"
    rows.write_text(6 * (json.dumps({"prompt": "a", "response": "油油"}) + "\n"))
    more = ["--pretrain_path", rows, "--max_steps", 12, "--eval_path="]
    run(task_flags("ppo", CASES["ppo"], bases["glm2"], tmp_path, *more))
    losses = metrics(tmp_path / "out")
    assert losses[-1] < losses[0] - 5


def test_rows_beside_are_drawn_by_their_weights(bases, tmp_path, capsys):
    """--pretrain_path takes weights as --train_path does."""
    rows = tmp_path / "pretrain.jsonl"
    rows.write_text(6 * (json.dumps({"prompt": "a", "response": "油油"}) + "\n"))
    flags = task_flags("ppo", CASES["ppo"], bases["glm2"], tmp_path)
    task = PpoTraining(parse([*flags, "--pretrain_path", f"{rows}:0.5"]), make_rollouts)
    task.load_rows()
    assert task.pretraining.count() == 3
    assert "6 pretrain rows" in capsys.readouterr().out


def test_the_average_of_the_weights(bases, tmp_path):
    """ema/ is the average over all steps, also of a run that was resumed; it loads."""
    more = ["--max_steps", 4, "--save_model_step", 1, "--eval_path=", "--ema_decay", "0.5"]
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path, *more)
    last = run(words)
    out = tmp_path / "out"
    name = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_B"
    steps = [load_file(find_step(out, step) / ADAPTER)[f"{name}.weight"] for step in (1, 2, 3, 4)]
    wanted = torch.zeros_like(steps[0])  # B's start
    for weight in steps:
        wanted = 0.5 * wanted + 0.5 * weight
    found = load_file(last / "ema" / ADAPTER)
    assert torch.allclose(found[f"{name}.weight"], wanted, atol=1e-7)
    load_model(last / "ema")
    written = [last / "average.safetensors", last / "ema" / ADAPTER]
    task = GrpoTraining(parse(words), make_rollouts)
    network = task.build_model(torch.float32)
    size = sum(file.stat().st_size for file in written)
    assert task.extra_bytes(network) == pytest.approx(size, rel=0.1)
    run([*words, "--resume_from_checkpoint", str(find_step(out, 2))])
    again = load_file(find_step(out, 4) / "ema" / ADAPTER)
    assert all((again[key] == found[key]).all() for key in found)


def find_step(out, step):
    return next(out.glob(f"epoch-*-step-{step}"))


def test_streamed_prompts(bases, tmp_path):
    more = ["--streaming", "--max_steps", 4, "--shuffle_buffer", 8]
    run(task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path, *more))
    assert len(metrics(tmp_path / "out", "reward")) == 2


def test_a_reference_that_cannot_be_switched_off(bases, tmp_path):
    """On --adapter the reference is the adapter as it was: no divergence at the first answers."""
    first = run(task_flags("finetune", CASES["finetune"], bases["glm2"], tmp_path / "first"))
    more = ["--adapter", first, "--num_train_epochs", 2]
    run(task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path / "second", *more))
    drift = metrics(tmp_path / "second" / "out", "kl")
    assert drift[0] == pytest.approx(0, abs=1e-6) and abs(drift[-1]) > 1e-5


def test_a_reference_keeps_the_prefix_that_the_run_starts_from(bases, tmp_path):
    """On a folder with a P-Tuning prefix: no divergence at the first answers, then some."""
    words = task_flags(
        "finetune", CASES["finetune"], bases["glm2"], tmp_path / "a", method="ptuning-v2"
    )
    first = run([*words, "--learning_rate", "0.3"])
    more = ["--num_train_epochs", 2, "--eval_path="]
    run(task_flags("grpo", CASES["grpo"], first, tmp_path / "b", *more, method="ptuning-v2"))
    drift = metrics(tmp_path / "b" / "out", "kl")
    assert drift[0] == pytest.approx(0, abs=1e-5) and abs(drift[-1]) > 1e-5


@pytest.mark.parametrize("method", ["lora", "all"])
def test_the_critic_trains_and_the_policy_does_not_move_it(bases, tmp_path, method):
    """The critic has its own trained weights, shares the frozen ones, and its head starts at 0."""
    words = task_flags("ppo", CASES["ppo"], bases["glm2"], tmp_path, method=method)
    task = PpoTraining(parse(words), make_rollouts)
    network = task.build_model(torch.float32)
    assert not network.critic.value_head.weight.any()
    ours = dict(network.model.named_parameters())
    theirs = dict(network.critic.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        shared = parameter is theirs[name]
        assert shared == (method == "lora" and "lora_" not in name), name
        assert (parameter == theirs[name]).all()
    assert (network.reference is None) == (method == "lora")


@pytest.mark.parametrize(
    "task, method, models, trained",
    [("grpo", "all", 2, 1), ("ppo", "all", 3, 2), ("grpo", "lora", 1, 1), ("ppo", "lora", 1, 2)],
)
def test_the_estimate_counts_the_copies(bases, tmp_path, task, method, models, trained):
    """A reference and a critic of whole models; of adapters the base is there once."""
    config = parse(task_flags(task, CASES[task], bases["glm2"], tmp_path, method=method))
    described = make_run(config)
    own = described.own_trained
    added = own * trained if method == "lora" else 0
    # A critic has no output layer.
    output = described.trained.get("transformer.output_layer.weight", 0)
    assert described.trained_count == own * trained - output * (trained - 1)
    assert described.weight_count == described.shape.total * models + added
    task_class = {"grpo": GrpoTraining, "ppo": PpoTraining}[task]
    network = task_class(config, make_rollouts).build_model(torch.float32)
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == pytest.approx(described.weight_count, rel=0.01)


def test_the_estimate_counts_a_reward_model(bases, tmp_path):
    words = task_flags("grpo", CASES["grpo"], bases["glm2"], tmp_path)
    plain = estimate(make_run(parse(words)))
    more = ["--rewards", "model", "--reward_pattern=", "--reward_model", str(bases["glm2"])]
    scored = estimate(make_run(parse([*words, *more])))
    assert "reward model" in scored.parts and "reward model" not in plain.parts
    assert scored.total > plain.total


def test_the_guide_counts_the_lines():
    """An algorithm is under 200 lines, and docs/preferences.md says how many."""
    text = (REPO_ROOT / "docs" / "preferences.md").read_text("utf-8")
    for name in ("grpo", "ppo", "beside"):
        source = (REPO_ROOT / "finetune" / "reinforcement" / f"{name}.py").read_text("utf-8")
        count = len(source.splitlines())
        assert count < 200
        assert re.search(rf"{name}\.py`[^|]*, {count} lines", text), (name, count)


@pytest.mark.parametrize("task", ["grpo", "ppo"])
def test_a_toy_learns(bases, tmp_path, task):
    """The rewards rise, and the divergence from the start stays bounded."""
    more = ["--reward_pattern", "[油水]", "--rewards", "pattern_share:10", "--eval_path="]
    more += ["--num_generations", 8, "--max_steps", 30, "--num_train_epochs", 50]
    more += ["--save_model_step", 100, "--learning_rate", "1e-2", "--rollout_epochs", 2]
    run(task_flags(task, CASES[task], bases["glm2"], tmp_path, *more, method="all"))
    rewards, drift = metrics(tmp_path / "out", "reward"), metrics(tmp_path / "out", "kl")
    assert np.mean(rewards[-3:]) > 3 * np.mean(rewards[:3])
    assert 0 < max(drift) < 40
