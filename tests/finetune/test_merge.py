"""merge_lora.py: merged equals adapted, the base is checked, and no adapter is merged twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from chatglm import load_model, load_tokenizer
from finetune.evaluation.inference import load_for_inference
from finetune.evaluation.predict import PredictionFlags, build_parser
from tests.finetune.runs import fill_disk


def merge(capsys, *words) -> tuple[int, str]:
    """(exit code, the last line said)."""
    capsys.readouterr()
    code = merge_lora.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, (said.err if code else said.out).strip().splitlines()[-1]


def logits(folder, **options) -> torch.Tensor:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode("抽取三元组：水泵漏油，轮胎异响。")])
    if tokenizer.family == "glm":
        ids = torch.cat(
            [
                ids,
                torch.tensor([[tokenizer.get_command("[gMASK]"), tokenizer.get_command("<sop>")]]),
            ],
            dim=1,
        )
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32, **options)(input_ids=ids).logits


@pytest.fixture
def old_adapter(adapter, tmp_path) -> Path:
    """The adapter as peft 0.5 wrote it: adapter_model.bin, no manifest, no tokenizer."""
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")
    config = json.loads((adapter / "adapter_config.json").read_text())
    keys = (
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "peft_type",
        "task_type",
        "fan_in_fan_out",
        "inference_mode",
        "modules_to_save",
        "layers_pattern",
        "layers_to_transform",
    )
    (folder / "adapter_config.json").write_text(json.dumps({k: config.get(k) for k in keys}))
    return folder


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4"])
def test_merged_is_adapted(flags, train, tmp_path, bases, capsys, family):
    folder = train(
        flags(
            tmp_path / "out",
            "--lora_module_name",
            "query_key_value,dense",
            "--max_len",
            90,
            family=family,
        )
    )
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases[family],
        "--model_dir",
        folder,
        "--save_dir",
        tmp_path / "merged",
        "--mode",
        family,
    )
    assert code == 0 and "largest difference of outputs" in said
    adapted, merged, base = logits(folder), logits(tmp_path / "merged"), logits(bases[family])
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(
        adapted, base, atol=1e-3
    )
    assert load_tokenizer(tmp_path / "merged").family == family
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "merged.json",
    } <= names and "adapter_config.json" not in names
    assert not list(tmp_path.glob(".*"))
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(bases[family] / "model.safetensors").keys()
    )


def test_default_is_in_place(adapter, bases, tmp_path, capsys):
    """As the old command: weights go into the adapter's folder.

    The adapter moves down and still loads.
    """
    folder = tmp_path / "epoch-1-step-4"
    shutil.copytree(adapter, folder)
    wanted = logits(folder)
    assert merge(capsys, "--ori_model_dir", bases["glm2"], "--model_dir", folder)[0] == 0
    assert torch.allclose(logits(folder), wanted, atol=1e-4) and torch.allclose(
        logits(folder / "adapter"), wanted, atol=1e-6
    )
    assert not (folder / "adapter_config.json").exists() and not list(tmp_path.glob(".*"))
    code, said = merge(capsys, "--ori_model_dir", bases["glm2"], "--model_dir", folder)
    assert code == 1 and "merged already" in said and "adapter" in said


def test_never_twice(adapter, bases, tmp_path, capsys):
    words = ["--model_dir", adapter, "--save_dir"]
    assert merge(capsys, "--ori_model_dir", bases["glm2"], *words, tmp_path / "once")[0] == 0
    code, said = merge(capsys, "--ori_model_dir", tmp_path / "once", *words, tmp_path / "twice")
    assert code == 1 and "twice" in said and not (tmp_path / "twice").exists()
    code, said = merge(capsys, "--ori_model_dir", bases["glm2"], *words, tmp_path / "once")
    assert code == 1 and "not empty" in said


def test_another_base_is_refused(adapter, old_adapter, bases, tmp_path, capsys):
    for folder, base, said in (
        (adapter, "glm2-seed", "fingerprints differ"),
        (adapter, "glm2-wide", "fingerprints differ"),
        (old_adapter, "glm2-wide", "does not fit"),
        (old_adapter, "glm", "does not fit"),
    ):
        code, line = merge(
            capsys,
            "--ori_model_dir",
            bases[base],
            "--model_dir",
            folder,
            "--save_dir",
            tmp_path / "merged",
        )
        assert (
            code == 1
            and said in line
            and str(bases[base]) in line
            and not (tmp_path / "merged").exists()
        )


def test_copies_of_a_base_are_the_same_base(adapter, bases, tmp_path, capsys):
    """In fp16 or in shards, under another name; the merged weights keep the copy's dtype."""
    load_model(bases["glm2"]).half().save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(bases["glm2"] / name, tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert (
        merge(
            capsys,
            "--ori_model_dir",
            tmp_path / "copy",
            "--model_dir",
            adapter,
            "--save_dir",
            tmp_path / "merged",
        )[0]
        == 0
    )
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.float16
    }
    assert torch.allclose(logits(tmp_path / "merged"), logits(adapter), atol=0.02)


