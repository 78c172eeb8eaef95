"""Rows to batches: parsing with file and line, counting, an order that ranks do not change.

Nor does gradient accumulation.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm import load_tokenizer
from chatglm.families import FAMILIES
from finetune.rows.arrays import EncodedRow, dataset_of
from finetune.rows.batches import (
    IGNORED,
    SHORTEST_TRUNK,
    collate,
    count_labels,
    epoch_order,
    step_rows,
)
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import BadRow, Row, parse_row
from finetune.rows.sources import read_rows
from tests.conftest import shared_file
from tests.finetune.runs import make_rows, rows_of, write_rows

GOOD = '{"instruction": "a", "input": "b", "output": "c"}'


LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=70).map(np.array)


@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 50))
def test_epoch_order(lengths, seed, epoch):
    order = epoch_order(lengths, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert np.array_equal(order, epoch_order(lengths, seed, epoch))
    assert np.array_equal(
        order, epoch_order(lengths[::-1], seed, epoch)
    )  # lengths matter to groups alone


@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 9))
def test_grouped_epoch_order(rows, group, seed, epoch):
    """A permutation in batches of neighbours in length, the incomplete batch last."""
    lengths = np.random.default_rng(seed).integers(2, 300, rows)
    order = epoch_order(lengths, seed, epoch, group=group)
    assert sorted(order) == list(range(rows)) and np.array_equal(
        order, epoch_order(lengths, seed, epoch, group=group)
    )
    whole = rows // group * group
    batches = [lengths[order[i : i + group]] for i in range(0, whole, group)]
    rest = set(order[whole:])
    assert len(rest) == rows % group
    # Each window of 50 batches is cut into batches by length, so no two batches of a window
    # overlap.
    plain = epoch_order(lengths, seed, epoch)
    windows = [set(plain[i : i + 50 * group]) for i in range(0, rows, 50 * group)]
    for window in windows:
        inside = [(b.min(), b.max()) for i, b in enumerate(batches) if order[i * group] in window]
        assert all(high <= low for (_, high), (low, _) in zip(sorted(inside), sorted(inside)[1:]))
    for i in range(0, whole, group):
        assert sum(set(order[i : i + group]) <= window for window in windows) == 1
    assert rest <= windows[-1]


@pytest.mark.parametrize("group", [0, 4])
def test_epochs_and_seeds_differ(group):
    lengths = np.arange(40)
    orders = {
        tuple(epoch_order(lengths, seed, epoch, group=group))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@given(
    LENGTHS,
    st.sampled_from([1, 2, 3, 4, 8, 12]),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_step_rows(lengths, product, micro, seed, grouped):
    """Micro batch x accumulation x ranks = one product: every step reads the same rows.

    Each row is read once an epoch. No pass has many more tokens than another.
    """
    size, rows = product * micro, len(lengths)
    order = epoch_order(lengths, seed, 0, group=size if grouped else 0)
    for accumulation in range(1, product + 1):
        if product % accumulation:
            continue
        world, seen = product // accumulation, []
        for step in range(-(-rows // size)):
            options = {"micro": micro, "accumulation": accumulation, "world": world}
            split = [step_rows(order, step, lengths, rank=r, **options) for r in range(world)]
            assert {len(passes) for passes in split} == {accumulation}
            counts = {len(places) for passes in split for places in passes}
            assert len(counts) == 1 and 1 <= counts.pop() <= micro
            real = [row for passes in split for places in passes for row in places if row != -1]
            assert sorted(real) == sorted(order[step * size : (step + 1) * size])
            seen += real
            tokens = [
                sum(lengths[r] for r in places if r != -1) for passes in split for places in passes
            ]
            assert max(tokens) <= sum(tokens) / len(tokens) + lengths[real].max()
            for places in (places for passes in split for places in passes):  # dealt longest first
                own = [lengths[r] for r in places if r != -1]
                assert own == sorted(own, reverse=True)
        assert sorted(seen) == list(range(rows))


def test_rows_of_both_forms(tmp_path):
    lines = [
        GOOD,
        '{"instruction": "x", "output": "y"}',
        '{"text": "t", "answer": "u"}',
        '{"text": "t", "answer": ["u", "v"]}',
        "",
        "  ",
    ]
    (tmp_path / "rows.json").write_text("\n".join(lines))
    rows, bad = read_rows(tmp_path / "rows.json", prompt_text="ask: ")
    place = str(tmp_path / "rows.json")
    assert bad == 0 and rows == [
        Row("ab", ("c",), f"{place}:1"),
        Row("x", ("y",), f"{place}:2"),
        Row("ask: t", ("u",), f"{place}:3"),
        Row("ask: t", ("u", "v"), f"{place}:4"),
    ]
    assert len(read_rows(tmp_path / "rows.json", limit=2)[0]) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rows: json.dumps(rows),
        lambda rows: "\n [" + ",\n".join(map(json.dumps, rows)) + "]\n",
        lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)),
        lambda rows: "\r\n".join(map(json.dumps, rows)),
        lambda rows: "\ufeff" + json.dumps(rows),
        lambda rows: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    ],
    ids=["list", "list_over_lines", "bom", "crlf", "bom_list", "bare"],
)
def test_files_of_every_kind(tmp_path, wrap):
    """Also U+2028, U+0085 and form feeds inside a string, which are no ends of lines in JSON."""
    given = [
        {"instruction": "q", "input": f"a\u2028b\u0085c\x0c\x1c{i}", "output": "r\ns"}
        for i in range(3)
    ]
    (tmp_path / "rows.json").write_bytes(wrap(given).encode())
    rows, _ = read_rows(tmp_path / "rows.json")
    assert [(r.prompt, r.answers) for r in rows] == [
        ("q" + g["input"], (g["output"],)) for g in given
    ]


BAD = {
    "{": "not valid JSON",
    "[1]x": "not valid JSON",
    "3": "wanted an object, got int",
    "null": "NoneType",
    "{}": '"text"',
    '{"instruction": "a", "input": "b"}': '"output"',
    '{"output": "b"}': '"instruction"',
    '{"instruction": 1, "output": "b"}': '"instruction" must be text, got 1',
    '{"instruction": "a", "output": null}': "null",
    '{"instruction": "", "output": "b"}': "prompt is empty",
    '{"instruction": "a", "output": []}': '"output"',
    '{"instruction": "a", "output": [1]}': '"output"',
    '{"instruction": ["a"], "output": "b"}': '"instruction"',
    '{"instruction": "a", "input": 1, "output": "b"}': '"input"',
    '{"instruction": "a\\ud800", "output": "b"}': "surrogate",
    "1" * 5000: "not valid JSON",
    "[" * 100000: "not valid JSON",
}


@pytest.mark.parametrize("line", BAD, ids=[line[:40] for line in BAD])
def test_bad_rows_are_named(tmp_path, line):
    file = tmp_path / "rows.json"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(BadRow) as error:
        read_rows(file)
    assert (
        str(error.value).startswith(f"{file}:3: ")
        and BAD[line] in str(error.value)
        and "\n" not in str(error.value)
    )
    rows, bad = read_rows(file, on_bad_row="skip")
    assert (len(rows), bad) == (2, 1)


def test_bad_rows_of_a_list(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(f"[{GOOD},\n{GOOD},\n3]")
    with pytest.raises(BadRow, match=r"rows\.json\[2\]: wanted an object"):
        read_rows(file)
    file.write_text(f"[{GOOD},\n{GOOD},\n")
    with pytest.raises(BadRow, match=r"rows\.json:3: not valid JSON"):
        read_rows(file)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (b"[]", "no rows"),
        (b"{}\n3", "no rows (2 bad ones skipped)"),
    ],
)
def test_files_without_rows(tmp_path, content, said):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(BadRow) as error:
        read_rows(tmp_path / "rows.json", on_bad_row="skip")
    assert said in str(error.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_rows(path)
    (tmp_path / "gbk.json").write_bytes(
        f"{GOOD}\n".encode() + '{"instruction": "水", "output": "泵"}'.encode("gbk")
    )
    with pytest.raises(ValueError, match=r"gbk\.json:2: not UTF-8"):
        read_rows(tmp_path / "gbk.json")


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
def test_encode_counts_cuts_and_skips(bases, family):
    tokenizer, rows = (
        load_tokenizer(bases[family]),
        [parse_row(r, f"f:{i}") for i, r in enumerate(make_rows(6))],
    )
    rows += [
        Row("水泵漏油。" * 40, ("漏油",), "f:prompt"),
        Row("水泵", ("水泵_性能故障_漏油\n" * 40,), "f:answer"),
    ]
    limits = {"max_len": 80, "max_src_len": 50}
    data = encode_rows(rows, tokenizer, FAMILIES[family], **limits)
    encode = FAMILIES[family].encode_example
    cut = [
        row.place
        for row in rows
        if encode(tokenizer, row.prompt, row.answers[0], **limits).truncated
    ]
    assert {"f:prompt", "f:answer"} <= set(cut) and (len(data), data.truncated, data.skipped) == (
        8,
        len(cut),
        0,
    )
    end = tokenizer.get_command(FAMILIES[family].end_token)
    assert [place for place, *_ in rows_of(data)] == [row.place for row in rows]
    assert all(
        ids[-1] == end and len(ids) <= 80 and 0 < n < len(ids) for _, ids, n, _ in rows_of(data)
    )
    kept = encode_rows(rows, tokenizer, FAMILIES[family], **limits, is_skip=True)
    assert (kept.truncated, kept.skipped) == (len(cut), len(cut)) and rows_of(kept) == [
        row for row in rows_of(data) if row[0] not in cut
    ]
    with pytest.raises(ValueError, match="all 2 rows"):
        encode_rows(rows[-2:], tokenizer, FAMILIES[family], **limits, is_skip=True)
    with pytest.raises(BadRow, match=r"f:9: .*list of 2"):
        encode_rows([Row("a", ("b", "c"), "f:9")], tokenizer, FAMILIES[family], **limits)


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 8)), min_size=1, max_size=6), st.data())
def test_collate(shapes, draw):
    ids = [[100 * i + k for k in range(length)] for i, (length, _) in enumerate(shapes)]
    masked = [min(n, length - 1) for length, n in shapes]
    data = dataset_of(("", EncodedRow(row, n, False)) for row, n in zip(ids, masked))
    chosen = draw.draw(st.lists(st.integers(-1, len(ids) - 1), min_size=1, max_size=6))
    batch = collate(data, chosen, ragged=False, pad_id=7)
    assert (
        batch["input_ids"].shape == batch["labels"].shape
        and batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    )
    for row, got, labels in zip(chosen, batch["input_ids"].tolist(), batch["labels"].tolist()):
        if row == -1:
            assert set(labels) == {IGNORED} and got[0] in {i[0] for i in ids}
        else:
            size, n = len(ids[row]), masked[row]
            assert got == ids[row] + [7] * (len(got) - size)
            assert labels == [IGNORED] * n + ids[row][n:] + [IGNORED] * (len(got) - size)
    assert count_labels(batch) == sum(len(ids[row]) - masked[row] for row in chosen if row != -1)


@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=1, max_size=6),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([1, 8, 32]),
    st.data(),
)
def test_collate_ragged(shapes, common, share, multiple, draw):
    """Unpacked again, each sequence has the rows' tokens and labels.

    Rows may begin with `common` equal tokens.
    """
    ids = [
        [7] * min(common, length) + [100 * i + k for k in range(common, length)]
        for i, (length, _) in enumerate(shapes)
    ]
    masked = [min(n, length - 1) for length, n in shapes]
    data = dataset_of(("", EncodedRow(row, n, False)) for row, n in zip(ids, masked))
    chosen = draw.draw(st.lists(st.integers(-1, len(ids) - 1), min_size=1, max_size=6))
    batch = collate(data, chosen, share=share, multiple=multiple)
    row, lengths, shared = batch["input_ids"][0].tolist(), batch["lengths"], batch["shared"]
    keep, targets = batch["keep"].tolist(), batch["targets"].tolist()
    assert (
        len(row) % multiple == len(keep) % max(1, multiple // 2) == 0
        and keep
        and keep == sorted(keep)
        and min(lengths) > 0
        and sum(lengths) == len(row)
    )
    trunk = max(shared)
    assert set(shared[1:]) <= {trunk} and (
        not trunk or (share and trunk == lengths[0] >= SHORTEST_TRUNK)
    )
    starts, first = np.cumsum([0, *lengths]), 1 if trunk else 0
    assert len(lengths) - first == len(chosen)
    predicted = {}
    for place, target in zip(keep, targets):
        if target != IGNORED:
            assert place not in predicted
            predicted[place] = target
    shortest = min(map(len, ids))
    for i, r in enumerate(chosen, first):
        own = row[starts[i] : starts[i + 1]]
        sequence = row[:trunk] + own
        if r == -1:
            sequence = sequence[: shortest - 1]
            assert any(sequence == x[:-1] for x in ids) and not set(
                range(starts[i], starts[i + 1])
            ) & set(predicted)
            continue
        wanted = {
            starts[i] + p - trunk: ids[r][p + 1] for p in range(masked[r] - 1, len(ids[r]) - 1)
        }
        assert sequence[: len(ids[r]) - 1] == ids[r][:-1]
        assert (
            len(sequence) == len(ids[r]) - 1 or i == len(lengths) - 1
        )  # filled up behind the last alone
        assert {p: t for p, t in predicted.items() if starts[i] <= p < starts[i + 1]} == wanted
    assert (
        count_labels(batch) == len(predicted) == count_labels(collate(data, chosen, ragged=False))
    )
    # a beginning that all have in common and that predicts nothing is shared
    heads = [ids[r][: masked[r] - 1] if r >= 0 else min(ids, key=len)[:-2] for r in chosen]
    if share and len(chosen) > 1:
        same = next(
            (k for k, column in enumerate(zip(*heads)) if len(set(column)) > 1),
            min(map(len, heads)),
        )
        assert trunk == (same if same >= SHORTEST_TRUNK else 0)


def test_skipped_rows_are_said(flags, train, tmp_path, capsys):
    rows = write_rows(
        tmp_path / "rows.json",
        [
            *make_rows(6),
            {"instruction": "水" * 90, "output": "泵"},
            {"instruction": "", "output": "x"},
        ],
    )
    words = flags(
        tmp_path / "out",
        "--train_path",
        rows,
        "--is_skip",
        "--on_bad_row",
        "skip",
        "--max_steps",
        1,
    )
    train(words)
    assert "6 train rows, 1 bad ones skipped, 1 too long, skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, count, empty",
    [
        ("spo_0.json", 1441, 22),
        ("spo_1.json", 50, 0),
        ("d2q_0.json", 3143, 0),
        ("d2q_1.json", 20, 0),
    ],
)
def test_the_seeds_own_files_are_read(name, count, empty):
    """Rows with an empty answer too: "nothing to extract" is an answer.

    Its end token carries the loss.
    """
    rows, bad = read_rows(shared_file(f"data/finetune/{name}"))
    assert (len(rows), bad, sum(not any(row.answers) for row in rows)) == (count, 0, empty)
    for row in [row for row in rows if not any(row.answers)][:2]:
        from chatglm import FAMILIES, load_tokenizer

        tokenizer = load_tokenizer(shared_file("data/chatglm2-tokenizer"), mode="glm2")
        example = FAMILIES["glm2"].encode_example(tokenizer, row.prompt, "", 512, 384)
        assert example.labels[example.n_masked :] == [tokenizer.eos_token_id]


def test_t11_the_cache_keeps_what_was_used_last(tmp_path):
    """Of three files of 80 KB, a limit of 200 KB keeps the two used last; unrelated files stay."""
    import os

    from finetune.files import cache_arrays, read_arrays

    (tmp_path / "jieba.cache").write_bytes(b"x" * 10**6)
    arrays = {"x": np.zeros(10_000, np.int64)}
    for number, name in enumerate(("a", "b")):
        cache_arrays(tmp_path / f"{name}.safetensors", arrays, 2e-4)
        os.utime(tmp_path / f"{name}.safetensors", (number, number))
    assert len(read_arrays(tmp_path / "a.safetensors")["x"]) == 10_000  # a is used now
    cache_arrays(tmp_path / "c.safetensors", arrays, 2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.safetensors",
        "c.safetensors",
        "jieba.cache",
    ]
    cache_arrays(tmp_path / "d.safetensors", {"x": np.zeros(10**6)}, 2e-4)  # larger than the limit
    assert not list(tmp_path.glob("d.*"))
