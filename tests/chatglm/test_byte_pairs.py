"""GLM-4's byte-pair vocabulary against the original tokenizer's ids, and its reader's errors."""

import base64
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.byte_pairs import (
    BYTES,
    byte_pair_encoder,
    find_merges,
    is_tiktoken_file,
    read_ranks,
)
from tests.conftest import shared_file

MERGES = [b"ab", b"bc", b"abc", b"  ", b"\xe4\xbd", b"\xe4\xbd\xa0"]


def write_vocabulary(path, tokens):
    lines = []
    for rank, token in enumerate(tokens):
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def vocabulary(tmp_path):
    return write_vocabulary(tmp_path / "tokenizer.model", [*BYTES, *MERGES])


@pytest.fixture(scope="module")
def small():
    return byte_pair_encoder({token: rank for rank, token in enumerate([*BYTES, *MERGES])})


def check_golden(encoder, file):
    golden = json.loads(shared_file(f"golden/relatives/tokenizer/{file}").read_text("utf-8"))
    strings = golden["strings"]
    assert len(strings) > 50
    for row in strings:
        plain = row["ids_plain"]
        wanted = row["ids"] if plain == "same as ids" else plain
        assert encoder.encode(row["text"], add_special_tokens=False).ids == wanted, row["text"]


def test_real_vocabulary_gives_the_originals_ids(tmp_path):
    packed = shared_file("data/relatives-tokenizers/glm4/tokenizer.model.gz")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    ranks = read_ranks(path)
    assert len(ranks) == 151329
    check_golden(byte_pair_encoder(ranks), "glm4.json")


def test_stand_in_vocabulary_gives_the_originals_ids():
    folder = shared_file("golden/relatives/tokenizer/glm4_standin")
    encoder = byte_pair_encoder(read_ranks(folder / "tokenizer.model"))
    check_golden(encoder, "glm4_standin.json")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_come_back(small, text):
    ids = small.encode(text, add_special_tokens=False).ids
    tokens = [*BYTES, *MERGES]
    assert b"".join(tokens[i] for i in ids) == text.encode()


def test_lowest_rank_is_merged_first(small):
    # ab (256) before bc (257), then abc (258)
    assert small.encode("abc", add_special_tokens=False).ids == [258]
    assert small.encode("abbc", add_special_tokens=False).ids == [256, 257]


def test_every_way_to_a_token_is_a_merge():
    ranks = {token: rank for rank, token in enumerate([*BYTES, *MERGES])}
    assert [merge for merge in find_merges(ranks) if "".join(merge) == "abc"] == [
        ("a", "bc"),
        ("ab", "c"),
    ]


def test_file_is_told_from_other_vocabularies(vocabulary, tmp_path):
    assert is_tiktoken_file(vocabulary)
    other = tmp_path / "sentencepiece.model"
    other.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert not is_tiktoken_file(other)
    assert not is_tiktoken_file(tmp_path / "not there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:200], "no token for the byte 0xc8; it is cut short"),
        (lambda lines: lines[:9] + [b"!? 9"] + lines[10:], "line 10: wanted a token in base64"),
        (lambda lines: lines[:9] + [b"CQ=="] + lines[10:], "line 10: wanted a token in base64"),
        (lambda lines: lines[:9] + lines[10:], "line 10: wanted rank 9, got 10"),
        (lambda lines: lines + [b"YWI= 262"], "line 263: wanted rank 262, got 262"),
    ],
    ids=["cut short", "no base64", "no rank", "a rank left out", "a token twice"],
)
def test_damaged_file_is_named_with_its_line(vocabulary, change, message):
    vocabulary.write_bytes(b"\n".join(change(vocabulary.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=message) as error:
        read_ranks(vocabulary)
    assert str(vocabulary) in str(error.value)
