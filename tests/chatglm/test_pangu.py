"""Pangu-alpha: golden numbers of the original, its tokenizer on a stand-in, what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from chatglm.evidence import infer_family
from chatglm.families import FAMILIES
from chatglm.loading import load_model, load_tokenizer
from tests.conftest import shared_file, write_tokenizer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PAD = 6


@pytest.fixture(scope="module")
def golden():
    return load_file(shared_file("golden/pangu/golden.safetensors"))


@pytest.fixture(scope="module")
def model():
    return load_model(shared_file("golden/pangu/checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("pangu"), "pangu"))


# ---- the model


def test_forward_and_loss_are_the_originals(model, golden):
    ids = golden["input_ids"]
    out = model(ids, labels=ids.masked_fill(ids == PAD, -100))
    torch.testing.assert_close(out.logits, golden["logits.no_mask"], **CLOSE)
    torch.testing.assert_close(out.loss, golden["loss.no_mask"], **CLOSE)
    moved = model(ids, position_ids=golden["position_ids"]).logits
    torch.testing.assert_close(moved, golden["logits.positions"], **CLOSE)
    real = golden["attention_mask"].bool()
    right = model(ids, attention_mask=real).logits[real]
    torch.testing.assert_close(right, golden["logits.right_bool_mask"][real], **CLOSE)


def test_padding_on_the_left_is_masked(model, golden):
    """The original counts it as positions, and adds an int64 mask to the scores as it is."""
    ids, real = golden["left.input_ids"], golden["left.attention_mask"]
    counted = torch.arange(ids.shape[1]).expand_as(ids)
    out = model(ids, attention_mask=real, position_ids=counted).logits[real.bool()]
    torch.testing.assert_close(out, golden["logits.bool_mask"][real.bool()], **CLOSE)
    # Without positions, padding changes nothing: the rows are those that are padded on the right.
    own = model(ids, attention_mask=real).logits[real.bool()]
    right = golden["logits.no_mask"][golden["attention_mask"].bool()]
    torch.testing.assert_close(own, right, **CLOSE)


def test_blocks_and_gradients_are_the_originals(golden):
    model = load_model(shared_file("golden/pangu/checkpoint"))
    states = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, inputs, output: states.append(output))
    model(golden["hidden.input_ids"])
    torch.testing.assert_close(torch.cat(states), golden["hidden.states"], **CLOSE)
    ids = golden["input_ids"]
    model(ids, labels=ids.masked_fill(ids == PAD, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in golden:
            wanted = golden[f"grad.{name}"]
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-4, rtol=1e-3)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    facts = json.loads(shared_file("golden/pangu/golden.json").read_text("utf-8"))
    assert norm == pytest.approx(facts["total_grad_norm"], rel=1e-4)


def test_dropout_acts_in_training_alone(model, golden):
    ids = golden["hidden.input_ids"]
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_positions_end(model):
    """The golden has 32 of them."""
    with pytest.raises(ValueError, match="the model has 32 positions, 33 are asked for"):
        model(torch.full((1, 33), 9))
    ids = torch.full((1, 30), 9)
    options = {"do_sample": False, "eos_token_id": 10**6, "pad_token_id": PAD}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **options)
    assert out.shape[1] == 32


# ---- the tokenizer

TEXT = "今天 天气很好\n你好世界 hello world"


def test_words_of_jieba_are_the_text_that_is_encoded(tokenizer):
    """Sources: the original's tokenisation, by hand: ▂ and ▃ inside of words, a space between."""
    from chatglm.words import jieba_tokenizer

    words = list(jieba_tokenizer().cut("今天 天气\n好"))
    written = " ".join(words).replace("今天   天气", "今天 ▂ 天气").replace("\n", "▃")
    assert written == "今天 ▂ 天气 ▃ 好"
    assert tokenizer.encode_text("今天 天气\n好") == tokenizer.sp_model.encode(written)
    ids = tokenizer.encode_text(TEXT)
    assert tokenizer.decode(ids) == TEXT


def test_special_tokens_are_whole_without_a_patched_jieba(tokenizer):
    command = tokenizer.get_command
    names = ("<s>", "<sep>", "<eot>", "<pad>")
    assert [tokenizer.sp_model.id_to_piece(command(name)) for name in names] == list(names)
    assert (command("<eot>"), command("<pad>"), tokenizer.pad_token_id) == (9, 6, 6)
    a, b = tokenizer.encode_text("你好"), tokenizer.encode_text("世界")
    pair = [command("<s>"), *a, command("<sep>"), *b, command("<eot>")]
    assert tokenizer("你好", "世界").input_ids == pair
    assert tokenizer("你好").input_ids == [command("<s>"), *a, command("<eot>")]
    read = tokenizer("<s>你好<sep>世界<eot>", add_special_tokens=False, encode_special_tokens=True)
    assert read.input_ids == pair
    typed = tokenizer.encode_text("你好<sep>世界<eot>")
    assert not {command("<sep>"), command("<eot>")} & set(typed)
    assert tokenizer.decode(pair, skip_special_tokens=True) == "你好世界"


def test_offsets_are_those_of_the_text(tokenizer):
    encoded = tokenizer(TEXT, return_offsets_mapping=True, add_special_tokens=False)
    covered = "".join(TEXT[start:end] for start, end in encoded.offset_mapping)
    assert covered.replace(" ", "") == TEXT.replace(" ", "")
    for i, (start, end) in zip(encoded.input_ids, encoded.offset_mapping):
        piece = tokenizer.decode([i])
        assert piece == TEXT[start:end] or "\ufffd" in piece or not piece


def test_a_row_is_the_prompt_sep_and_the_answer(tokenizer):
    family, command = FAMILIES["pangu"], tokenizer.get_command
    row = family.encode_example(tokenizer, "你好 世界", "今天天气", 1000, 500)
    prompt = [command("<s>"), *tokenizer.encode_text("你好 世界"), command("<sep>")]
    answer = [*tokenizer.encode_text("今天天气"), command("<eot>")]
    assert (row.input_ids, row.n_masked) == (prompt + answer, len(prompt))
    assert family.encode_prompt(tokenizer, "你好 世界", 500).input_ids == prompt
    assert family.encode_chat(tokenizer, "你好 世界") == prompt
    # The original predicts without the <s> that it trains with.
    assert family.encode_chat(tokenizer, "世界", [{"role": "system", "content": "你好"}])[0] == 1


def test_a_history_is_refused(tokenizer, model):
    for ask in (
        lambda: FAMILIES["pangu"].encode_chat(tokenizer, "好", [("你好", "世界")]),
        lambda: model.chat(tokenizer, "好", [("你好", "世界")]),
        lambda: tokenizer.build_prompt("好", [("你好", "世界")]),
    ):
        with pytest.raises(ValueError, match="Pangu-alpha answers one prompt: it knows no history"):
            ask()


def test_folders_show_the_family(tiny_folders, tmp_path):
    folder = tiny_folders["pangu"]
    assert infer_family(folder) == "pangu"
    (tmp_path / "vocab.model").write_bytes((folder / "vocab.model").read_bytes())
    assert infer_family(tmp_path) == "pangu"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPTPanguForCausalLM"] and config["model_type"] == "pangu"
    config["model_type"] = "gpt_pangu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert infer_family(tmp_path) == "pangu"
    with pytest.raises(ValueError, match="mode 'glm2' does not fit"):
        load_model(folder, mode="glm2")
