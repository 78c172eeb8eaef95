"""Likelihoods of trees against plain forward passes, a choice at a time."""

import pytest
import torch

from chatglm import load_model, load_tokenizer
from finetune.benchmark.encoding import Continuation, Tree, rows_of_choices, shared_start
from finetune.benchmark.questions import Question
from finetune.benchmark.scoring import ChoiceScorer, cut_before
from tests.causal_folders import make_causal_folder

KINDS = ("glm", "glm2", "glm4", "glm_base", "pangu", "llama", "qwen2")
LONG = "水泵漏油怎么办？先检查油封，再更换密封圈。"
QUESTIONS = [
    Question({}, (LONG + "答案：",) * 3, ("油封", "水泵坏了", "油封坏了"), ("", "", ""), (0,)),
    Question({}, (LONG + "是吗？",) * 2, (" a", " b"), ("", ""), (1,)),
    Question({}, (LONG + "短", LONG + "长一些 "), ("的句子", "的句子"), ("", ""), (0,)),
    Question({}, ("",) * 2, ("下面不同", "下面相同的句子"), ("", ""), (0,)),
]


@pytest.fixture(scope="module", params=KINDS)
def scorer(request, tiny_folders, tmp_path_factory):
    kind = request.param
    folder = tiny_folders.get(kind) or make_causal_folder(tmp_path_factory.mktemp(kind), kind)
    tokenizer = load_tokenizer(folder, prompt_style="raw")
    return ChoiceScorer(load_model(folder, dtype=torch.float32).eval(), tokenizer, 256)


@torch.no_grad()
def by_hand(scorer, choice) -> float:
    """The sum over what is scored, of one whole sequence."""
    logits = scorer.model(input_ids=torch.tensor([choice.ids])).logits[0]
    found = logits[:-1].log_softmax(-1).gather(1, torch.tensor(choice.ids)[1:, None])
    return found[choice.start - 1 :].sum().item()


def scores(scorer, questions):
    told = []
    found = scorer.scores(questions, told.append)
    assert sum(told) == len(questions)
    return found


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_scores_are_those_of_plain_passes(scorer, monkeypatch, batch_tokens, count):
    """With a beginning in common of three rows, kept as keys and values, and without."""
    monkeypatch.setattr(scorer, "batch_tokens", batch_tokens)
    questions = QUESTIONS[:count]
    found = scores(scorer, questions)
    for question, values in zip(questions, found, strict=True):
        wanted = [by_hand(scorer, choice) for choice in scorer.encoder.question(question)]
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_a_long_context_loses_its_beginning(scorer, monkeypatch):
    encoder = scorer.encoder
    question = Question({}, (LONG * 3,), ("油封",), ("",), (0,))
    [whole] = encoder.question(question)
    monkeypatch.setattr(encoder, "longest", 40)
    [cut] = encoder.question(question)
    front, end = encoder.front, len(encoder.after)
    assert len(cut) == 40 and cut.ids[:front] == whole.ids[:front]
    assert cut.ids[front:] == whole.ids[front - (40 + 1) :] or end
    assert cut.ids[cut.start :] == whole.ids[whole.start :]
    [found] = scores(scorer, [question])
    assert found == pytest.approx([by_hand(scorer, cut)], rel=1e-4, abs=1e-3)
    monkeypatch.setattr(encoder, "longest", 1)
    with pytest.raises(ValueError, match="--max_length 1: an answer alone needs"):
        encoder.question(question)


def test_written_answers(scorer, monkeypatch):
    """Greedy ids up to a text: those of a plain loop, whatever is written beside them."""
    questions = [Question({}, (text,)) for text in (LONG, "油封", LONG + "再问一次")]
    wanted = []
    for question in questions:
        ids, answer = scorer.encoder.context(question.contexts[0]), []
        for _ in range(6):
            with torch.no_grad():
                logits = scorer.model(input_ids=torch.tensor([ids + answer])).logits
            answer.append(int(logits[0, -1].argmax()))
            if answer[-1] in scorer.tokenizer.stop_ids:
                answer.pop()
                break
        text = scorer.tokenizer.decode(answer, skip_special_tokens=True)
        wanted.append(text)
    assert scorer.answers(questions, [], 6, lambda count: None) == wanted
    stop = next((text[1:2] for text in wanted if len(text) > 1), "\n")
    cut = [text.split(stop)[0] for text in wanted]
    monkeypatch.setattr(scorer, "batch_tokens", 1)
    assert scorer.answers(questions, [stop], 6, lambda count: None) == cut
    with pytest.raises(ValueError, match="has no room for 9999 new tokens"):
        scorer.answers(questions, [], 9999, lambda count: None)


def test_trees():
    """Two choices after a, b: what they add is side by side; of one token they add nothing."""
    found = Tree.of_choices([Continuation([1, 2, 3, 4], 2), Continuation([1, 2, 5, 6, 7], 2)])
    assert found == Tree(
        ids=[1, 2, 3, 5, 6],
        positions=[0, 1, 2, 2, 3],
        branch=[0, 0, 1, 2, 2],
        places=[1, 2, 1, 3, 4],
        targets=[3, 4, 5, 6, 7],
        counts=[2, 3],
    )
    assert found.first_place == 1
    single = Tree.of_choices([Continuation([1, 2, 3], 2), Continuation([1, 2, 4], 2)])
    assert single.ids == [1, 2] and single.places == [1, 1] and single.targets == [3, 4]
    apart = [Continuation([1, *range(2, 9)], 1), Continuation([1, *range(20, 29)], 1)]
    assert len(rows_of_choices(apart)) == 2


def test_shared_start():
    assert shared_start([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert shared_start([[1], [2]]) == 0 and shared_start([[3, 4]]) == 2


def test_cut_before():
    assert cut_before("a\nb。c", ["。", "\n", ""]) == "a"