def test_peft_05_adapter_is_warned_of(old_adapter, adapter, bases, tmp_path, capsys):
    capsys.readouterr()
    words = [
        "--ori_model_dir",
        str(bases["glm2"]),
        "--model_dir",
        str(old_adapter),
        "--save_dir",
        str(tmp_path / "a"),
    ]
    assert merge_lora.main(words) == 0
    assert "WARNING" in (warned := capsys.readouterr().err) and "has no manifest" in warned
    assert torch.allclose(logits(tmp_path / "a"), logits(adapter), atol=1e-4)
    config = json.loads((old_adapter / "adapter_config.json").read_text())
    (old_adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "THUDM/chatglm2-6b"})
    )
    assert merge_lora.main([*words[:-1], str(tmp_path / "b")]) == 1
    assert "--other_name" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert merge_lora.main([*words[:-1], str(tmp_path / "b"), "--other_name"]) == 0
    assert "names THUDM/chatglm2-6b as its base" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    "damage, said",
    [
        ("pickle", "adapter_model.bin"),
        ("torn", "adapter_model.bin"),
        ("no_weights", "adapter_model"),
        ("other_weights", "no LoRA weights"),
        ("config", "adapter_config.json"),
        ("no_config", "without an adapter_config.json"),
    ],
)
def test_damaged_adapters_are_one_line(old_adapter, bases, tmp_path, capsys, damage, said):
    file, config = old_adapter / "adapter_model.bin", old_adapter / "adapter_config.json"
    {
        "pickle": lambda: torch.save({"x": Bomb()}, file),
        "torn": lambda: file.write_bytes(file.read_bytes()[:999]),
        "no_weights": file.unlink,
        "other_weights": lambda: torch.save({"x": torch.ones(2)}, file),
        "config": lambda: config.write_text("{"),
        "no_config": config.unlink,
    }[damage]()
    capsys.readouterr()
    code = merge_lora.main(
        [
            "--ori_model_dir",
            str(bases["glm2"]),
            "--model_dir",
            str(old_adapter),
            "--save_dir",
            str(tmp_path / "merged"),
        ]
    )
    out, err = capsys.readouterr()
    assert code == 1 and "this ran" not in out and not (tmp_path / "merged").exists()
    assert (
        err.startswith("merge_lora.py: error: ")
        and len(err.strip().splitlines()) == 1
        and said in err
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model_dir", "{tmp}/none"], "--model_dir: no such folder"),
        (["--ori_model_dir", "{tmp}/none"], "--ori_model_dir: no such folder"),
        (["--mode", "glm"], "glm"),
        (["--save_dir", "{tmp}/file"], "file"),
        (["--ori_model_dir", "{adapter}"], "model.safetensors"),
        (["--ori_model_dir", "{tmp}/torn"], "torn: its weights cannot be read"),
    ],
)
def test_wrong_folders(adapter, bases, tmp_path, capsys, words, said):
    (tmp_path / "file").touch()
    shutil.copytree(bases["glm2"], tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(
        (bases["glm2"] / "model.safetensors").read_bytes()[:5000]
    )
    given = [
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        adapter,
        "--save_dir",
        tmp_path / "merged",
    ]
    code, line = merge(
        capsys, *given, *[word.format(tmp=tmp_path, adapter=adapter) for word in words]
    )
    assert code == 1 and said in line and line.startswith("merge_lora.py: error: ")


def test_a_merge_that_changes_the_answer_writes_nothing(
    adapter, bases, tmp_path, capsys, monkeypatch
):
    from peft.tuners.lora import Linear

    monkeypatch.setattr(
        Linear,
        "get_delta_weight",
        lambda self, name: self.lora_B[name].weight @ self.lora_A[name].weight,
    )  # unscaled
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        adapter,
        "--save_dir",
        tmp_path / "merged",
    )
    assert code == 1 and "differ from adapted ones" in said and not list(tmp_path.iterdir())


