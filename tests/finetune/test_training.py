"""Training against a plain PyTorch loop: what is trained, saved, printed, and what stops it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm import load_model, load_tokenizer
from chatglm.checksums import CHECKSUMS, read_checksums
from chatglm.families import FAMILIES
from finetune.config import parse_config
from finetune.distributed import deepspeed_config, init_distributed, pieces, resolve_precision
from finetune.engine import build_engine, seed_step
from finetune.launched import RANK_VARIABLES, ranks_restored
from finetune.methods import make_method
from finetune.rows.batches import epoch_order
from finetune.rows.sources import read_rows
from finetune.task import FineTuning
from tests.finetune.runs import METHODS, ROOT, child_env, make_rows, metrics, write_rows

FAMILY_METHODS = [(family, method) for family in ("glm", "glm2", "glm3") for method in METHODS]
FAMILY_METHODS += [("glm4", "lora"), ("glm4", "ptuning-v2-mlp")]
ZERO = ["ds_zero2.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json"]


def plain_run(words: list[str], steps: int) -> tuple[list[float], torch.nn.Module]:
    """(losses of `steps` global batches, model) of a loop without DeepSpeed or the engine."""
    config = parse_config(words)
    tokenizer, rows = load_tokenizer(config.model_name_or_path), read_rows(config.train_path)[0]
    family, method = FAMILIES[tokenizer.family], make_method(config)
    seed_step(config.seed, 0, stream=0)  # new weights as the run draws them
    model = method.make_trainable(
        load_model(config.model_name_or_path, dtype=torch.float32, **method.model_options())
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=config.weight_decay
    )
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    per_epoch = math.ceil(len(rows) / size)
    encoded = [
        family.encode_example(
            tokenizer, row.prompt, row.answers[0], config.max_len, config.max_src_len
        )
        for row in rows
    ]
    lengths, group = (
        np.array([len(e.input_ids) for e in encoded]),
        size if config.batching == "grouped" else 0,
    )
    total = per_epoch * config.num_train_epochs
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        made = [
            encoded[i]
            for i in epoch_order(lengths, config.seed, epoch, group=group)[
                place * size : (place + 1) * size
            ]
        ]
        longest = max(len(e.input_ids) for e in made)
        ids = torch.tensor(
            [e.input_ids + [tokenizer.pad_token_id] * (longest - len(e.input_ids)) for e in made]
        )
        labels = torch.tensor([e.labels + [-100] * (longest - len(e.labels)) for e in made])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        # linear warm-up of at least 2 steps from a tenth of the rate, then linear decay back to it
        warmup = max(2, int(config.warmup_ratio * total))
        share = (
            0
            if step == 0
            else (step - 1) / warmup
            if step - 1 < warmup
            else (total - step + 1) / (total - warmup)
        )
        optimizer.param_groups[0]["lr"] = config.learning_rate * (0.1 + 0.9 * share)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model.eval()


def logits_of(model, folder) -> torch.Tensor:
    """Logits of one row; an exported model's answer to compare."""
    tokenizer = load_tokenizer(folder)
    example = FAMILIES[tokenizer.family].encode_example(
        tokenizer, "抽取三元组：水泵漏油。", "水泵_性能故障_漏油", 96, 64
    )
    with torch.no_grad():
        return model(input_ids=torch.tensor([example.input_ids])).logits


