"""Encoded rows as arrays: what goes in comes out, in memory and from a file; a file that is not
whole is none.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from chatglm.conversations import IGNORED
from finetune.rows import arrays
from finetune.rows.arrays import (
    EncodedRow,
    Place,
    RowWriter,
    chosen_rows,
    dataset_of,
    join_datasets,
    map_rows,
)
from tests.finetune.runs import rows_of

NAMES = ("first.jsonl", "second.2024.json")
PLAIN = EncodedRow([5, 6, 7], 1, False)
TALK = EncodedRow(
    [1, 2, 3, 4, 5, 6, 7, 8, 9], 2, True, [IGNORED, IGNORED, 3, 99, IGNORED, 6, 7, 8, 9]
)


@st.composite
def encoded_rows(draw):
    """(place, encoded row): some with labels of their own, holes and other ids among them; some
    that learn nothing.
    """
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
    labels = None
    if draw(st.booleans()):
        labels = [draw(st.sampled_from([i, IGNORED, 7])) for i in ids]
    tail = draw(st.sampled_from([":1", ":120", "[0]", ":data[7]", ":007", "", ":12x", "no number"]))
    return Place(draw(st.integers(0, 1)), tail), EncodedRow(
        ids, draw(st.integers(1, len(ids))), draw(st.booleans()), labels
    )


def wanted(rows):
    return [
        (NAMES[place.file] + place.tail, row.input_ids, row.n_masked, row.labels)
        for place, row in rows
    ]


def write(path, rows, key="key", facts=None):
    with open(path, "wb") as file:
        writer = RowWriter(file)
        for place, row in rows:
            writer.add(place, row)
        writer.finish(key, facts or {})
    return path


@given(st.lists(encoded_rows(), min_size=1, max_size=12), st.sampled_from([1, 10, 1 << 18]))
def test_rows_come_back(tmp_path_factory, rows, flush):
    """From memory and from a file; safetensors reads the file too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "FLUSH", flush)
        path = write(tmp_path_factory.getbasetemp() / "arrays.safetensors", rows, facts={"good": 3})
    mapped = map_rows(path, NAMES, "key", verify=True)
    writer = RowWriter()
    for place, row in rows:
        writer.add(place, row)
    for part in (mapped, writer.in_memory(NAMES, {"good": 3})):
        assert rows_of(part) == wanted(rows) and part.facts["good"] == 3
        assert part.lengths.tolist() == [len(row.input_ids) for _, row in rows]
        assert part.truncated.tolist() == [row.truncated for _, row in rows]
        assert part.ids(0).dtype == np.int32
    stored = load_file(path)
    assert stored["ids"][: stored["starts"][-1]].tolist() == [
        i for _, row in rows for i in row.input_ids
    ]


def test_a_file_costs_four_bytes_a_token_and_answers_an_eighth_more(tmp_path):
    plain = [(Place(0, f":{n}"), EncodedRow([n] * 1000, 1, False)) for n in range(500)]
    talks = [
        (place, row._replace(labels=[IGNORED, *row.input_ids[1:500], *[IGNORED] * 500]))
        for place, row in plain
    ]
    sizes = [
        write(tmp_path / name, rows).stat().st_size / 500_000
        for name, rows in (("plain", plain), ("talks", talks))
    ]
    assert sizes == pytest.approx([4.04, 4.18], abs=0.02)


@given(st.data())
def test_a_damaged_file_is_none(tmp_path_factory, draw):
    """A byte that changed anywhere, an end that is missing or that is more."""
    folder = tmp_path_factory.getbasetemp()
    rows = [(Place(0, ":1"), PLAIN), (Place(1, ":2"), TALK)]
    content = bytearray(write(folder / "whole.safetensors", rows).read_bytes())
    damaged = folder / "damaged.safetensors"
    number = draw.draw(st.one_of(st.integers(0, 1700), st.integers(4096, len(content) - 1)))
    content[number] ^= draw.draw(st.integers(1, 255))
    damaged.write_bytes(content)
    found = map_rows(damaged, NAMES, "key", verify=True)
    assert found is None or (
        number < 4096 and rows_of(found) == wanted(rows)
    )  # other spaces in the header
    content[number : number + draw.draw(st.integers(1, 9))] = b""
    damaged.write_bytes(content)
    assert map_rows(damaged, NAMES, "key") is None
    damaged.write_bytes(content + b"12345678")
    assert map_rows(damaged, NAMES, "key", verify=True) is None


def test_a_foreign_file_is_none(tmp_path):
    path = write(tmp_path / "rows", [(Place(0, ":1"), PLAIN)])
    assert (
        map_rows(path, NAMES, "another") is None
        and map_rows(tmp_path / "nothing", NAMES, "key") is None
    )
    assert map_rows(tmp_path, NAMES, "key") is None
    for content in (b"", b"{}", bytes(5000), (4088).to_bytes(8, "little") + b"[1]".ljust(4088)):
        path.write_bytes(content)
        assert map_rows(path, NAMES, "key") is None


def test_a_mapped_file_may_go_and_cannot_be_written(tmp_path):
    path = write(tmp_path / "rows", [(Place(0, ":1"), PLAIN)])
    rows = map_rows(path, NAMES, "key")
    path.unlink()
    assert rows.ids(0).tolist() == PLAIN.input_ids
    with pytest.raises(ValueError, match="read-only"):
        rows.ids(0)[0] = 1


def test_several_sources_are_one():
    """Rows without a label do not count, nor with `is_skip` those that were cut; the numbering goes
    on from part to part.
    """
    empty = EncodedRow([1, 2], 2, False)
    writer = RowWriter()
    for number, row in enumerate((PLAIN, empty, TALK, PLAIN)):
        writer.add(Place(0, f":{number}"), row)
    part = writer.in_memory(("a",), {})
    both = join_datasets(
        [chosen_rows(part, is_skip=True), dataset_of([("x", TALK)]), chosen_rows(part)]
    )
    assert [place for place, *_ in rows_of(both)] == ["a:0", "a:3", "x", "a:0", "a:2", "a:3"]
    assert rows_of(both)[4] == ("a:2", TALK.input_ids, 2, TALK.labels)
    assert both.row_lengths.tolist() == [3, 3, 9, 3, 9, 3] and (
        len(both),
        both.truncated,
        both.skipped,
    ) == (6, 2, 3)
    for row in (-1, 6):
        with pytest.raises(IndexError):
            both.ids(row)
