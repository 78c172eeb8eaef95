"""The bytes of tokens are what their decoded text holds: tiny vocabularies, and real ones."""

import gzip
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm import load_tokenizer
from serving.server.vocabulary import drops_first_space, token_bytes
from tests.causal_folders import make_causal_folder
from tests.conftest import shared_file

FAMILIES = ("glm", "glm2", "glm3", "glm4")
REAL = {
    "glm": ("relatives-tokenizers/chatglm-6b/ice_text.model.gz", "ice_text.model"),
    "glm2": ("chatglm2-tokenizer/tokenizer.model", "tokenizer.model"),
    "glm3": ("chatglm2-tokenizer/tokenizer.model", "tokenizer.model"),
    "glm4": ("relatives-tokenizers/glm4/tokenizer.model.gz", "tokenizer.model"),
}
TEXTS = [
    '{"name": "北京,上海", "a": [1, 2.5,\n  true], "b": {}}',
    "```python\ntool_call(a=\"x\", b='y')\n```",
    "你好 世界\tx    y\n\n z 😀 é ü a ,b . c n't !",
    "<|user|> [gMASK] </s> <n> <|tab|> <0x0A>",
]


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2", "llama"])
def tokenizer(request, tiny_folders, tmp_path_factory):
    if request.param in FAMILIES:
        return load_tokenizer(tiny_folders[request.param])
    return load_tokenizer(make_causal_folder(tmp_path_factory.mktemp("causal"), request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def real_tokenizer(request, tmp_path_factory):
    source, name = REAL[request.param]
    folder = tmp_path_factory.mktemp("real")
    path = shared_file(f"data/{source}")
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as packed, (folder / name).open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    config = json.dumps({"glm_family": request.param})
    (folder / "tokenizer_config.json").write_text(config)
    return load_tokenizer(folder)


def text_of(tokenizer, texts, ids):
    """The joined bytes of ids, as decoding shows them."""
    text = b"".join(texts[index] or b"" for index in ids).decode("utf-8", "replace")
    return text.removeprefix(" ") if drops_first_space(tokenizer) else text


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check(tokenizer, texts, text):
    ids = tokenizer.encode_text(text)
    if None in [texts[index] for index in ids]:
        # A character that the tiny vocabularies have no piece and no bytes for.
        assert tokenizer.unk_token_id in ids
        return
    shown = [text_of(tokenizer, texts, ids)]
    if drops_first_space(tokenizer):  # not where it is a byte or one of several spaces
        shown.append(f" {shown[0]}")
    assert decoded(tokenizer, ids) in shown


def test_tiny_vocabularies(tokenizer):
    texts = token_bytes(tokenizer)
    assert len(texts) == len(tokenizer)
    assert all(texts[index] is None for index in tokenizer.stop_ids)
    for text in TEXTS:
        check(tokenizer, texts, text)
    joined = b"".join(texts[index] or b"" for index in tokenizer.encode_text('{"a": 1}'))
    assert joined.decode().strip() == '{"a": 1}'

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=30))
    def holds(text):
        check(tokenizer, texts, text)

    holds()


def test_real_vocabularies(real_tokenizer):
    texts = token_bytes(real_tokenizer)
    assert all(texts[index] is None for index in real_tokenizer.stop_ids if index < len(texts))
    for text in TEXTS:
        check(real_tokenizer, texts, text)
    for text in TEXTS[:2]:  # nothing in them is rewritten
        ids = real_tokenizer.encode_text(text)
        assert text_of(real_tokenizer, texts, ids) == text

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=30))
    def holds(text):
        check(real_tokenizer, texts, text)

    holds()