def test_merged_cuts_prompts_as_training_did(adapter, bases, tmp_path, capsys):
    """Or long prompts get other answers than from the adapter."""
    merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        adapter,
        "--save_dir",
        tmp_path / "merged",
    )
    for folder in (adapter, tmp_path / "merged"):
        assert (
            load_for_inference(
                PredictionFlags(
                    **vars(
                        build_parser().parse_args(["--model_path", str(folder), "--device", "cpu"])
                    )
                )
            )[2]
            == 64
        )


# ---- where it goes, what it needs


def test_a12_one_folder_under_two_names_is_one(adapter, bases, tmp_path, capsys):
    folder = tmp_path / "runs" / "adapter"
    shutil.copytree(adapter, folder)
    wanted = logits(folder)
    assert (
        merge(
            capsys,
            "--ori_model_dir",
            bases["glm2"],
            "--model_dir",
            f"{folder}/../adapter",
            "--save_dir",
            f"{tmp_path}/runs/../runs/adapter",
        )[0]
        == 0
    )
    assert torch.allclose(logits(folder), wanted, atol=1e-4) and torch.allclose(
        logits(folder / "adapter"), wanted, atol=1e-6
    )
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["adapter"]


def test_a12_an_empty_save_dir_is_an_error(adapter, bases, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    code, said = merge(
        capsys, "--ori_model_dir", bases["glm2"], "--model_dir", folder, "--save_dir", ""
    )
    assert (
        code == 1 and "--save_dir is empty" in said and (folder / "adapter_config.json").is_file()
    )


@pytest.mark.parametrize("checked", [True, False])
def test_a12_a_full_disk_leaves_nothing(adapter, bases, small_disk, capsys, monkeypatch, checked):
    """Found before the first byte, and where it fills up on the way."""
    from finetune import merging

    if not checked:
        monkeypatch.setattr(merging, "check_disk", lambda *_: None)
    fill_disk(small_disk)
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        adapter,
        "--save_dir",
        small_disk / "merged",
    )
    assert (
        code == 1
        and ("GB are free" if checked else "merged") in said
        and [p.name for p in small_disk.iterdir()] == ["filler"]
    )


def test_a12_shards_and_dtype(adapter, bases, tmp_path, capsys, monkeypatch):
    """Small shards give the tensors of one file; --dtype rounds them."""
    from finetune import merging

    words = ["--ori_model_dir", bases["glm2"], "--model_dir", adapter, "--save_dir"]
    assert merge(capsys, *words, tmp_path / "whole")[0] == 0
    monkeypatch.setattr(merging, "SHARD_BYTES", 100_000)
    code, said = merge(capsys, *words, tmp_path / "half", "--dtype", "bf16", "--device", "cpu")
    assert code == 0 and "bfloat16" in said
    files = sorted((tmp_path / "half").glob("model-*.safetensors"))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    shards = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2 and whole.keys() == shards.keys()
    assert all(torch.equal(whole[name].bfloat16(), shards[name]) for name in whole)
    assert load_model(tmp_path / "half").dtype == torch.bfloat16
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in shards.values())


