"""GLM-10B: golden numbers of the original, its tokenizer on a stand-in, blanks and pieces."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from chatglm.configuration import GLMBaseConfig
from chatglm.evidence import infer_family
from chatglm.families import FAMILIES
from chatglm.loading import check_vocabulary, load_model, load_tokenizer
from tests.conftest import shared_file, tiny_model, write_tokenizer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SPECIAL = json.loads(shared_file("golden/glm_base/golden.json").read_text("utf-8"))["special_ids"]
PAD, SOP, EOP = SPECIAL["endoftext"], SPECIAL["sop"], SPECIAL["eop"]


@pytest.fixture(scope="module")
def golden():
    return load_file(shared_file("golden/glm_base/golden.safetensors"))


@pytest.fixture(scope="module")
def model():
    return load_model(shared_file("golden/glm_base/checkpoint"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("glm_base"), "glm_base"))


# ---- the model


def test_forward_and_loss_are_the_originals(model, golden):
    ids, positions = golden["input_ids"], golden["position_ids"]
    out = model(ids, attention_mask=golden["attention_mask"], position_ids=positions).logits
    labelled = golden["labels"] != PAD
    real = golden["attention_mask"].diagonal(dim1=-2, dim2=-1)[:, 0].bool()
    torch.testing.assert_close(out[real], golden["logits.full"][real], **CLOSE)
    loss = F.cross_entropy(out[labelled], golden["labels"][labelled])
    torch.testing.assert_close(loss, golden["loss.full"], **CLOSE)
    torch.testing.assert_close(
        model(ids, attention_mask=golden["attention_mask"], position_ids=positions).logits, out
    )


def plain_positions(batch, length):
    places = torch.arange(length)
    return torch.stack([places, torch.zeros_like(places)]).expand(batch, 2, length)


def test_context_of_any_length_is_seen_by_all(model, golden):
    ids = golden["input_ids"][:, :9]
    causal = torch.ones(9, 9, dtype=torch.long).tril()
    positions = plain_positions(3, 9)
    bare = model(ids, attention_mask=causal.expand(3, 1, 9, 9), position_ids=positions).logits
    torch.testing.assert_close(bare, golden["logits.bare"], **CLOSE)
    seen = torch.arange(9) < golden["sep"][:, None, None, None]
    out = model(ids, attention_mask=(causal | seen.long()), position_ids=positions).logits
    torch.testing.assert_close(out, golden["logits.sep"], **CLOSE)


def test_states_are_the_originals(model, golden):
    states = []
    hook = model.transformer.blocks[-1].register_forward_hook(lambda *call: states.append(call[2]))
    causal = torch.ones(1, 1, 5, 5, dtype=torch.long).tril()
    ids = golden["input_ids"][:1, :5]
    model(ids, attention_mask=causal, position_ids=plain_positions(1, 5))
    hook.remove()
    torch.testing.assert_close(states[0], golden["mems.last"], **CLOSE)


def test_positions_are_found_and_padding_is_not_counted(model, golden):
    """The original counts padding on the left, so its places begin where the text does."""
    ids, positions = golden["input_ids"], golden["position_ids"]
    real = golden["attention_mask"].diagonal(dim1=-2, dim2=-1)[:, 0].bool()
    found = model.transformer.count_positions(ids, real)
    padded = (~real[:, :9]).long().cumprod(-1).sum(-1)
    wanted = torch.stack([positions[:, 0] - padded[:, None], positions[:, 1]], dim=1)
    assert torch.equal(found * real[:, None], wanted.clamp(min=0) * real[:, None])
    rows = []
    for row, mask in zip(ids, real):
        rows.append(model(row[mask][None]).logits[0])
    out = model(ids, attention_mask=real.long()).logits[real]
    torch.testing.assert_close(out, torch.cat(rows), **CLOSE)


def test_pieces_stand_at_their_masks(model):
    cls, mask, gmask = SPECIAL["cls"], SPECIAL["mask"], SPECIAL["gmask"]
    ids = torch.tensor([[cls, 7, mask, 8, 9, gmask, PAD, SOP, 20, 21, EOP, SOP, 22, EOP]])
    place, block = model.transformer.count_positions(ids)[0].tolist()
    assert place == [*range(7), 2, 2, 2, 2, 5, 5, 5]
    assert block == [0] * 7 + [1, 2, 3, 4, 1, 2, 3]
    # a cache goes on where the last piece is
    whole = model(ids, use_cache=False).logits
    cache = model(ids[:, :12], use_cache=True).past_key_values
    last = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(last, whole[:, 12:], **CLOSE)
    with pytest.raises(ValueError, match=r"GLM-10B: row 0 .* no \[MASK\], \[sMASK\] or \[gMASK\]"):
        model(torch.tensor([[cls, 7, SOP]]))


def test_positions_end(model):
    """The golden has 64 of them."""
    row = [SPECIAL["cls"], *[9] * 56, SPECIAL["gmask"], PAD, SOP]
    options = {"do_sample": False, "eos_token_id": 10**6, "pad_token_id": PAD}
    assert model.generate(torch.tensor([row]), max_new_tokens=9, **options).shape[1] == 64
    with pytest.raises(ValueError, match="the model has 64 positions, 69 are asked for"):
        model(torch.tensor([[SPECIAL["cls"], *[9] * 66, SPECIAL["gmask"], PAD, SOP]]))


def test_scaled_scores_are_the_same_scores(golden):
    """attention_scale, 8 in GLM-10B, is for fp16 alone."""
    ids = torch.tensor([[SPECIAL["cls"], 7, SPECIAL["mask"], PAD, SOP, 8]])
    for attn in ("sdpa", "eager"):
        model = load_model(shared_file("golden/glm_base/checkpoint"), attn_implementation=attn)
        plain = model(ids).logits
        for block in model.transformer.blocks:
            block.attention.score_coefficient = 8.0
        torch.testing.assert_close(model(ids).logits, plain, **CLOSE)


def test_embeddings_train():
    """In the original they are a buffer, which no method trains."""
    model = tiny_model("glm_base")
    assert "glm.word_embeddings.weight" in dict(model.named_parameters())
    assert model.lm_head.weight is model.glm.word_embeddings.weight


def test_a_body_alone_loads(tmp_path, model):
    """As a release saves it: names without "glm." before them."""
    folder = shared_file("golden/glm_base/checkpoint")
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    bare = {name.removeprefix("glm."): tensor for name, tensor in state.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


# ---- the tokenizer and its prompts


def test_control_tokens_follow_the_vocabulary(tokenizer):
    first = tokenizer.sp_model.get_piece_size()
    offsets = {name: index - first for name, index in tokenizer.control_tokens.items()}
    wanted = {"<|endoftext|>": 0, "[SEP]": 1, "[CLS]": 2, "[MASK]": 3, "[UNUSED1]": 4}
    wanted |= {"[UNUSED2]": 5, "<|startofpiece|>": 6, "<|endofpiece|>": 7, "[sMASK]": 8}
    assert offsets == wanted | {"[gMASK]": 9}
    assert {
        name: SPECIAL[key] - PAD for name, key in (("[MASK]", "mask"), ("[gMASK]", "gmask"))
    } == {
        "[MASK]": 3,
        "[gMASK]": 9,
    }
    command, a, b = (
        tokenizer.get_command,
        tokenizer.encode_text("你好"),
        tokenizer.encode_text("好"),
    )
    pair = [command("[CLS]"), *a, command("[SEP]"), *b, command("<|endoftext|>")]
    assert tokenizer("你好", "好").input_ids == pair
    assert tokenizer.truncation_side == "left" and tokenizer.pad_token_id == first
    assert tokenizer.decode(pair, skip_special_tokens=True) == "你好 好"


def test_rows_fill_a_blank(tokenizer):
    family, command = FAMILIES["glm_base"], tokenizer.get_command
    end = [command("<|endoftext|>"), command("<|startofpiece|>")]
    text, answer = tokenizer.encode_text("你好 世界"), tokenizer.encode_text("今天")
    prompt = [command("[CLS]"), *text, command("[gMASK]"), *end]
    row = family.encode_example(tokenizer, "你好 世界", "今天", 100, 50)
    assert row.input_ids == [*prompt, *answer, command("<|endofpiece|>")]
    assert row.n_masked == len(prompt)  # the first label is the answer's first token
    assert family.encode_chat(tokenizer, "你好 世界") == prompt
    for name in ("[MASK]", "[sMASK]", "[gMASK]"):
        ids = family.encode_prompt(tokenizer, f"你好{name}世界", 50).input_ids
        blank = [*tokenizer.encode_text("你好"), command(name), *tokenizer.encode_text("世界")]
        assert ids == [command("[CLS]"), *blank, *end]
    typed = family.encode_prompt(tokenizer, "你好[CLS]<|startofpiece|>", 50).input_ids
    assert typed.count(command("[CLS]")) == typed.count(command("<|startofpiece|>")) == 1
    plain = family.encode_example(tokenizer, "好", "今天[MASK]", 100, 50)
    assert command("[MASK]") not in plain.input_ids  # an answer has no blanks


def test_a_cut_keeps_the_blanks(tokenizer):
    family, command = FAMILIES["glm_base"], tokenizer.get_command
    cut = family.encode_prompt(tokenizer, "你好" * 30 + "[MASK]" + "世界" * 30, 10)
    assert cut.truncated and len(cut.input_ids) == 13 and command("[MASK]") in cut.input_ids
    with pytest.raises(ValueError, match="max_src_len=1 cannot hold the 2 blanks"):
        family.encode_prompt(tokenizer, "你好[MASK]世界[MASK]", 1)


def test_a_history_is_refused(tokenizer):
    with pytest.raises(ValueError, match="GLM-10B answers one prompt: it knows no history"):
        FAMILIES["glm_base"].encode_chat(tokenizer, "好", [("你好", "世界")])


def test_folders_show_the_family(tiny_folders, tmp_path):
    golden = shared_file("golden/glm_base/checkpoint")
    assert infer_family(golden) == infer_family(tiny_folders["glm_base"]) == "glm_base"
    (tmp_path / "config.json").write_text('{"model_type": "glm", "hidden_size": 64}')
    assert infer_family(tmp_path) == "causal"
    model = load_model(golden)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "glm_base" and infer_family(tmp_path) == "glm_base"
    with pytest.raises(ValueError, match="mode 'causal' does not fit"):
        load_model(golden, mode="causal")


@pytest.fixture
def folder(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["glm_base"], tmp_path / "m")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def test_a6_a_tied_copy_of_another_shape_is_named(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.zeros(44, 8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight has shape .44, 8., config.json asks for"):
        load_model(folder)


def test_values_of_wrong_kinds_are_one_line(folder):
    change(folder / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(ValueError, match='model_max_length must be a number, got "x"'):
        load_tokenizer(folder)
    for changes in ({"pad_token_id": -3}, {"num_layers": "2"}):
        values = json.loads((folder / "config.json").read_text("utf-8")) | changes
        with pytest.raises(ValueError, match=next(iter(changes))) as error:
            GLMBaseConfig.from_dict(values)
        assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(folder):
    """Before it trains: its ids would be other tokens, or none."""
    tokenizer, first = load_tokenizer(folder), load_model(folder).config.pad_token_id
    check_vocabulary(load_model(folder), tokenizer)
    change(folder / "config.json", pad_token_id=first - 3)
    with pytest.raises(ValueError, match="<.startofpiece.> is .*, by config.json it is"):
        check_vocabulary(load_model(folder), tokenizer)
    small = tiny_model("glm_base", vocab_size=tokenizer.vocab_size - 1, pad_token_id=5)
    with pytest.raises(ValueError, match="they belong to different models"):
        check_vocabulary(small, tokenizer)