@pytest.mark.parametrize("family, method", FAMILY_METHODS, ids=lambda x: x)
def test_losses_and_export_are_a_plain_loops(flags, train, tmp_path, family, method):
    """Every family and method, with varied ZeRO files and accumulation.

    Exports equal the plain loop's.
    """
    number = FAMILY_METHODS.index((family, method))
    cut = [("4", "1"), ("2", "2"), ("1", "4")][number // 2 % 3]
    words = flags(
        tmp_path / "out",
        "--per_device_train_batch_size",
        cut[0],
        "--gradient_accumulation_steps",
        cut[1],
        "--num_train_epochs",
        2,
        "--ds_file",
        ZERO[number % 3],
        "--show_loss_step",
        1,
        family=family,
        method=method,
    )
    folder = train(words)
    losses, model = plain_run(words, 8)
    assert metrics(tmp_path / "out") == pytest.approx(losses, rel=1e-5)
    assert folder.name == "epoch-2-step-8" and [
        p.name for p in sorted((tmp_path / "out").glob("epoch-*"))
    ] == ["epoch-1-step-4", folder.name]
    exported = load_model(folder, dtype=torch.float32)
    assert torch.allclose(logits_of(exported, folder), logits_of(model, folder), atol=2e-4)
    # frozen weights stay bit for bit, trained ones move
    base = load_model(parse_config(words).model_name_or_path, dtype=torch.float32).state_dict()
    trainable = {
        name.replace("base_model.model.", "")
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    exported = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t
        for name, t in exported.state_dict().items()
    }
    for name, tensor in base.items():
        assert torch.equal(exported[name], tensor) == (
            name not in trainable and not (method == "all" and name == "lm_head.weight")
        ), name


def test_what_a_checkpoint_holds(flags, train, tmp_path, bases):
    base_size = (bases["glm2"] / "model.safetensors").stat().st_size
    kinds = {
        "lora": "adapter_model.safetensors",
        "ptuning-v2": "model.safetensors",
        "freeze": "model.safetensors",
    }
    for method, file in kinds.items():
        folder = train(flags(tmp_path / method, "--max_steps", 1, method=method))
        assert {p.suffix for p in folder.iterdir()} <= {
            ".safetensors",
            ".json",
            ".model",
            ".jinja",
            ".md",
            "",
        }
        assert ((folder / file).stat().st_size < base_size / 4) == (method != "freeze")
        assert load_tokenizer(folder).family == "glm2"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (
            manifest["family"] == "glm2" and manifest["step"] == 1 and manifest["world_size"] == 1
        )
        assert manifest["method"] == method.split("-")[0]
        assert {file, "train_config.json"} <= set(read_checksums(folder)) and "torch" in manifest[
            "versions"
        ]
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert {
        name.split(".")[-1]
        for name in load_file(tmp_path / "lora" / "epoch-1-step-1" / "adapter_model.safetensors")
    } == {"weight"}


def test_rows_that_do_not_fill_a_step(flags, train, tmp_path):
    """13 rows in steps of 8: the second step has 5 rows in 4 passes, so 3 places are empty."""
    words = flags(
        tmp_path / "out",
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        4,
        "--num_train_epochs",
        2,
    )
    train(words)
    assert metrics(tmp_path / "out") == pytest.approx(plain_run(words, 4)[0], rel=1e-5)


def test_accumulation_does_not_change_the_loss(flags, train, tmp_path):
    runs = []
    for micro, accumulation in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / f"{micro}"
        train(
            flags(
                out,
                "--per_device_train_batch_size",
                micro,
                "--gradient_accumulation_steps",
                accumulation,
                method="all",
            )
        )
        runs.append(metrics(out) + metrics(out, "grad_norm"))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5) and runs[2] == pytest.approx(
        runs[0], rel=1e-5
    )


def test_gradient_checkpointing_changes_nothing(flags, train, tmp_path):
    for method in METHODS:
        runs = []
        for how in ("False", "True", "selective"):
            out = tmp_path / f"{method}{how}"
            train(flags(out, "--max_steps", 3, "--gradient_checkpointing", how, method=method))
            runs.append((metrics(out), metrics(out, "grad_norm")))
        for losses, norms in runs[1:]:
            assert losses == pytest.approx(runs[0][0], rel=1e-6) and norms == pytest.approx(
                runs[0][1], rel=1e-5
            ), method


def test_weight_decay_takes_effect(flags, train, tmp_path):
    norms = {}
    for decay in (0, 30):
        folder = train(flags(tmp_path / f"{decay}", "--weight_decay", decay, method="all"))
        norms[decay] = sum(
            float(t.norm()) for t in load_file(folder / "model.safetensors").values()
        )
    assert norms[30] < 0.9 * norms[0]


