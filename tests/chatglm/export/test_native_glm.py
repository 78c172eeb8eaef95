"""An exported folder in a process without this project: logits, answers, ids; and the way back."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chatglm import load_model, load_tokenizer
from chatglm.checksums import check_folder_files
from chatglm.export import weights
from chatglm.export.command import main
from chatglm.export.folders import SOURCE_NOTE, export_glm, restore_chatglm
from chatglm.export.weights import INV_FREQ
from chatglm.families import family_of
from tests.causal_folders import make_causal_folder
from tests.chatglm.export.outside import RELEASES, make_release, read_json, run_outside
from tests.conftest import tiny_model

LINES = ["你好", "hello world a b c, 今天 天气 很 好", "1"]
QUESTIONS = ["你好 world", "a"]
NEW = 12
OPENED = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "GlmForCausalLM", type(model)
    batch = tokenizer(LINES, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}, set(batch)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    far = torch.arange(0, 3000, 250)[None]
    with torch.inference_mode():
        found = {
            "ids": batch["input_ids"],
            "mask": batch["attention_mask"],
            "logits": model(**batch).logits,
            "far": model(batch["input_ids"][1:2, :12], position_ids=far).logits,
            "prompts": prompts["input_ids"],
            "answers": model.generate(**prompts, do_sample=False, max_new_tokens=NEW),
        }
    found["ends"] = torch.tensor(model.generation_config.eos_token_id)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{folder}.found")
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """{name: (our folder, the exported one, what was found outside)}, all by one process."""
    place = tmp_path_factory.mktemp("native")
    made = {}
    for name in RELEASES:
        folder = make_release(place / name, name)
        output = place / f"{name}-native"
        assert main([str(folder), "--to", "glm", "--output", str(output)]) == 0
        made[name] = (folder, output)
    named = OPENED.replace("LINES", repr(LINES)).replace("QUESTIONS", repr(QUESTIONS))
    run_outside(named.replace("NEW", str(NEW)), place, *[output for _, output in made.values()])
    results = {}
    for name, (folder, output) in made.items():
        results[name] = (folder, output, load_file(f"{output}.found"))
    return results


@pytest.mark.parametrize("name", RELEASES)
def test_logits_are_ours_in_a_left_padded_batch(opened, name):
    folder, _, found = opened[name]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    batch = tokenizer(LINES, padding=True, return_tensors="pt")
    assert torch.equal(found["ids"], batch["input_ids"])
    assert torch.equal(found["mask"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        logits = model(**batch).logits
        far = torch.arange(0, 3000, 250)[None]
        away = model(batch["input_ids"][1:2, :12], position_ids=far).logits
    assert logits.abs().max() > 0.1
    assert (logits - found["logits"])[real].abs().max() <= 1e-5
    assert (away - found["far"]).abs().max() <= 1e-5  # positions: both rotary rules


@pytest.mark.parametrize("name", RELEASES)
def test_chats_and_greedy_answers_are_ours(opened, name):
    folder, _, found = opened[name]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    family = family_of(tokenizer)
    ids = [family.encode_chat(tokenizer, question) for question in QUESTIONS]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert torch.equal(found["prompts"], batch["input_ids"])
    with torch.inference_mode():
        answers = model.generate(**batch, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(found["answers"], answers)
    assert found["ends"].tolist() == tokenizer.stop_ids
    assert len(set(answers[:, len(ids[0]) :].flatten().tolist())) > 3


@pytest.mark.parametrize("name", RELEASES)
def test_the_way_back_gives_the_same_files(opened, name, tmp_path):
    folder, output, _ = opened[name]
    back = tmp_path / "back"
    assert main([str(output), "--to", "chatglm", "--output", str(back)]) == 0
    wanted, found = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(tensor, found[key]), key
    assert read_json(back / "config.json") == read_json(folder / "config.json")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        assert (back / file).read_bytes() == (folder / file).read_bytes() or file.endswith("json")
    assert read_json(back / "tokenizer_config.json") == read_json(folder / "tokenizer_config.json")
    assert load_tokenizer(back).encode("你好 a") == load_tokenizer(folder).encode("你好 a")


@pytest.mark.parametrize("name", ["glm2-32k", "glm3", "glm4"])
def test_our_own_loader_reads_the_exported_folder(opened, name):
    folder, output, found = opened[name]
    tokenizer = load_tokenizer(output)
    assert tokenizer.family == "causal" and tokenizer.stop_ids == load_tokenizer(folder).stop_ids
    prompt = family_of(tokenizer).encode_chat(tokenizer, QUESTIONS[0])
    own = load_tokenizer(folder)
    assert prompt == family_of(own).encode_chat(own, QUESTIONS[0])
    typed = "a<|user|>b"  # ours keeps typed control tokens text there too
    assert not {tokenizer.get_command("<sop>")} & set(tokenizer.encode_text(typed))
    with torch.inference_mode():
        logits = load_model(output)(found["ids"], attention_mask=found["mask"]).logits
    assert torch.allclose(logits[found["mask"] > 0], found["logits"][found["mask"] > 0], atol=1e-5)


def test_a_releases_table_and_own_dtypes_come_back(tmp_path):
    """The files of the releases hold inv_freq in their dtype, and code that is not restored."""
    folder = make_release(tmp_path / "glm3", "glm3")
    state = {
        name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    state[INV_FREQ] = torch.rand(2).half()
    norm = "transformer.encoder.final_layernorm.weight"
    state[norm] = state[norm].float()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = read_json(folder / "config.json")
    config.pop("dtype")
    config |= {"torch_dtype": "float16", "auto_map": {"AutoModel": "modeling_chatglm.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    sampling = {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "max_length": 8192}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    export_glm(folder, tmp_path / "out")
    stops = load_tokenizer(folder).stop_ids
    assert read_json(tmp_path / "out/generation_config.json") == sampling | {
        "eos_token_id": stops,
        "pad_token_id": 0,
    }
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert read_json(tmp_path / "out/config.json")["torch_dtype"] == "float16"
    restore_chatglm(tmp_path / "out", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    config.pop("auto_map")
    assert read_json(tmp_path / "back/config.json") == config
    assert read_json(tmp_path / "back/generation_config.json") == sampling


def test_shards_and_casting(tmp_path, monkeypatch):
    folder = make_release(tmp_path / "glm2", "glm2")
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    export_glm(folder, tmp_path / "out", dtype=torch.bfloat16)
    index = read_json(tmp_path / "out/model.safetensors.index.json")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    size = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            for name in tensors.keys():
                assert index["weight_map"][name] == file
                size += tensors.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == size
    check_folder_files(tmp_path / "out", "full")
    model = load_model(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    restore_chatglm(tmp_path / "out", tmp_path / "back", dtype=torch.float32)
    rounded = load_model(folder).to(torch.bfloat16).float().state_dict()
    for name, tensor in load_model(tmp_path / "back").state_dict().items():
        assert torch.equal(tensor, rounded[name]), name


def test_bin_files_and_a_body_saved_alone(tmp_path):
    folder = make_release(tmp_path / "glm3", "glm3")
    state = load_file(folder / "model.safetensors")
    body = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    (folder / "model.safetensors").unlink()
    torch.save(body, folder / "pytorch_model.bin")
    export_glm(folder, tmp_path / "out")
    restore_chatglm(tmp_path / "out", tmp_path / "back")
    found = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_release_is_dequantised(tmp_path, bits):
    folder = make_release(tmp_path / "glm2", "glm2")
    packed = load_model(folder).half().quantize(bits)
    packed.save_pretrained(folder)
    words = export_glm(folder, tmp_path / "out", dtype=torch.float32)
    assert words.endswith(f"dequantised from {bits} bits")
    ids = torch.randint(10, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = load_model(folder, dtype=torch.float32)(ids).logits
        assert (load_model(tmp_path / "out")(ids).logits - wanted).abs().max() <= 1e-5
    restore_chatglm(tmp_path / "out", tmp_path / "back")
    assert "quantization_bit" not in read_json(tmp_path / "back/config.json")
    with torch.inference_mode():
        assert (load_model(tmp_path / "back")(ids).logits - wanted).abs().max() <= 1e-5


def test_a_base_model_has_no_chat_template(tmp_path):
    folder = make_release(tmp_path / "glm4", "glm4")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"prompt_style": "raw"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    export_glm(folder, tmp_path / "out")
    assert not (tmp_path / "out/chat_template.jinja").exists()
    ours, theirs = load_tokenizer(folder), load_tokenizer(tmp_path / "out")
    assert theirs.prompt_style == "raw"
    wanted = family_of(ours).encode_chat(ours, "你好 a")
    assert family_of(theirs).encode_chat(theirs, "你好 a") == wanted


# ---- back from other folders


def test_a_folder_of_another_maker_becomes_a_chatglm(tmp_path):
    """Such as glm-4-9b-chat-hf: no note, no tokenizer.model."""
    folder = make_release(tmp_path / "glm4", "glm4")
    export_glm(folder, tmp_path / "hf")
    (tmp_path / "hf" / SOURCE_NOTE).unlink()
    (tmp_path / "hf/tokenizer.model").unlink()
    (tmp_path / "hf/checksums.json").unlink()
    assert "GLM-4" in restore_chatglm(tmp_path / "hf", tmp_path / "back", mode="glm4")
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (
        folder / "tokenizer.model"
    ).read_bytes()
    config = read_json(tmp_path / "back/config.json")
    assert config["rope_ratio"] == 500 and config["glm_family"] == "glm4"
    ids = torch.arange(20, 40)[None]
    with torch.inference_mode():
        wanted = load_model(folder)(ids).logits
        assert torch.equal(load_model(tmp_path / "back")(ids).logits, wanted)
    # the table that THUDM's code reads
    table = load_file(tmp_path / "back/model.safetensors")[INV_FREQ]
    assert torch.allclose(table, 10000 ** -(torch.arange(0, 4, 2) / 4))


def test_changed_weights_and_sizes_win_over_the_note(tmp_path):
    folder = make_release(tmp_path / "glm3", "glm3")
    export_glm(folder, tmp_path / "out")
    path = tmp_path / "out/config.json"
    values = read_json(path)
    values["rms_norm_eps"] = 1e-6
    path.write_text(json.dumps(values))
    (tmp_path / "out/checksums.json").unlink()
    restore_chatglm(tmp_path / "out", tmp_path / "back")
    assert read_json(tmp_path / "back/config.json")["layernorm_epsilon"] == 1e-6


# ---- what is refused, in one line, and leaves nothing


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) != 0
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("chatglm.export: error: "), message
    return message


def test_models_that_glm_cannot_be(tmp_path, tiny_folders, capsys):
    output = tmp_path / "out"
    to_glm = ("--to", "glm", "--output", output)
    assert "two dimensions" in refused(capsys, tiny_folders["glm"], *to_glm)
    causal = make_causal_folder(tmp_path / "qwen", "qwen2")
    assert "is one of qwen2 already" in refused(capsys, causal, *to_glm)
    assert "no such model folder" in refused(capsys, tmp_path / "nowhere", *to_glm)
    changes = {"add_bias_linear": True}, {"multi_query_attention": False}, {"pre_seq_len": 3}
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_folders["glm2"], folder)
        tiny_model("glm2", padded_vocab_size=400, **change).save_pretrained(folder)
        (folder / "checksums.json").unlink(missing_ok=True)
        assert "cannot be exported" in refused(capsys, folder, *to_glm)
    assert "--keep_adapter" in refused(capsys, tiny_folders["glm2"], *to_glm, "--keep_adapter")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


def test_models_that_chatglm_cannot_be(tmp_path, tiny_folders, capsys):
    back = ("--to", "chatglm", "--output", tmp_path / "back")
    assert 'wants "model_type": "glm", got "chatglm"' in refused(
        capsys, tiny_folders["glm2"], *back
    )
    norms = make_causal_folder(tmp_path / "glm4", "glm4")
    assert 'got "glm4"' in refused(capsys, norms, *back)
    plain = make_causal_folder(tmp_path / "plain", "glm")
    assert "say --mode glm2, glm3, glm4" in refused(capsys, plain, *back)
    scaled = make_causal_folder(
        tmp_path / "scaled",
        "glm",
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
    )
    assert "rope_theta" in refused(capsys, scaled, *back)
    whole = make_causal_folder(
        tmp_path / "whole",
        "glm",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
        },
    )
    assert "partial_rotary_factor" in refused(capsys, whole, *back, "--mode", "glm4")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".*back*"))


def test_nothing_is_left_of_an_export_that_fails(tmp_path, capsys, monkeypatch):
    folder = make_release(tmp_path / "glm2", "glm2")
    output = tmp_path / "out"
    to_glm = ("--to", "glm", "--output", output)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    taken = refused(capsys, folder, "--to", "glm", "--output", tmp_path / "full")
    assert "is there already" in taken
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(20_000)
    refused(capsys, folder, *to_glm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "glm2"]
    folder = make_release(tmp_path / "glm3", "glm3")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert "GB are free" in refused(capsys, folder, *to_glm)
    assert not output.exists()


def test_unknown_targets_are_no_choice(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["model", "--to", "onnx", "--output", str(tmp_path / "x")])
    assert left.value.code == 2
    assert "invalid choice: 'onnx'" in capsys.readouterr().err
