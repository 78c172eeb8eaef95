"""`return_offsets_mapping` of every family: ids are unchanged, spans are the tokens' own text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm import load_tokenizer
from chatglm.families import OWN_FAMILIES
from tests.conftest import shared_file

TEXTS = st.text(alphabet="你好世界 ab\n\t?，<n|>[gMASK]é①😀", max_size=30)
LOADED: dict = {}


def loaded(tiny_folders, family):
    if family not in LOADED:
        LOADED[family] = load_tokenizer(tiny_folders[family])
    return LOADED[family]


@pytest.mark.parametrize("family", OWN_FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_ids_and_spans(tiny_folders, family, text):
    tokenizer = loaded(tiny_folders, family)
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode_text(text) and len(ids) == len(offsets)
    last = 0
    for start, end in offsets:
        assert 0 <= start <= end <= len(text)
        assert last <= max(start, last)
        last = max(last, end)
    covered = "".join(text[start:end] for start, end in dict.fromkeys(offsets))
    assert set(text.split()) <= set(covered.split()) or family != "glm2"


@pytest.mark.parametrize("family", OWN_FAMILIES)
def test_a_call_with_offsets(tiny_folders, family):
    tokenizer = loaded(tiny_folders, family)
    texts = ["你好 世界 hello", "a"]
    for options in ({}, {"padding_side": "right"}, {"truncation": True, "max_length": 5}):
        options = {"padding": True} | options
        plain = tokenizer(texts, **options)
        batch = tokenizer(texts, return_offsets_mapping=True, **options)
        assert batch["input_ids"] == plain["input_ids"]
        for text, row, spans in zip(texts, batch["input_ids"], batch["offset_mapping"]):
            assert len(row) == len(spans)
            said = [i for i, (start, end) in zip(row, spans) if end > start]
            assert set(said) <= set(tokenizer.encode_text(text))
    one = tokenizer("你好", return_offsets_mapping=True, add_special_tokens=False)
    assert one["offset_mapping"] == tokenizer.encode_with_offsets("你好")[1]
    tensors = tokenizer(texts, return_offsets_mapping=True, padding=True, return_tensors="pt")
    assert tensors["offset_mapping"].shape == (*tensors["input_ids"].shape, 2)
    assert torch.equal(
        tensors["input_ids"], tokenizer(texts, padding=True, return_tensors="pt").input_ids
    )
    with pytest.raises(ValueError, match="takes one text, or a list of texts, alone"):
        tokenizer("a", text_pair="b", return_offsets_mapping=True)


def test_spans_of_the_real_vocabulary():
    tokenizer = load_tokenizer(shared_file("data/chatglm2-tokenizer"), mode="glm2")
    text = "你好  hello\n ①é😀 x"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert [text[start:end] for start, end in offsets] == [
        *("你", "好", "  ", "hell", "o", "\n", " ", "①", "é", "😀", " x")
    ]
    assert ids == tokenizer.encode_text(text)