VARIANTS = {
    "dora": {"use_dora": True},
    "rslora_all_linear": {
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"dense": 2},
    },
    "biases": {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["output_layer"]},
    "embedding": {"target_modules": ["word_embeddings", "dense_4h_to_h"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a12_every_kind_of_lora_is_merged_as_peft_merges_it(bases, tmp_path, capsys, variant):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    } | VARIANTS[variant]
    model = get_peft_model(
        load_model(bases["glm2"], dtype=torch.float32), LoraConfig(**options)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        tmp_path / "adapter",
        "--save_dir",
        tmp_path / "merged",
    )
    assert code == 0, said
    wanted, found = (
        model.merge_and_unload().state_dict(),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert wanted.keys() == found.keys() and all(
        torch.allclose(wanted[name], found[name], atol=1e-5) for name in wanted
    )


def test_a1_a_merge_that_changes_nothing_is_an_error(adapter, bases, tmp_path, capsys):
    folder = copy_with_weights(
        adapter,
        tmp_path,
        lambda state: {k: v * 0 if "lora_B" in k else v for k, v in state.items()},
    )
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        folder,
        "--save_dir",
        tmp_path / "merged",
    )
    assert (
        code == 1
        and "changes nothing" in said
        and sorted(p.name for p in tmp_path.iterdir()) == ["changed"]
    )


@pytest.mark.parametrize("prefix", ["", "base_model.model.pretrained_model."])
def test_a1_keys_with_other_prefixes_are_merged(adapter, bases, tmp_path, capsys, prefix):
    """As hand-written savers and TRL write them."""
    folder = copy_with_weights(
        adapter,
        tmp_path,
        lambda state: {k.replace("base_model.model.", prefix): v for k, v in state.items()},
    )
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        folder,
        "--save_dir",
        tmp_path / "merged",
    )
    assert code == 0, said
    assert torch.allclose(logits(tmp_path / "merged"), logits(adapter), atol=1e-4)


def test_a1_a_part_of_the_keys_is_refused(adapter, bases, tmp_path, capsys):
    folder = copy_with_weights(
        adapter, tmp_path, lambda state: {k: v for k, v in state.items() if ".layers.1." not in k}
    )
    code, said = merge(
        capsys,
        "--ori_model_dir",
        bases["glm2"],
        "--model_dir",
        folder,
        "--save_dir",
        tmp_path / "merged",
    )
    assert (
        code == 1
        and "2 tensors that adapter_config.json names are not in it" in said
        and "layers.1." in said
    )
    assert not (tmp_path / "merged").exists()


def copy_with_weights(adapter, tmp_path, change) -> Path:
    """The adapter without manifest and checksums, its tensors changed."""
    folder = tmp_path / "changed"
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        change(load_file(adapter / "adapter_model.safetensors")),
        folder / "adapter_model.safetensors",
    )
    return folder


def test_a13_files_have_the_mode_of_the_umask(flags, train, bases, tmp_path, capsys):
    before = os.umask(0o027)
    try:
        folder = train(flags(tmp_path / "out", "--max_steps", 2))
        assert (
            merge(
                capsys,
                "--ori_model_dir",
                bases["glm2"],
                "--model_dir",
                folder,
                "--save_dir",
                tmp_path / "merged",
            )[0]
            == 0
        )
    finally:
        os.umask(before)
    for file in [
        p for place in (folder, tmp_path / "merged") for p in place.rglob("*") if p.is_file()
    ]:
        assert file.stat().st_mode & 0o777 == 0o640, file
