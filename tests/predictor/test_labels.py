"""Rows to labels, groups of similar prompts, and splits that depend on the prompts alone."""

import gzip
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm import load_tokenizer
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from finetune.rows.formats import BadRow
from finetune.rows.near_duplicates import group_prompts, normalise, shingle_hashes
from finetune.rows.sources import split_names
from predictor.labels import (
    Label,
    LabelledPrompt,
    data_hash,
    make_counter,
    read_examples,
    split_groups,
)
from tests.conftest import shared_file

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "how",
    "why",
    "what",
    "train",
    "lamp",
    "river",
    "水泵",
    "漏油",
    "why;",
    "DOES",
    "does",
]
texts = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
)
prompt_lists = st.lists(texts, min_size=1, max_size=40)


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_real(relative: str) -> list[dict]:
    with gzip.open(shared_file(relative), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def instructions() -> list[dict]:
    return read_real("data/length/instructions.jsonl.gz")


# ---- rows


@pytest.mark.parametrize(
    "row, prompt, labels",
    [
        ({"prompt": "p", "output_tokens": 3}, "p", [(3, "m", True)]),
        (
            {
                "prompt": "p",
                "output_tokens": 0,
                "served_model": "n",
                "finished": False,
                "sample": 4,
                "settings": {},
            },
            "p",
            [(0, "n", False)],
        ),
        (
            {"instruction": "a", "input": "b", "output_tokens": 10_000_000},
            "ab",
            [(10_000_000, "m", True)],
        ),
        (
            {"instruction": "a", "output": "abcd", "output_tokens": 9},
            "a",
            [(9, "m", True)],
        ),  # what was measured counts
        ({"instruction": "a", "input": "b", "output": "abcd"}, "ab", [(4, "m", True)]),
        ({"instruction": "a", "output": ["abcd", ""]}, "a", [(4, "m", True), (0, "m", True)]),
        ({"text": "t", "answer": "ab", "served_model": "n"}, "t", [(2, "n", True)]),
        ({"prompt": "p", "response": "abc", "finished": False}, "p", [(3, "m", False)]),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
def test_row_forms(tmp_path, name, row, prompt, labels):
    (example,), bad = read_examples(write(tmp_path / name, [row]), served_model="m", count=len)
    assert (
        example.prompt,
        [(x.tokens, x.served_model, x.finished) for x in example.labels],
        bad,
    ) == (prompt, labels, 0)
    assert example.source == name and example.place == f"{tmp_path / name}:1"


@pytest.mark.parametrize(
    "row, said",
    [
        ([], "wanted an object, got list"),
        ({}, 'no key "prompt"'),
        ({"prompt": 3, "output_tokens": 1}, '"prompt" must be text, got 3'),
        ({"prompt": "", "output_tokens": 1}, "the prompt is empty"),
        ({"prompt": " \n", "output_tokens": 1}, "the prompt is empty"),
        ({"prompt": "p", "output_tokens": -1}, "a whole number from 0 to 10,000,000, got -1"),
        ({"prompt": "p", "output_tokens": 10_000_001}, "got 10000001"),
        ({"prompt": "p", "output_tokens": True}, "got true"),
        ({"prompt": "p", "output_tokens": 3.0}, "got 3.0"),
        ({"prompt": "p", "output_tokens": "3"}, 'got "3"'),
        ({"prompt": "p", "output_tokens": None}, "got null"),
        (
            {"prompt": "p", "output_tokens": 3, "finished": 1},
            '"finished" must be true or false, got 1',
        ),
        (
            {"prompt": "p", "output_tokens": 3, "served_model": 1},
            '"served_model" must be text, got 1',
        ),
        ({"prompt": "p"}, 'no "output_tokens" and no "response"'),
        ({"instruction": "p", "input": "q"}, 'no "output"'),
        ({"instruction": "p", "output": None}, '"output" must be text, got null'),
        ({"instruction": "p", "input": 1, "output": "x"}, '"input" must be text, got 1'),
        ({"text": "p", "answer": "x"}, "served model's tokenizer"),
        ({"prompt": "\ud800", "output_tokens": 1}, "half a surrogate pair"),
    ],
)
def test_bad_rows_are_one_line_or_skipped(tmp_path, row, said):
    file = tmp_path / "rows.json"
    file.write_text(
        "".join(json.dumps(r) + "\n" for r in ({"prompt": "good", "output_tokens": 1}, row))
    )
    count = None if "tokenizer" in said else len
    with pytest.raises(BadRow) as error:
        read_examples(file, served_model="m", count=count)
    assert (
        str(error.value).startswith(f"{file}:2: ")
        and said in str(error.value)
        and "\n" not in str(error.value)
    )
    examples, bad = read_examples(file, served_model="m", count=count, on_bad_row="skip")
    assert len(examples) == 1 and bad == 1


def test_rows_of_a_prompt_are_one_example(tmp_path):
    files = [
        write(
            tmp_path / "a.json",
            [
                {"prompt": "x", "output_tokens": 1, "source": "s"},
                {"prompt": "y", "output_tokens": 2},
            ],
        ),
        write(
            tmp_path / "b.jsonl.gz",
            [
                {"prompt": "x", "output_tokens": 3, "served_model": "n"},
                {"prompt": "z", "output_tokens": 4},
            ],
        ),
    ]
    examples, bad = read_examples(files, served_model="m")
    assert examples[0] == LabelledPrompt("x", (Label(1, "m"), Label(3, "n")), "s", f"{files[0]}:1")
    assert [e.prompt for e in examples] == ["x", "y", "z"] and bad == 0
    assert [e.prompt for e in read_examples(files, served_model="m", limit=3)[0]] == [
        "x",
        "y",
    ]  # three rows
    turned = read_examples(files[::-1], served_model="m")[0]
    assert data_hash(turned) == data_hash(examples) != data_hash(examples[:2])
    assert data_hash([LabelledPrompt("x", (Label(1, "m", False),), "s", "")]) != data_hash(
        [LabelledPrompt("x", (Label(1, "m"),), "s", "")]
    )


def test_names_with_commas(tmp_path):
    """A comma list, its last comma, and a file that has a comma in its own name."""
    assert split_names("a.jsonl, b.jsonl,", "--data") == ["a.jsonl", "b.jsonl"]
    own = write(tmp_path / "a,b.jsonl", [{"prompt": "x", "output_tokens": 1}])
    assert split_names(str(own), "--data") == [str(own)]
    with pytest.raises(ValueError, match="--data: no file in ', '"):
        split_names(", ", "--data")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.gz"):
        read_examples(tmp_path / "none.gz", served_model="m")
    whole = write(tmp_path / "a.gz", [{"prompt": "x", "output_tokens": 1}]).read_bytes()
    for content in (whole[:-9], b"text", whole[:20] + b"\xff" * 20):
        (tmp_path / "b.gz").write_bytes(content)
        with pytest.raises(BadRow, match="b.gz: not a whole gzip file"):
            read_examples(tmp_path / "b.gz", served_model="m")
    (tmp_path / "c.json").write_text("\n")
    with pytest.raises(BadRow, match="c.json: no rows"):
        read_examples(tmp_path / "c.json", served_model="m")
    (tmp_path / "d.gz").write_bytes(
        gzip.compress(b'{"prompt": "x", "output_tokens": 1}\n{"prompt": \n{]\n')
    )
    with pytest.raises(BadRow, match="d.gz:2: not valid JSON"):
        read_examples(tmp_path / "d.gz", served_model="m")
    assert read_examples(tmp_path / "d.gz", served_model="m", on_bad_row="skip")[1] == 2
    (tmp_path / "e.gz").write_bytes(gzip.compress(b'[{"prompt": "x", "output_tokens": 1}]'))
    assert len(read_examples(tmp_path / "e.gz", served_model="m")[0]) == 1
    for name, content in (("f.jsonl", b"\n\xff\n"), ("f.gz", gzip.compress(b"\n\xff\n"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRow, match=f"{name}:2: not UTF-8"):
            read_examples(tmp_path / name, served_model="m")


@pytest.mark.parametrize("family", CHATGLM_FAMILIES)
def test_counter_counts_what_is_trained_on(tiny_folders, family):
    tokenizer = load_tokenizer(tiny_folders[family])
    for answer in ("", "你好 世界", " hello\n\n world  a", "</s> <eop> [gMASK]", "🙂"):
        lengths = [
            len(FAMILIES[family].encode_example(tokenizer, "你好", a, 500, 100).input_ids)
            for a in (answer, "")
        ]
        assert make_counter(tokenizer)(answer) == lengths[0] - lengths[1]


def test_counter_agrees_with_the_published_counts(instructions):
    """README of the data: pieces of the real ChatGLM2 tokenizer, no special tokens."""
    count = make_counter(load_tokenizer(shared_file("data/chatglm2-tokenizer"), mode="glm2"))
    assert all(count(row["output"]) == row["output_tokens_chatglm2"] for row in instructions[::500])


# ---- groups


@given(prompt_lists)
@settings(max_examples=50, deadline=None)
def test_groups_hold_the_same_text_and_know_no_order(prompts):
    groups = group_prompts(prompts)
    assert all(groups[g] == g <= i for i, g in enumerate(groups))
    by_text = {}
    assert all(by_text.setdefault(normalise(p), g) == g for p, g in zip(prompts, groups))
    turned = group_prompts(prompts[::-1])[::-1]
    assert len({*zip(groups, turned)}) == len({*groups}) == len({*turned})


@given(texts)
def test_normalised_is_normal(text):
    assert normalise(normalise(text)) == normalise(text) == normalise(f"  {text}?! ")


def test_normalised_by_hand():
    assert (
        normalise("  Ｈｅｌｌｏ,\n WORLD! ") == "hello world"
        and normalise("什么是 AI？") == "什么是 ai"
        and normalise("Straße") == "strasse"
    )


@given(st.lists(st.text("abc水", max_size=9), min_size=1, max_size=6))
def test_shingles_are_the_five_grams(prompts):
    """Hashes are equal exactly where the 5-grams are; no window reaches into the next text."""
    padded = [text.ljust(5, "\0") for text in prompts]
    grams = [text[i : i + 5] for text in padded for i in range(len(text) - 4)]
    hashes, starts = shingle_hashes(prompts)
    assert len(hashes) == len(grams) and len({*zip(hashes.tolist(), grams)}) == len(
        {*grams}
    ) == len({*hashes.tolist()})
    assert starts.tolist() == np.cumsum([0, *(len(text) - 4 for text in padded)])[:-1].tolist()


def jaccard(a: str, b: str) -> float:
    a, b = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (normalise(a), normalise(b)))
    return len(a & b) / len(a | b)


def test_near_duplicates_share_a_group_and_only_they():
    long = (
        "Explain in simple words how a steam engine turns "
        "the heat of burning coal into motion of wheels"
    )
    other = (
        "List five cities in the north of Italy "
        "that a visitor with little money should not miss, and why"
    )
    prompts = [
        long,
        other,
        long + ", please",
        "Please " + other.lower(),
        long.replace("steam", "Stirling").replace("coal", "old wood"),
    ]
    assert [jaccard(long, p) >= 0.8 for p in prompts] == [
        True,
        False,
        True,
        False,
        False,
    ] and jaccard(prompts[3], other) >= 0.8
    assert group_prompts(prompts).tolist() == [0, 1, 0, 1, 4]
    assert group_prompts(prompts, threshold=0.4).tolist() == [0, 1, 0, 1, 0]
    assert group_prompts(prompts, threshold=1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="threshold"):
        group_prompts(prompts, threshold=0)
    assert group_prompts([]).tolist() == [] and group_prompts(["?"]).tolist() == [0]


def test_groups_do_not_chain():
    """Each text is like the next; the ends, which have nothing in common, are apart."""
    words = np.random.default_rng(0).permutation(
        [f"{a}{b}" for a in "abcdefghij" for b in range(100, 120)]
    )
    chain = [" ".join(words[i : i + 60]) for i in range(0, 60, 3)]
    groups = group_prompts(chain + [f"{n} {n}" for n in range(80)])[: len(chain)]
    assert (
        all(jaccard(a, b) >= 0.8 for a, b in zip(chain, chain[1:]))
        and jaccard(chain[0], chain[-1]) < 0.1
    )
    alike = [
        jaccard(chain[i], chain[j]) for i in range(20) for j in range(20) if groups[i] == groups[j]
    ]
    assert 1 < len({*groups.tolist()}) < len(chain) and min(alike) > 0.6


def test_one_instruction_for_all_is_not_one_group(caplog):
    template = (
        "Read the report of the workshop below and write down every part that failed, "
        "one line each, in the order of the text: "
    )
    prompts = [
        template + word for word in ("pump", "lamp", "seal", "tyre", "belt") for _ in range(2)
    ] + [f"{template}no. {n}" for n in range(30)]
    with caplog.at_level(logging.WARNING):
        groups = group_prompts(prompts)
    assert len({*groups.tolist()}) == 35 and groups[0] == groups[1] != groups[2]
    assert "much alike" in caplog.text


def test_real_prompts(instructions):
    """The 371 of vicuna-blog-eval are alpaca_eval's, and groups stay small."""
    instructions = [
        row
        for n, row in enumerate(instructions)
        if n % 8 == 0 or row["source"].startswith("vicuna-blog-eval")
    ]
    prompts = [row["instruction"] + row["input"] for row in instructions]
    asked = sorted({row["instruction"] for row in read_real("data/length/alpaca_eval.jsonl.gz")})
    groups = group_prompts(prompts + asked)
    evaluated = {*groups[len(prompts) :].tolist()}
    vicuna = [
        i for i, row in enumerate(instructions) if row["source"].startswith("vicuna-blog-eval")
    ]
    assert len(vicuna) == 371 and all(groups[i] in evaluated for i in vicuna)
    counts = np.bincount(groups)
    assert counts.max() < 50 and (counts > 0).sum() < len({*map(normalise, prompts + asked)})
    parts = split_groups(groups, prompts + asked, {"train": 0.8, "valid": 0.1, "test": 0.1})
    assert (
        sum(map(len, parts.values())) == len(groups)
        and abs(len(parts["test"]) / len(groups) - 0.1) < 0.02
    )


# ---- splits


@given(
    st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=30, max_size=60, unique=True),
    st.text(max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_a_prompt_has_its_side_in_any_data(prompts, salt):
    def side_of(prompts):
        parts = split_groups(
            np.arange(len(prompts)), prompts, {"train": 0.5, "test": 0.5}, salt=salt
        )
        assert sorted(np.concatenate([*parts.values()]).tolist()) == list(range(len(prompts)))
        return {prompts[i]: name for name, part in parts.items() for i in part}

    try:
        whole, half = side_of(prompts), side_of(prompts[::-2])
    except ValueError:  # all on one side: possible, if hardly
        return
    assert all(whole[p] == side for p, side in half.items())


def test_split_shares_and_groups():
    prompts = [f"question {n} " + "abcdefghij"[n % 10] * 5 for n in range(5000)]
    groups = np.arange(5000) // 2 * 2
    parts = split_groups(groups, prompts, {"train": 0.5, "valid": 0.1, "test": 0.2})
    assert [round(len(parts[name]) / 5000, 1) for name in ("train", "valid", "test")] == [
        0.7,
        0.1,
        0.2,
    ]  # the rest is the first's
    assert all(
        {*groups[parts[a]]}.isdisjoint(groups[parts[b]])
        for a, b in (("train", "valid"), ("train", "test"), ("valid", "test"))
    )
    again = split_groups(groups, prompts, {"train": 0.0, "valid": 0.1, "test": 0.2})
    assert all((parts[name] == again[name]).all() for name in parts)
    assert not np.array_equal(
        parts["test"],
        split_groups(groups, prompts, {"train": 0.7, "valid": 0.1, "test": 0.2}, salt="x")["test"],
    )


@pytest.mark.parametrize(
    "shares, said",
    [
        ({"train": 0.9, "test": 0.2}, "1 in all"),
        ({"train": -0.1, "test": 0.2}, "from 0 to 1"),
        ({}, "shares"),
        ({"train": float("nan")}, "shares"),
        (
            {"train": 1.0, "test": 0.0},
            r"3 prompts in 2 groups leave nothing for test of .*\(train 3, test 0\)",
        ),
    ],
)
def test_splits_that_cannot_be(shares, said):
    with pytest.raises(ValueError, match=said):
        split_groups(np.array([0, 0, 2]), ["a", "a", "b"], shares)
