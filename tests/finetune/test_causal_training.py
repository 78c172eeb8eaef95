"""Other causal models than ChatGLM: trained, merged, asked and served; and text without prompts."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import merge_lora
from chatglm import load_model, load_tokenizer
from chatglm.families import family_of
from finetune.evaluation.generation import generate_answers
from finetune.rows.batches import lay_end_to_end
from finetune.rows.encoding import RowEncoder
from finetune.rows.formats import parse_row
from tests.causal_folders import make_causal_folder
from tests.finetune.runs import metrics, rows_of

CASES = [("qwen2", "lora"), ("glm", "lora"), ("llama", "freeze"), ("qwen3", "all")]


@pytest.fixture(scope="module")
def causal_bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("causal-bases")
    return {kind: make_causal_folder(place / kind, kind) for kind in ("glm", "llama", "qwen3")}


@pytest.fixture(scope="module")
def causal_flags(flags, bases, causal_bases):
    """The flags of a short run: causal_flags(output_dir, kind, "--more", ..., method=...)."""

    def make(output_dir, kind, *more, method="lora"):
        base = bases["qwen2"] if kind == "qwen2" else causal_bases[kind]
        words = ["--model_name_or_path", base, "--max_len", 128, *more]
        return flags(output_dir, *words, method=method)

    return make


def logits(folder):
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode_text("抽取三元组：水泵漏油。")])
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(input_ids=ids).logits


def answers(folder):
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    return generate_answers(model, tokenizer, ["抽取：水泵", "轮胎异响。"], max_new_tokens=12)


@pytest.mark.parametrize("kind, method", CASES)
def test_a_model_is_trained(causal_flags, bases, causal_bases, train, tmp_path, kind, method):
    folder = train(causal_flags(tmp_path / "out", kind, "--num_train_epochs", 3, method=method))
    losses = metrics(tmp_path / "out")
    assert losses[-1] < 0.9 * losses[0]
    base = bases["qwen2"] if kind == "qwen2" else causal_bases[kind]
    assert not torch.allclose(logits(folder), logits(base), atol=1e-2)
    assert load_tokenizer(folder).stop_ids == load_tokenizer(base).stop_ids
    if method == "lora":
        words = ["--ori_model_dir", base, "--model_dir", folder, "--save_dir", tmp_path / "merged"]
        assert merge_lora.main(list(map(str, words))) == 0
        assert torch.allclose(logits(folder), logits(tmp_path / "merged"), atol=1e-4)
        assert answers(folder) == answers(tmp_path / "merged")
        folder = tmp_path / "merged"
    ids = torch.tensor([[30, 31, 32]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.allclose(found, load_model(folder)(ids).logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "glm"])
def test_ragged_rows_train_as_padded_ones(causal_flags, train, tmp_path, kind):
    for batching in ("ragged", "padded"):
        train(causal_flags(tmp_path / batching, kind, "--batching", batching))
    ragged, padded = metrics(tmp_path / "ragged"), metrics(tmp_path / "padded")
    assert ragged == pytest.approx(padded, rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(causal_flags, train, tmp_path):
    words = ["--num_train_epochs", 2, "--save_model_step", 2]
    whole = train(causal_flags(tmp_path / "whole", "qwen2", *words))
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in cut.glob("epoch-2-*"):
        shutil.rmtree(folder)
    resumed = ["--resume_from_checkpoint", "auto"]
    again = train(causal_flags(cut, "qwen2", *words, *resumed))
    file = "adapter_model.safetensors"
    assert again.name == whole.name and (again / file).read_bytes() == (whole / file).read_bytes()
    assert metrics(cut)[-4:] == metrics(tmp_path / "whole")[-4:]


def test_default_modules_are_the_split_ones(causal_flags, train, tmp_path):
    folder = train(causal_flags(tmp_path / "out", "glm", "--max_steps", 1))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]


def test_virtual_tokens_are_refused(causal_flags, train, tmp_path):
    with pytest.raises(ValueError, match="virtual tokens are for ChatGLM"):
        train(causal_flags(tmp_path / "out", "llama", method="ptuning-v2"))


# ---- text without prompts


@pytest.mark.parametrize("family", ["glm", "glm2", "glm4"])
def test_raw_text_is_trained_and_asked_raw(flags, train, tmp_path, family, rows_file):
    from finetune.config import parse_config
    from finetune.task import FineTuning

    words = flags(tmp_path / "out", "--prompt_style", "raw", "--max_steps", 1, family=family)
    task = FineTuning(parse_config(words))
    task.load_rows()
    tokenizer = task.tokenizer
    place, ids, masked, _ = rows_of(task.data)[0]
    row = json.loads(rows_file.read_text().splitlines()[0])
    text = tokenizer.encode_text(row["instruction"] + row["input"])
    controls = [i for i in ids if i not in text + tokenizer.encode_text(row["output"])]
    assert ids[-1] in tokenizer.stop_ids and len(controls) <= 3
    folder = train(words)
    asked = load_tokenizer(folder)
    assert asked.prompt_style == "raw" and family_of(asked).raw
    seen = family_of(asked).encode_prompt(asked, row["instruction"] + row["input"], 64)
    assert ids[: len(seen.input_ids)] == seen.input_ids
    assert load_tokenizer(folder, prompt_style="chat").prompt_style == "chat"


def test_raw_text_learns_its_first_token(bases):
    """Also of ChatGLM3 with the demo's labels, and where nothing stands before an answer."""
    tokenizer = load_tokenizer(bases["glm3"], prompt_style="raw")
    encoder = RowEncoder(tokenizer, family_of(tokenizer), 50, 40, "chatglm3_demo")
    row = parse_row({"prompt": "水泵", "response": "漏油"}, "f:1")
    (made,) = encoder.encode(row)
    assert made.input_ids[made.n_masked :][:-1] == tokenizer.encode_text("漏油")
    batch = lay_end_to_end([[5, 6, 7], [8, 9]], [0, 0], False, 1)
    assert batch["targets"].tolist() == [6, 7, 9] and batch["keep"].tolist() == [0, 1, 2]


def test_raw_text_has_no_rounds(flags, train, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    words = flags(tmp_path / "out", "--prompt_style", "raw", "--train_path", file)
    with pytest.raises(ValueError, match=r"rows.jsonl.*prompt_style raw: .* got 4 turns"):
        train(words)