def test_clipping_is_deepspeeds(flags, train, tmp_path):
    """AdamW hides a clipped gradient's size; SGD shows that no update exceeds rate times bound."""
    ds = {
        "gradient_clipping": 0.05,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "SGD", "params": {}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "zero_allow_untested_optimizer": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    words = flags(
        tmp_path / "out",
        "--ds_file",
        tmp_path / "ds.json",
        "--weight_decay",
        0,
        "--max_steps",
        1,
        method="all",
    )
    folder = train([*words, "--learning_rate", "1"])
    before, after = (
        load_file(Path(words[1]) / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    moved = math.sqrt(sum(float((after[k] - before[k]).double().norm()) ** 2 for k in before))
    assert metrics(tmp_path / "out", "grad_norm")[0] > 0.5
    assert moved == pytest.approx(0.1 * 0.05, rel=1e-3)  # the first rate is a tenth


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, frozen, trained",
    [
        ("lora", torch.bfloat16, torch.float32),
        ("ptuning-v2", torch.bfloat16, torch.float32),
        ("all", None, torch.bfloat16),
        ("freeze", torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("ds_file", ZERO[:2])
def test_bf16(flags, train, tmp_path, capsys, method, frozen, trained, ds_file):
    """Base in bf16, adapters in fp32.

    Whole models in bf16 with fp32 masters for the small steps.
    """
    words = flags(
        tmp_path / "out",
        "--precision",
        "bf16",
        "--ds_file",
        ds_file,
        "--num_train_epochs",
        2,
        method=method,
    )
    config = parse_config(words)
    with ranks_restored():
        init_distributed()
        engine, model, *_ = build_engine(config, FineTuning(config), 8)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == ({frozen} - {None})
    names = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )  # ZeRO-3, 2, BF16_Optimizer
    masters = next(found for name in names if (found := getattr(engine.optimizer, name, None)))
    assert {p.dtype for p in masters} == {torch.float32}
    folder = train(words)
    losses = metrics(tmp_path / "out")
    fp32, _ = plain_run(words, 8)
    assert losses == pytest.approx(fp32, rel=0.02)
    saved = load_file(
        folder / ("adapter_model.safetensors" if method == "lora" else "model.safetensors")
    )
    assert {t.dtype for t in saved.values()} == {trained}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_one_rank_without_partitions(flags, train, tmp_path, capsys, precision):
    """On one rank ZeRO-2's copies are left out, with a message; the numbers are the same.

    A file with a custom key is obeyed.
    """
    file = tmp_path / "own.json"
    ds = json.loads((ROOT / "ds_configs" / "ds_zero2.json").read_text())
    file.write_text(
        json.dumps(ds | {"zero_optimization": {"stage": 2, "ignore_unused_parameters": True}})
    )
    told = {}
    for ds_file in ("ds_zero2.json", file):
        for accumulation in (1, 2):
            out = tmp_path / f"{Path(ds_file).stem}-{accumulation}"
            train(
                flags(
                    out,
                    "--precision",
                    precision,
                    "--ds_file",
                    ds_file,
                    "--gradient_accumulation_steps",
                    accumulation,
                    "--per_device_train_batch_size",
                    4 // accumulation,
                    method="all",
                )
            )
            said = f"ZeRO: stage {0 if precision == 'fp32' else 1} (ds_zero2.json asks for 2"
            assert (said in capsys.readouterr().out) == (ds_file != file)
            told[ds_file, accumulation] = metrics(out), metrics(out, "grad_norm")
    close = 1e-6 if precision == "fp32" else 5e-4  # a weight rounds to the other neighbour in bf16
    for accumulation in (1, 2):
        (losses, norms), (expected, expected_norms) = (
            told["ds_zero2.json", accumulation],
            told[file, accumulation],
        )
        assert losses == pytest.approx(expected, rel=close) and norms == pytest.approx(
            expected_norms, rel=10 * close
        )


def test_stages(tmp_path):
    """Cases that keep the file: several ranks, adapters, offload, fp16, ZeRO-3, other keys.

    The other keys say more than how ranks communicate.
    """

    def stage(precision="bf16", adapters=False, world=1, **zero):
        ds = {"zero_optimization": {"stage": 2} | zero}
        (tmp_path / "ds.json").write_text(json.dumps(ds))
        config = parse_config(
            [
                "--model_name_or_path",
                "m",
                "--train_path",
                "t",
                "--ds_file",
                str(tmp_path / "ds.json"),
            ]
        )
        ds = deepspeed_config(
            config,
            precision=precision,
            adapters=adapters,
            total_steps=9,
            hidden_size=64,
            world=world,
        )
        return ds["zero_optimization"]["stage"]

    assert (stage(), stage("fp32"), stage(overlap_comm=True, reduce_bucket_size=5)) == (1, 0, 1)
    assert [
        stage(world=2),
        stage(adapters=True),
        stage("fp16"),
        stage(elastic_checkpoint=True),
        stage(offload_optimizer={"device": "cpu"}),
    ] == [2] * 5
    assert stage(stage=3) == 3


def test_norms_on_a_cpu_are_right():
    """torch sums squares in fp32, one after another: at 3e7 numbers its norm is off by 0.2 %."""
    tensor = torch.randn(30_000_000)
    assert float(torch.nn.utils.get_total_norm(pieces([tensor]))) == pytest.approx(
        float(tensor.double().norm()), rel=1e-5
    )


def test_precision_overrides_the_ds_file_and_says_so(tmp_path, capsys):
    """ChatGLM-Finetuning's file, with its fp16, its "auto" offload and its cosine warm-up."""
    old = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "steps_per_print": 1,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
        },
        "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 100},
        "bf16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "last_batch_iteration": -1,
                "total_num_steps": 1,
                "warmup_min_lr": 0,
                "warmup_max_lr": 1,
                "warmup_num_steps": 1,
                "warmup_type": "cosine",
            },
        },
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    config = parse_config(
        [
            "--model_name_or_path",
            "m",
            "--train_path",
            "t",
            "--ds_file",
            str(tmp_path / "old.json"),
            "--weight_decay",
            "0.3",
        ]
    )

    def filled(precision, adapters):
        return deepspeed_config(
            config, precision=precision, adapters=adapters, total_steps=100, hidden_size=64, world=2
        )

    ds = filled("fp32", True)
    assert (
        "precision: fp32 (old.json asks for fp16; --precision decides)" in capsys.readouterr().out
    )
    assert (
        ds["train_batch_size"],
        ds["train_micro_batch_size_per_gpu"],
        ds["gradient_accumulation_steps"],
    ) == (32, 16, 1)
    assert (
        ds["zero_optimization"] == {"stage": 2}
        and not ds["fp16"]["enabled"]
        and not ds["bf16"]["enabled"]
    )
    assert (
        ds["optimizer"]["params"]["weight_decay"] == 0.3 and ds["optimizer"]["params"]["lr"] == 1e-3
    )
    params = ds["scheduler"]["params"]
    assert (params["total_num_steps"], params["warmup_num_steps"], params["warmup_max_lr"]) == (
        100,
        10,
        1e-3,
    )
    assert params["warmup_min_lr"] == pytest.approx(1e-4) and params["warmup_type"] == "linear"
    ds = filled("fp16", True)
    assert (
        ds["fp16"] == {"enabled": True, "loss_scale": 0, "loss_scale_window": 100}
        and "asks for" not in capsys.readouterr().out
    )
    assert filled("bf16", False)["bf16"]["enabled"] and not filled("bf16", True)["bf16"]["enabled"]
    if not torch.cuda.is_available():
        assert resolve_precision("auto") == "fp32"


def test_transformers_own_ds_file_trains(flags, train, tmp_path):
    """A file full of "auto", as the Trainer takes it (ChatGLM3's ds_zero_3)."""
    zero = {
        "stage": 3,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    adamw = {
        "type": "AdamW",
        "params": {name: "auto" for name in ("lr", "betas", "eps", "weight_decay")},
    }
    ds = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "optimizer": adamw,
        "zero_optimization": zero,
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    words = flags(tmp_path / "out", "--ds_file", tmp_path / "ds.json", "--max_steps", 2)
    train(words)
    assert metrics(tmp_path / "out")[0] == pytest.approx(plain_run(words, 1)[0][0], rel=1e-5)


REFUSED = {  # words after a good command line -> what the error says
    "--ds_file nowhere.json": "ds_zero3_offload.json",
    "--ds_file {tmp}/broken.json": "broken.json:1: not valid JSON",
    "--ds_file {tmp}/list.json": "list.json",
    "--ds_file {tmp}/auto.json": "zero_optimization.stage",
    "--train_path {tmp}/bad.json": 'bad.json:2: no key "output"',
    "--eval_path {tmp}/bad.json": "bad.json:2",
    "--train_path {tmp}/none.json": "none.json",
    "--model_name_or_path {tmp}/none": "none",
    "--mode glm": "does not fit",
    "--model_name_or_path {tmp}/torn": "torn",
    "--model_name_or_path {tmp}": "does not tell which of glm",
    "--lora_module_name query": "dense_4h_to_h",
    "--lora_module_name ,": "matches no linear module",
    "--train_type freeze": "layers.27.",
    "--train_type freeze --freeze_module_name layers.0.,nope": "layers.0. to layers.1.",
    "--train_type freeze --freeze_module_name=": "an empty list",
    "--max_src_len 3": "max_src_len",
    "--max_len 20 --max_src_len 19": "max_len",
    "--model_name_or_path {tmp}/prefixed --train_type ptuning --pre_seq_len 9": (
        "4 virtual tokens, but pre_seq_len=9"
    ),
    "--resume_from_checkpoint {tmp}/none": "not a complete checkpoint",
    "--is_skip --max_len 24 --max_src_len 16": "longer than",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory, bases, flags, train) -> Path:
    """A folder of things that no run can use."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "auto.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    write_rows(folder / "bad.json", [make_rows(1)[0], {"instruction": "a"}])
    (folder / "torn").mkdir()
    for path in bases["glm2"].iterdir():
        (folder / "torn" / path.name).write_bytes(
            path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None]
        )
    prefix = train(flags(folder / "run", "--max_steps", 1, method="ptuning-v2"))
    (folder / "prefixed").mkdir()
    for source in (bases["glm2"], prefix):
        for path in source.iterdir():
            if path.is_file() and path.name != CHECKSUMS:  # put together by hand
                (folder / "prefixed" / path.name).write_bytes(path.read_bytes())
    whole = load_file(bases["glm2"] / "model.safetensors") | load_file(prefix / "model.safetensors")
    save_file(whole, folder / "prefixed" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("words", REFUSED)
def test_refused_with_one_line(flags, broken, tmp_path, capsys, words):
    import train

    method = "ptuning-v2" if "ptuning" in words else "lora"
    more = words.format(tmp=broken).split()
    if "freeze" in words:
        more += ["--lora_dropout", "0.1"]  # without effect there, but at its default
    code = train.main(flags(tmp_path / "out", *more, method=method))
    errors = capsys.readouterr().err
    line = errors[errors.index("train.py: error: ") :].rstrip("\n")
    assert code == 1 and "\n" not in line and REFUSED[words] in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("cause", ["rate", "weight", "norm"])
def test_nan_stops_with_step_and_rows(flags, tmp_path, capsys, bases, cause, monkeypatch):
    import train

    words = flags(tmp_path / "out", "--save_model_step", 1, method="all")
    if cause == "rate":
        words += ["--learning_rate", "1e30"]
    elif cause == "norm":  # a finite loss with gradients that are not: the step must not be saved
        from finetune import loss

        nll_sum = loss.nll_sum
        monkeypatch.setattr(loss, "nll_sum", lambda *a, **k: Explode.apply(nll_sum(*a, **k)))
    else:
        broken = tmp_path / "base"
        broken.mkdir()
        for path in bases["glm2"].iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        weights = load_file(broken / "model.safetensors")
        weights["transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"][0, 0] = math.inf
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        words += ["--model_name_or_path", str(broken)]
    assert train.main(words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    step = 2 if cause == "rate" else 1
    assert f"at step {step} " in line and "train.json:" in line and ("nan" in line or "inf" in line)
    assert [p.name for p in (tmp_path / "out").glob("*epoch-*")] == (
        [] if step == 1 else ["epoch-1-step-1"]
    )


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_an_adapter_that_learnt_nothing_is_warned_of(flags, train, tmp_path, capsys):
    train(flags(tmp_path / "zero", "--learning_rate", 0, "--max_steps", 1))
    assert "WARNING: every LoRA B is still zero" in capsys.readouterr().out
    train(flags(tmp_path / "some", "--max_steps", 1))
    assert "WARNING" not in capsys.readouterr().out


def test_full_disk_is_seen_before_training(flags, tmp_path, capsys, monkeypatch):
    import train

    monkeypatch.setattr(
        "finetune.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    assert train.main(flags(tmp_path / "out")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "GB are free" in line and str(tmp_path / "out") in line
    assert not list((tmp_path / "out").glob("*epoch-*"))


def test_disk_that_fills_up_leaves_nothing_half_written(flags, tmp_path, capsys, monkeypatch):
    import train

    free = chain([10**12, 10**12], repeat(1000))
    monkeypatch.setattr(
        "finetune.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=next(free))
    )
    assert train.main(flags(tmp_path / "out", "--save_model_step", 1)) == 1
    assert "GB are free" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").glob("*epoch-*")] == ["epoch-1-step-1"]


def test_what_a_run_says_and_logs(flags, train, tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        flags(
            tmp_path / "out",
            "--show_loss_step",
            2,
            "--tensorboard",
            tmp_path / "board",
            "--max_steps",
            3,
        )
    )
    out, err = capfd.readouterr()
    assert (
        "trainable: 3,072 of " in out
        and "query_key_value.lora_A.default.weight" in out
        and "step 2 loss" in out + err
    )
    assert "4 rows" in out and "training: 100%" in err
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {
        "train_loss",
        "learning_rate",
        "grad_norm",
        "memory/epoch_host_peak_gb",
        "memory/epoch_added_gb",
        "memory/epoch_peak_gb",
        "tokens_per_second",
        "memory_gb",
    }
    assert [e.step for e in board.Scalars("train_loss")] == [1, 2, 3]
    assert [e.value for e in board.Scalars("train_loss")] == pytest.approx(
        metrics(tmp_path / "out")
    )


def test_evaluation_best_and_save_limit(flags, train, tmp_path):
    """Evaluation loss is exact; the best and the newest checkpoint survive a limit of 1."""
    eval_rows = write_rows(tmp_path / "eval.json", make_rows(5, seed=3))
    out = tmp_path / "out"
    words = flags(
        out,
        "--eval_path",
        eval_rows,
        "--eval_step",
        2,
        "--per_device_eval_batch_size",
        2,
        "--num_train_epochs",
        4,
        "--save_total_limit",
        1,
        "--learning_rate",
        "2",
        "--save_model_step",
        3,
        "--eval_f1",
        "--eval_max_new_tokens",
        4,
        method="all",
    )
    folder = train(words)
    losses, steps = (
        metrics(out, "eval_loss"),
        [
            json.loads(line)["step"]
            for line in (out / "metrics.jsonl").read_text().splitlines()
            if "eval_loss" in line
        ],
    )
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16] and metrics(out, "eval_triple_f1") == [0.0] * 8
    best = json.loads((out / "best.json").read_text())
    assert best["value"] == min(losses) and best["checkpoint"].endswith(
        f"step-{steps[losses.index(min(losses))]}"
    )
    assert {p.name for p in out.glob("*epoch-*")} == {best["checkpoint"], folder.name}
    model, tokenizer, family = (
        load_model(folder, dtype=torch.float32),
        load_tokenizer(folder),
        FAMILIES["glm2"],
    )
    total = count = 0
    for row in read_rows(eval_rows)[0]:
        example = family.encode_example(tokenizer, row.prompt, row.answers[0], 96, 64)
        labelled = sum(label != -100 for label in example.labels)
        with torch.no_grad():
            total += labelled * float(
                model(
                    input_ids=torch.tensor([example.input_ids]),
                    labels=torch.tensor([example.labels]),
                ).loss
            )
        count += labelled
    assert losses[-1] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_rows_of_the_old_form_and_bad_ones(flags, train, tmp_path):
    """--prompt_text and --on_bad_row hold for the answers of --eval_f1 too."""
    rows = write_rows(
        tmp_path / "eval.json",
        [
            {"text": "水泵漏油。", "answer": "a_b_c"},
            {"text": 3},
            {"text": "油封松动。", "answer": ["a_b_c", "x"]},
        ],
    )
    train(
        flags(
            tmp_path / "out",
            "--eval_path",
            rows,
            "--eval_f1",
            "--on_bad_row",
            "skip",
            "--prompt_text",
            "抽取：",
            "--eval_max_new_tokens",
            2,
            "--max_steps",
            1,
        )
    )
    assert metrics(tmp_path / "out", "eval_triple_f1") == [0.0]


def test_unevaluated_checkpoints_carry_no_old_metrics(flags, train, tmp_path, rows_file):
    out = tmp_path / "out"
    train(flags(out, "--eval_path", rows_file, "--eval_step", 2, "--save_model_step", 1))
    found = {
        p.name: json.loads((p / "manifest.json").read_text())["metrics"]
        for p in out.glob("epoch-*")
    }
    assert [name for name in sorted(found) if found[name]] == ["epoch-1-step-2", "epoch-1-step-4"]


def test_a_second_run_in_the_same_folder_does_not_lose_its_weights(flags, tmp_path, capsys, train):
    """Either it is refused, or its checkpoints replace the first run's."""
    import train as command_line

    first = train(flags(tmp_path / "out"))
    assert not set(RANK_VARIABLES) & set(os.environ)  # a program started now is no rank
    before = load_file(first / "adapter_model.safetensors")
    code = command_line.main(flags(tmp_path / "out", "--learning_rate", "5e-2"))
    after = load_file(first / "adapter_model.safetensors")
    assert code == 1 or any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
@pytest.mark.launch
def test_sigterm_saves_and_exits_0(flags, train, tmp_path):
    """A real process; what it leaves goes on to the uninterrupted losses."""
    words = ["--num_train_epochs", 100, "--save_total_limit", 2, "--lora_dropout", "0.2"]
    child = subprocess.Popen(
        [sys.executable, "train.py", *flags(tmp_path / "out", *words)],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.time() + 120
        while time.time() < deadline and not (
            (tmp_path / "out" / "metrics.jsonl").is_file() and len(metrics(tmp_path / "out")) > 5
        ):
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 143, said[-2000:]
    stopped = len(metrics(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "stopped by signal"
    assert "stopped by signal after step" in said and list(
        (tmp_path / "out").glob(f"epoch-*-step-{stopped}/manifest.json")
    )
    assert 5 < stopped < 400
    assert load_model(next((tmp_path / "out").glob(f"epoch-*-step-{stopped}"))) is not None


def test_a8_training_never_asks_to_run_a_folders_code(bases, flags, train, tmp_path, monkeypatch):
    base = shutil.copytree(bases["glm2"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    words = [str(base) if word == str(bases["glm2"]) else word for word in flags(tmp_path / "out")]
    with pytest.raises(
        ValueError,
        match=f'{base}/config.json: wanted .*chatglm.*got "evil"; '
        "code that comes with a model .* is never run",
    ):
        train(words)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
