"""A GGUF file: its tensors and settings, and the answers of llama.cpp beside ours."""

import shutil

import numpy as np
import pytest
import torch

from chatglm import load_model, load_tokenizer
from chatglm.export.command import main
from chatglm.families import family_of
from tests.chatglm.export.outside import make_release, real_folder, shared_texts
from tests.conftest import tiny_model, write_tokenizer

pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
from tests.chatglm.export.gguf_files import (  # noqa: E402
    RELEASES,
    TIES,
    TOKENS,
    check_answers,
    export,
    make_folder,
    model_of,
    random_prompts,
    run_llama,
    settings,
    tensors,
)


@pytest.mark.parametrize("name", RELEASES)
def test_weights_and_settings(tmp_path, name):
    folder = make_folder(tmp_path, name)
    reader = export(folder, tmp_path / "model.gguf", "--type", "f32")
    model, found, said = load_model(folder), tensors(reader), settings(reader)
    state = model.state_dict()
    layer = "transformer.encoder.layers.2."
    pairs = {
        "token_embd.weight": "transformer.embedding.word_embeddings.weight",
        "blk.2.attn_qkv.bias": f"{layer}self_attention.query_key_value.bias",
        "blk.2.attn_qkv.weight": f"{layer}self_attention.query_key_value.weight",
        "blk.2.ffn_up.weight": f"{layer}mlp.dense_h_to_4h.weight",
        "blk.2.attn_norm.weight": f"{layer}input_layernorm.weight",
        "output_norm.weight": "transformer.encoder.final_layernorm.weight",
    }
    for theirs, ours in pairs.items():
        assert np.array_equal(found[theirs], state[ours].numpy()), theirs
    assert ("output.weight" in found) != (name == "glm4-tied")
    assert len(found) == len(set(found)) == 3 * 7 + 3 - (name == "glm4-tied")
    ratio = RELEASES[name][1].get("rope_ratio", 1)
    scaled = name == "glm2-32k"
    assert said["chatglm.rope.freq_base"] == 10000 * (1 if scaled else ratio)
    assert said.get("chatglm.rope.scaling.factor") == (ratio if scaled else None)
    assert said["chatglm.rope.dimension_count"] == 8
    tokenizer = load_tokenizer(folder)
    names = ("eos", "eot", "eom")[: len(tokenizer.stop_ids)]
    ends = [said[f"tokenizer.ggml.{name}_token_id"] for name in names]
    assert ends == tokenizer.stop_ids
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == 400
    assert "[gMASK]" in said["tokenizer.chat_template"]


@pytest.mark.parametrize("kind, most", [("f16", 3e-4), ("bf16", 3e-3), ("q8_0", 5e-3)])
def test_types(tmp_path, kind, most):
    folder = make_folder(tmp_path, "glm3-32k")
    exact = tensors(export(folder, tmp_path / "exact.gguf", "--type", "f32"))
    for name, values in tensors(export(folder, tmp_path / "file.gguf", "--type", kind)).items():
        assert np.abs(values - exact[name]).max() <= most, name


