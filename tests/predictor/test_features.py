"""Features of a prompt: the same in any batch and process, for any text; all parts are detected."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from predictor.features import (
    CUE_FEATURE_NAMES,
    CUES,
    HEAD,
    KINDS,
    NUM_CUE_FEATURES,
    TAIL,
    TextGrams,
    clip,
)
from tests.conftest import REPO_ROOT

pytestmark = pytest.mark.filterwarnings("error")
quick = settings(deadline=None, max_examples=40)
ODD = [
    "",
    " ",
    "\0",
    "\0\0a\0",
    "\ud800",
    "a\udfffb",
    "👩‍👩‍👧 family",
    "مرحبا كيف الحال",
    "שלום עולם",
    "İ" * 2001,
    "ﬁ",
    "ß" * 50,
    "\u202eabc",
    "one",
    "一",
    "한국어 문장",
    "a\n\n\nb",
    "𠀀𠀁",
    "\U0010ffff",
    "é" * 3000,
    "1" * 4000,
    "'",
    "'''",
    "x" * 2000,
    "x" * 2001,
    "你" * 5000,
    "five " * 900,
    "a" * 1_000_000,
    "Write 5 sentences. 写一个故事",
]
any_text = st.one_of(
    st.text(st.characters(), max_size=80),
    st.sampled_from(ODD),
    st.text("ab 1.é你好\0\ud800İ", max_size=30),
)


def cue_features(text: str) -> dict[str, float]:
    return dict(zip(CUE_FEATURE_NAMES, TextGrams([text]).cue_features()[0].tolist()))


def asked(text: str) -> dict[str, float]:
    return {
        name[5:]: round(float(np.expm1(value)), 3)
        for name, value in cue_features(text).items()
        if name.startswith("asks") and value
    }


def grams_of(grams: TextGrams, row: int = 0) -> list[tuple[int, float]]:
    hashes, texts, weights = grams.all()
    return sorted(zip(hashes[texts == row].tolist(), weights[texts == row].tolist()))


# ---- any text


@quick
@given(st.lists(any_text, min_size=1, max_size=6))
@example(ODD)
@example(["", ""])
@example(["", "a", ""])
def test_a_text_reads_the_same_in_any_batch(texts):
    many = TextGrams(texts)
    rows = many.cue_features()
    hashes, owners, weights = many.all()
    assert (
        rows.shape == (len(texts), NUM_CUE_FEATURES)
        and np.isfinite(rows).all()
        and len(hashes) == len(owners) == len(weights)
    )
    assert np.isfinite(weights).all() and (weights > 0).all() and weights.dtype == np.float32
    for i, text in enumerate(texts):
        alone = TextGrams([text])
        np.testing.assert_array_equal(alone.cue_features()[0], rows[i])
        assert grams_of(alone) == grams_of(many, i)


@quick
@given(any_text)
def test_a_kind_weighs_no_more_than_its_share(text):
    """n grams of a kind weigh KINDS[kind] / sqrt(n) each."""
    _, _, weights = TextGrams([text]).all()
    most = sum(share**2 for share in KINDS.values())
    assert (weights.astype(float) ** 2).sum() <= most + 1e-5


def test_reading_is_the_same_in_every_process():
    texts = ["Write 5 sentences about Ünïcode. 写三种方法", "", "a\nb", "x" * 3000]
    program = (
        "import sys, hashlib; from predictor.features import TextGrams;"
        "g = TextGrams(eval(sys.stdin.read()));"
        "arrays = (*g.all(), g.cue_features()); content = b''.join(x.tobytes() for x in arrays);"
        "print(hashlib.sha256(content).hexdigest())"
    )
    run = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            input=ascii(texts),
            capture_output=True,
            text=True,
            cwd=REPO_ROOT,
            check=True,
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    ]
    assert run[0] == run[1] and len(run[0]) == 65


def test_no_overflow_is_complained_of():
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for text in ODD:
            TextGrams([text]).all()
            TextGrams([text, text]).cue_features()


@quick
@given(any_text)
def test_empty_lines_and_case_change_no_word(text):
    one, two = TextGrams([text]), TextGrams([text.upper().lower() if text.isascii() else text])
    np.testing.assert_array_equal(one.words, two.words)


@pytest.mark.parametrize("text", ["", " ", "\n", "...", "👍👍"])
def test_a_text_without_words(text):
    grams = TextGrams([text, "a word", text])
    hashes, owners, _ = grams.all()
    assert set(owners.tolist()) == {1} and len(hashes) > 0
    assert cue_features(text)["log words"] == 0 and TextGrams([text]).words.size == 0


# ---- clipping


@quick
@given(st.integers(0, 6000))
@example(HEAD + TAIL)
@example(HEAD + TAIL + 1)
def test_clipping_keeps_both_ends(size):
    text = "".join(chr(0x4E00 + i % 20_000) for i in range(size))
    kept = clip(text)
    assert kept == text if size <= HEAD + TAIL else kept == text[:HEAD] + "\n" + text[-TAIL:]


def test_what_stands_at_the_ends_of_a_long_text_is_read():
    filling = "lorem ipsum " * 50_000
    found = cue_features("Summarize this: " + filling + " Write a poem of 12 lines")
    assert (
        found["cue summary"]
        and found["early summary"]
        and found["cue poem"]
        and found["asks lines"] == pytest.approx(np.log1p(12))
    )
    assert found["log all characters"] > np.log(600_000) > found["log characters"]
    np.testing.assert_array_equal(
        TextGrams(["a b " + "m" * 9000 + " c d"]).cue_features()[0, :60],
        TextGrams(["a b " + "m" * 8000 + " c d"]).cue_features()[0, :60],
    )


# ---- words and their hashes


@pytest.mark.parametrize(
    "text, count",
    [
        ("hello world", 2),
        ("Hello, world!", 2),
        ("don't stop", 2),
        ("a1b2", 4),
        ("你好世界", 4),
        ("用Python写", 3),
        ("x\0y", 2),
        ("日本語のテキスト", 8),
        ("3.14", 2),
        ("  ", 0),
        ("naïve café", 2),
    ],
)
def test_words(text, count):
    assert len(TextGrams([text]).words) == count


@quick
@given(
    st.text("abcdefgé1", min_size=1, max_size=12),
    st.lists(st.sampled_from(["zz", "你", "1", "yyyyyyyy", ","]), max_size=6),
)
def test_a_words_hash_does_not_know_its_place(word, before):
    alone = TextGrams([word]).words
    found = TextGrams([" ".join([*before, word])]).words
    np.testing.assert_array_equal(found[len(found) - len(alone) :], alone)


def test_grams_do_not_know_their_place_but_the_first_and_last_ones_do():
    middle = "p q r s t u v w"
    kinds = {}
    for text in (
        f"aa bb cc dd {middle} ee ff gg",
        f"{middle} aa bb cc dd ee ff gg",
        f"aa bb cc dd ee ff gg {middle}",
    ):
        hashes, _, _ = TextGrams([text]).all()
        kinds[text] = set(hashes.tolist())
    one, two, three = kinds.values()
    assert one != two != three
    word = set(TextGrams(["hello"]).all()[0].tolist())
    # As a word alone: word, inside (2), first (2: alone and beside nothing), last.
    assert len(word) == 6
    inner = set(TextGrams(["p q r s t hello u v w"]).all()[0].tolist())
    assert (
        len(word & inner) == 3
        and len(word & set(TextGrams(["p q r s t hello"]).all()[0].tolist())) == 4
    )


def test_different_words_have_different_hashes():
    words = {
        f"{a}{b}{n}" for a in "abcdefghij" for b in "klmnopqrst" for n in ("", "ing", "er", "ed")
    } | {"ab", "ba", "aab", "aba", "a", "aa", "aaa"}
    assert len({int(TextGrams([w]).words[0]) for w in words}) == len(words)


def test_order_of_two_words_counts():
    one, two = (set(TextGrams([t]).all()[0].tolist()) for t in ("dog bites man", "man bites dog"))
    assert one != two and len(one & two) >= 3


# ---- counts and cues


@pytest.mark.parametrize("cue", CUES)
def test_every_cue_is_found(cue):
    for word in CUES[cue].split():
        chinese = not word.isascii()
        for text in (word, word.upper(), f"请{word}吧。" if chinese else f"please, {word}!"):
            found = cue_features(text)
            assert found[f"cue {cue}"] == 1 and found[f"early {cue}"] == 1, text
        late = cue_features("z " * 20 + word)
        assert late[f"cue {cue}"] == 1 and late[f"early {cue}"] == 0
    assert not cue_features("zz qq")[f"cue {cue}"]


@pytest.mark.parametrize(
    "text, name",
    [
        ("Write a story", "cue story"),
        ("写一个关于狗的故事", "cue story"),
        ("请详细解释量子力学", "cue explain"),
        ("把下面的句子翻译成英文", "cue rewrite"),
        ("Is it true?", "opens is"),
        ("What is life?", "opens what"),
        ("Is it true?", "ends in question"),
        ("这是什么？", "ends in question"),
        ("这是什么？", "question marks"),
        ("Do it step by step", "step_by_step"),
        ("in one sentence", "one_sentence"),
        ("Use the following text", "passage"),
        ("根据以下内容", "passage"),
        ("f(x) = `y`", "code marks"),
        ('say "hi"', "quotes"),
        ("a: b", "colon"),
        ("a：b", "colon"),
        ("12", "digits"),
        ("ABC", "capitals"),
        ("a\nb", "has rest"),
    ],
)
def test_what_is_seen(text, name):
    assert cue_features(text)[name] > 0


@pytest.mark.parametrize(
    "text, name",
    [
        ("The listless man", "cue list"),
        ("Tell what", "opens what"),
        ("Is it? No.", "ends in question"),
        ("a\n \n", "has rest"),
        ("abc", "digits"),
        ("", "words > 60"),
    ],
)
def test_what_is_not_seen(text, name):
    assert cue_features(text)[name] == 0


def test_share_of_chinese():
    assert (
        cue_features("你好世界")["chinese share"],
        cue_features("hello")["chinese share"],
        cue_features("")["chinese share"],
    ) == (1, 0, 0)
    assert 0 < cue_features("你好 world")["chinese share"] < 1


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("write 5 sentences", {"lines": 5}),
        ("Give me three reasons", {"items": 3}),
        ("a 500-word essay", {"words": 500}),
        ("500字", {"words": 500}),
        ("三种方法", {"items": 3}),
        ("五个例子", {"items": 5}),
        ("two short paragraphs", {"paragraphs": 2}),
        ("10 tips", {"items": 10}),
        ("twenty ideas", {"items": 20}),
        ("3 examples and 2 pages", {"items": 3, "paragraphs": 2}),
        ("2 lines or 9 lines", {"lines": 9}),
        ("0 words", {"words": 0}),
        ("version 2.5 sentences", {}),
        ("room 5", {}),
        ("often lines", {}),
        ("٥ sentences", {"lines": 5}),
    ],
)
def test_numbers_asked_for(text, wanted):
    assert asked(text) == {name: value for name, value in wanted.items() if value}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("写一篇500字的作文", {"words": 500}),
        ("请给出三种方法", {"items": 3}),
        ("列举5个例子", {"items": 5}),
        ("用两句话总结", {"lines": 2}),
    ],
)
def test_numbers_asked_for_amid_chinese(text, wanted):
    assert asked(text) == wanted


@pytest.mark.parametrize("text", ["sixty items", "fourteen lines", "100000 words"])
def test_the_beginning_of_a_number_is_not_the_number(text):
    assert not {round(v) for v in asked(text).values()} & {4, 6, 10, 10_000}


@pytest.mark.parametrize(
    "text",
    [
        "1 " * 1000,
        "1" * 2000,
        "1-" * 1000,
        "one" * 600,
        "一" * 2000,
        "1" + " " * 1998,
        "1 a" * 700,
        "?" * 2000,
        "9" * 5 + "w" * 1990,
    ],
)
def test_no_text_takes_long(text):
    import time

    TextGrams(["warm"]).cue_features()
    started = time.thread_time()
    TextGrams([text]).cue_features()
    assert time.thread_time() - started < 0.5
