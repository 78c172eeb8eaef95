"""Metrics against values worked by hand, and what several references and several answers mean."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation import metrics
from finetune.evaluation.metrics import (
    GROUPS,
    METRICS,
    check_packages,
    class_scores,
    label_of,
    overall_scores,
    parse_metrics,
    score_rows,
    words,
)
from tests.conftest import shared_file

LIBRARIES = {"rouge1", "rouge2", "rougeL", "bleu4", "coverage", "diversity"}


def score(name: str, answers: str | list[str], references: str | list[str]) -> float:
    if name in LIBRARIES:
        pytest.importorskip("rouge_score")
        pytest.importorskip("jieba")
    listed = [[x] if isinstance(x, str) else x for x in (answers, references)]
    return METRICS[name].score(*listed)


@pytest.mark.parametrize(
    "name, answer, reference, value",
    [
        # 4 of 5 words match on both sides: "the cat sat on mat" against "the cat lay on mat"
        ("rouge1", "the cat sat on mat", "the cat lay on mat", 4 / 5),
        # bigrams the-cat and on-mat of 4
        ("rouge2", "the cat sat on mat", "the cat lay on mat", 2 / 4),
        ("rougeL", "the cat sat on mat", "the cat lay on mat", 4 / 5),
        # order: all unigrams match; the longest common subsequence of "a b c d" and "d a b c" is "a
        # b c", 3 of 4
        ("rouge1", "a b c d", "d a b c", 1),
        ("rougeL", "a b c d", "d a b c", 3 / 4),
        # counts, not sets: "a a a" has one a of the reference's; p 1/3, r 1/2, F 2/5
        ("rouge1", "a a a", "a b", 2 / 5),
        # Chinese words 女人 肾虚 会 引起 什么 ？ and 肾虚 会 引起 什么 病 ？:
        # 5 of 6 shared, in order
        ("rougeL", "女人肾虚会引起什么？", "肾虚会引起什么病？", 5 / 6),
        ("rouge1", "", "a", 0),
        ("rouge1", "a", "", 0),
        ("rougeL", "", " ", 1),
        # BLEU: p1 4/5, p2 2/4, p3 0 of 3 and p4 0 of 2, smoothed to 1/(2*3) and 1/(4*2); equal
        # length, no penalty
        (
            "bleu4",
            "the cat sat on mat",
            "the cat lay on mat",
            (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25,
        ),
        # all four precisions 1; 4 words for 6: brevity penalty exp(1 - 6/4)
        ("bleu4", "a b c d", "a b c d e f", math.exp(1 - 6 / 4)),
        ("bleu4", "a b c d", "a b c d", 1),
        ("bleu4", "x", "a", 0),
        ("bleu4", "", "a", 0),
        ("bleu4", "", "", 1),
        ("bleu4", "a", "", 0),
        # under four words: "a b" against itself has p1 = p2 = 1, no 3-gram (1/2 by smoothing) and
        # no 4-gram (1/4)
        ("bleu4", "a b", "a b", (1 / 2 * 1 / 4) ** 0.25),
        ("exact_match", " 一样\n", "一样", 1),
        ("exact_match", "a", "A", 0),
        ("exact_match", "", "", 1),
        ("accuracy", "Positive.", "positive", 1),
        ("accuracy", "“正面”。", "正面", 1),
        ("accuracy", "ＡＢ！", "ab", 1),
        ("accuracy", "-1", "1", 0),
        ("accuracy", "not positive", "positive", 0),
        ("macro_f1", "negative", "positive", 0),
        ("triple_f1", "a_b_c\nd_e_f", "a_b_c", 2 / 3),
        ("triple_f1", "", "a_b_c", 0),
    ],
)
def test_by_hand(name, answer, reference, value):
    assert score(name, answer, reference) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "name, answers, references, value",
    [
        # the nearest reference counts: 1/3 for the first ("a" of "a x y" and "a b c"), 2/3 for the
        # second
        ("rouge1", "a x y", ["a b c", "x y z"], 2 / 3),
        # each answer against its nearest reference, then the mean: (2/3 + 0) / 2
        ("rouge1", ["a x y", "q"], ["a b c", "x y z"], 1 / 3),
        # BLEU counts n-grams in all references at once: p1 4/4 (a b from one, c d from the other),
        # p2 a-b and c-d of 3, p3 0 of 2 and p4 0 of 1, smoothed to 1/(2*2) and 1/(4*1)
        ("bleu4", "a b c d", ["a b x y", "x y c d"], (1 * 2 / 3 * 1 / 4 * 1 / 4) ** 0.25),
        ("exact_match", ["a", "b", "c"], ["a", "b"], 2 / 3),
        ("accuracy", ["a", "B", "c"], ["a", "b"], 2 / 3),
        ("triple_f1", "a_b_c", ["x_y_z", "a_b_c"], 1),
        # references: "a b" is met exactly, "c d" by half ("c x": one of two words), "q" not at all
        ("coverage", ["a b", "c x"], ["a b", "c d", "q"], (1 + 1 / 2 + 0) / 3),
        # "a b c e" shares 3 of 4 words with the first: ROUGE-L 3/4 > 0.7, a repetition; "a b x y"
        # has 2/4, not one
        ("diversity", ["a b c d", "a b c e", "a b x y", "a b c d"], ["-"], 2 / 4),
        ("diversity", "a", ["-"], 1),
    ],
)
def test_several_answers_and_references(name, answers, references, value):
    assert score(name, answers, references) == pytest.approx(value, abs=1e-12)


texts = st.text(alphabet="abc _\n水泵漏油", max_size=12)


@given(st.lists(texts, min_size=1, max_size=3), st.lists(texts, min_size=1, max_size=3))
def test_scores_are_shares_and_the_reference_itself_is_right(answers, references):
    pytest.importorskip("rouge_score")
    pytest.importorskip("jieba")
    for name in METRICS:
        assert 0 <= score(name, answers, references) <= 1 + 1e-9
    for name in set(METRICS) - {
        "triple_f1",
        "bleu4",
        "rouge2",
        "coverage",
    }:  # those ask for triples, for more than a word, for all references
        assert score(name, references[:1], references) == pytest.approx(1)


def test_names():
    assert parse_metrics("rouge, f1,rougeL,exact_match,") == (
        "rouge1",
        "rouge2",
        "rougeL",
        "triple_f1",
        "exact_match",
    )
    assert {name for group in GROUPS.values() for name in group} <= set(METRICS) and not set(
        GROUPS
    ) & set(METRICS)
    with pytest.raises(ValueError, match="--eval_metrics: no metric 'meteor'; there are rouge1"):
        parse_metrics("rouge,meteor", "--eval_metrics")


def test_macro_f1_by_hand():
    """Three classes, six rows; "x" is no class: a miss of c alone, and no fourth class of F1 0.

    a: 2 of 3 rows found, named 3 times, F1 2*2/(3+3); b: 1 of 1, named twice, 2*1/(2+1); c: 0.
    """
    answers = [["a"], ["A."], ["b"], ["b"], ["a"], ["x"]]
    references = [["a"], ["a"], ["a"], ["b"], ["c"], ["c"]]
    scores = score_rows(["accuracy", "macro_f1"], answers, references)
    assert scores["accuracy"] == scores["macro_f1"] == [1, 1, 0, 1, 0, 0]
    overall = overall_scores(scores, answers, references)
    assert overall == pytest.approx({"accuracy": 3 / 6, "macro_f1": (2 / 3 + 2 / 3 + 0) / 3})
    classes = class_scores(answers, references)
    assert list(classes) == ["a", "b", "c"] and [c.rows for c in classes.values()] == [3, 1, 2]
    assert (classes["a"].precision, classes["a"].recall) == (2 / 3, 2 / 3)
    assert (classes["b"].precision, classes["b"].recall) == (1 / 2, 1)
    # Of several references the one that was named is the row's class, else the first.
    several = class_scores([["b"], ["q"]], [["a", "b"], ["a", "b"]])
    assert [(label, score.f1) for label, score in several.items()] == [("a", 0.0), ("b", 1.0)]


@given(st.lists(st.tuples(st.sampled_from("abcx"), st.sampled_from("abc")), min_size=1))
def test_macro_f1_is_that_of_its_definition(pairs):
    """F1 of precision and recall, class by class, over every pair of labels."""
    found = []
    for label in sorted({gold for _, gold in pairs}):
        hits = pairs.count((label, label))
        named = [answer for answer, _ in pairs].count(label)
        wanted = [gold for _, gold in pairs].count(label)
        precision, recall = hits / named if named else 0, hits / wanted
        found.append(2 * precision * recall / (precision + recall) if hits else 0)
    answers = [[answer] for answer, _ in pairs]
    references = [[gold] for _, gold in pairs]
    value = metrics.macro_f1(answers, references)
    assert value == pytest.approx(sum(found) / len(found))


def test_labels():
    for text in ("体育", " 体育。", "「体育」", "体育\n"):
        assert label_of(text) == "体育"
    assert label_of("-1") == "-1" and label_of("C++.") == "c++"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(
        metrics, "find_spec", lambda name: None if name in ("jieba", "rouge_score") else name
    )
    check_packages(["exact_match", "triple_f1"])
    with pytest.raises(
        ValueError,
        match=r'the metric rouge2 needs rouge-score and jieba: pip install -e "\.\[eval\]"',
    ):
        check_packages(["exact_match", "rouge2"])


def test_words_drop_white_space():
    pytest.importorskip("jieba")
    assert words("Hello  水泵\n漏油。") == ("Hello", "水泵", "漏油", "。")


def test_questions_of_the_seeds_set():
    """All reference questions asked once cover everything; the first alone covers less.

    The first alone is right, and as diverse as one answer can be.
    """
    pytest.importorskip("rouge_score")
    rows = [
        json.loads(line)["output"]
        for line in shared_file("data/finetune/d2q_1.json").read_text().splitlines()
    ]
    assert len(rows) == 20 and any(len(references) > 1 for references in rows)
    every = score_rows(parse_metrics("d2q"), rows, rows)
    assert every["rougeL"] == every["coverage"] == [1.0] * 20
    first = score_rows(parse_metrics("d2q"), [references[:1] for references in rows], rows)
    assert first["rougeL"] == first["diversity"] == [1.0] * 20 and sum(first["coverage"]) < 20