def test_q4_0_keeps_vectors_and_the_output_layer(tmp_path):
    folder = make_folder(tmp_path, "glm4-tied")
    reader = export(folder, tmp_path / "file.gguf", "--type", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_refusals_leave_nothing(tmp_path, tiny_folders, capsys):
    words = ["--to", "gguf", "--output", str(tmp_path / "model.gguf")]
    assert main([str(tiny_folders["glm"]), *words]) == 1
    assert "two dimensions" in capsys.readouterr().err
    folder = make_release(tmp_path / "narrow", "glm3")  # 6 heads of 8 are not 40
    assert main([str(folder), *words]) == 1
    assert "hidden_size = heads x kv_channels, got 40 and 6 x 8" in capsys.readouterr().err
    spaces = make_folder(tmp_path, "glm2")
    write_tokenizer(spaces, "glm2")
    assert main([str(spaces), *words]) == 1
    assert "changes text before it is split" in capsys.readouterr().err
    shutil.rmtree(spaces)
    (tmp_path / "model.gguf").touch()
    assert main([str(folder), *words]) == 1
    assert "is there already: name a new file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "narrow"]


def test_a_weight_that_f16_cannot_hold(tmp_path, capsys):
    folder = make_folder(tmp_path, "glm3-32k")
    model = load_model(folder)
    with torch.no_grad():
        model.transformer.output_layer.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    file = tmp_path / "model.gguf"
    assert main([str(folder), "--to", "gguf", "--output", str(file)]) == 1
    assert "output_layer.weight has values that f16 cannot hold" in capsys.readouterr().err
    assert not file.exists()


# ---- beside llama.cpp, in an environment of its own (about 15 minutes to compile, once)

TEXTS = ["你好", "hello world a b c, 今天 天气 很 好", "1 + 2 =\n\n  3", "ñ 😀 x"]
CHATS = [
    [{"role": "user", "content": "你好 world"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "今天"},
    ],
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """{(name, type): (our folder, our model of its weights, prompts, what llama.cpp found)}, of
    models of f16 weights.
    """
    place = tmp_path_factory.mktemp("llama")
    case, made = {}, {}
    for number, name in enumerate(RELEASES):
        folder = make_folder(place, name)
        load_model(folder).half().save_pretrained(folder)
        for kind in TIES:
            file = place / f"{name}-{kind}.gguf"
            model, prompts = (
                model_of(export(folder, file, "--type", kind), folder),
                random_prompts(number),
            )
            made[name, kind] = (folder, model, prompts)
            case[file.stem] = {"file": str(file), "prompts": prompts, "tokens": TOKENS}
            case[file.stem] |= {"texts": TEXTS, "chats": CHATS}
    found = run_llama(place, case)
    return {(name, kind): (*ours, found[f"{name}-{kind}"]) for (name, kind), ours in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIES)
@pytest.mark.parametrize("name", RELEASES)
def test_answers_are_ours(answered, name, kind):
    folder, model, prompts, found = answered[name, kind]
    if kind == "f16":
        model = load_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(prompts[:1])).logits[0].numpy()
    assert np.std(found["logits"] - logits) < 0.05 * np.std(logits)
    if kind == "f16":
        assert np.abs(found["logits"] - logits).max() < 0.02
    check_answers(model, prompts, found["answers"], kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_ids_are_ours(answered, name):
    folder, _, _, found = answered[name, "f16"]
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(TEXTS, found["ids"]):
        assert ids == tokenizer.encode_text(text), text
    family = family_of(tokenizer)
    for messages, ids in zip(CHATS, found["chats"]):
        query, history = messages[-1]["content"], messages[:-1]
        assert ids == family.encode_chat(tokenizer, query, history), messages


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm3", "glm4"])
def test_ids_of_the_real_vocabularies_are_ours(family, tmp_path):
    folder = real_folder(tmp_path / family, family)
    sizes = {"hidden_size": 32, "kv_channels": 16, "num_attention_heads": 2, "ffn_hidden_size": 32}
    sizes |= {"multi_query_group_num": 1, "num_layers": 1}
    sizes["padded_vocab_size"] = 65024 if family == "glm3" else 151552
    tiny_model(family, **sizes).save_pretrained(folder)
    export(folder, tmp_path / "model.gguf")
    chosen = shared_texts()[::4]
    case = {"file": str(tmp_path / "model.gguf"), "prompts": [], "texts": chosen, "chats": CHATS}
    found = run_llama(tmp_path, {"real": case})["real"]
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(chosen, found["ids"]):
        assert ids == tokenizer.encode_text(text), text
    for messages, ids in zip(CHATS, found["chats"]):
        query, history = messages[-1]["content"], messages[:-1]
        assert ids == family_of(tokenizer).encode_chat(tokenizer, query, history), messages
