"""tokenizer.json against our tokenizers: ids and text, on real vocabularies and on small ones."""

import hashlib
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chatglm import load_tokenizer
from chatglm.export.folders import export_glm
from chatglm.export.vocabularies import fast_tokenizer, ranks_of_tokenizer
from tests.chatglm.export.outside import real_folder, run_outside, shared_texts
from tests.conftest import tiny_model, write_tokenizer

FAMILIES = ("glm2", "glm3", "glm4")
OUTSIDE = """
import hashlib, json
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
digest = hashlib.sha256()
for text in json.load(open(sys.argv[2], encoding="utf-8")):
    ids = tokenizer(text)["input_ids"]
    digest.update(json.dumps([ids, tokenizer.decode(ids, skip_special_tokens=True)]).encode())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def texts():
    return shared_texts()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_the_shared_data_are_ours(family, texts, tmp_path):
    tokenizer = load_tokenizer(real_folder(tmp_path / family, family))
    fast_tokenizer(tokenizer).save(str(tmp_path / "tokenizer.json"))
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    compared = 0
    for text in texts:
        if any(name in text for name in ("<s>", "[MASK]")):  # typed control tokens, see below
            continue
        ids = tokenizer.encode_text(text)
        found = fast.encode(text, add_special_tokens=False).ids
        assert found == ids, text
        shown = fast.decode(ids, skip_special_tokens=False)
        assert shown == tokenizer.decode(ids, clean_up_tokenization_spaces=False), text
        compared += 1
    assert compared >= 10_000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_a_process_without_us_gives_the_same_ids(family, texts, tmp_path):
    folder = real_folder(tmp_path / family, family)
    rows = 65024 if family == "glm3" else 151552
    sizes = {"hidden_size": 8, "kv_channels": 4, "ffn_hidden_size": 8, "num_layers": 1}
    heads = {"num_attention_heads": 2, "multi_query_group_num": 1}
    tiny_model(family, padded_vocab_size=rows, **sizes, **heads).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    export_glm(folder, tmp_path / "out")
    sample = [text for text in texts[:2000] if "<s>" not in text]
    (tmp_path / "texts.json").write_text(json.dumps(sample), encoding="utf-8")
    digest = hashlib.sha256()
    for text in sample:
        ids = tokenizer(text)["input_ids"]
        shown = tokenizer.decode(tokenizer.encode_text(text), clean_up_tokenization_spaces=False)
        digest.update(json.dumps([ids, shown]).encode())
    found = run_outside(OUTSIDE, tmp_path, tmp_path / "out", tmp_path / "texts.json")
    assert found.strip() == digest.hexdigest()


# ---- small vocabularies


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """{family: (our tokenizer, the exported one)}."""
    made = {}
    for family in FAMILIES:
        tokenizer = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp(family), family))
        made[family] = (tokenizer, fast_tokenizer(tokenizer))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("  \n你好 hello worldabc问：1[x]é😀"), max_size=40))
def test_any_text_has_our_ids(small, family, text):
    ours, theirs = small[family]
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_of_a_text_and_of_a_pair(small, family):
    ours, theirs = small[family]
    assert theirs.encode("你好").ids == ours("你好")["input_ids"]
    assert theirs.encode("你好", "a b").ids == ours("你好", "a b")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_have_their_ids_and_words_stay_words(small, family):
    ours, theirs = small[family]
    for name, index in ours.control_tokens.items():
        written = {"sop": "<sop>", "eop": "<eop>"}.get(name, name)
        assert theirs.token_to_id(written) == index
        # typed, it is read as one; our own tokenizer keeps it text
        assert theirs.encode(written, add_special_tokens=False).ids == [index]
        assert index not in ours.encode_text(written)
    for word in ("sophisticated people", "sop", "eop [Round 1]"):
        assert theirs.encode(word, add_special_tokens=False).ids == ours.encode_text(word)
    beyond = len(ours) + 3  # spare rows of the embedding have no text
    assert theirs.decode([beyond]) == ""


def train(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world ａｂｃ fine １２３ 你好 世界"] * 20),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        model_prefix=str(folder / "tokenizer"),
        **{"model_type": "bpe", "byte_fallback": True} | options,
    )
    (folder / "tokenizer_config.json").write_text('{"glm_family": "glm2"}')
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_normalisers_are_followed(tmp_path, options):
    ours = train(tmp_path, **options)
    theirs = fast_tokenizer(ours)
    for text in ("hello  world ", " ａｂｃ１２３", "你好\n 世界", "", "   ", "ﬁne\tx"):
        ids = ours.encode_text(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids, clean_up_tokenization_spaces=False), text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"model_type": "unigram"}, "another type than BPE"),
        ({"byte_fallback": False}, "without a fallback"),
        ({"user_defined_symbols": ["<x>"]}, "defined by a user"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces otherwise"),
    ],
    ids=["unigram", "no bytes", "symbols", "suffix"],
)
def test_other_vocabularies_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said) as error:
        fast_tokenizer(train(tmp_path, **options))
    assert str(tmp_path) in str(error.value)


# ---- back


def test_ranks_come_back_from_tokenizer_json(small, tmp_path):
    ours, theirs = small["glm4"]
    file = tmp_path / "tokenizer.json"
    theirs.save(str(file))
    with open(ours.vocab_file, "rb") as original:
        assert ranks_of_tokenizer(file) == original.read()
    # a copy in whose vocabulary the control tokens stand too
    values = json.loads(file.read_text("utf-8"))
    for token in values["added_tokens"]:
        values["model"]["vocab"][token["content"]] = token["id"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with open(ours.vocab_file, "rb") as original:
        assert ranks_of_tokenizer(file) == original.read()


def test_other_tokenizers_give_no_ranks(small, tmp_path):
    file = tmp_path / "tokenizer.json"
    small["glm2"][1].save(str(file))
    assert ranks_of_tokenizer(file) is None
    small["glm4"][1].save(str(file))
    values = json.loads(file.read_text("utf-8"))
    values["model"]["vocab"].pop("h")
    file.write_text(json.dumps(values), encoding="utf-8")
    assert ranks_of_tokenizer(file) is None


def test_a_fast_tokenizer_needs_no_model_of_ours(small):
    theirs = PreTrainedTokenizerFast(tokenizer_object=small["glm3"][1])
    assert theirs.is_fast and theirs("你好", return_offsets_mapping=True)["offset_mapping"]
