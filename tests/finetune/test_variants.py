"""LoRA variants, quantised bases, NEFTune, label smoothing, selective recomputation.

Each against its definition.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import merge_lora
import train as command_line
from chatglm import load_model, load_tokenizer
from chatglm.checksums import write_checksums
from chatglm.families import FAMILIES
from finetune.checkpoint import Checkpointer, read_manifest
from finetune.config import parse_config
from finetune.distributed import init_distributed
from finetune.engine import build_engine
from finetune.evaluation.inference import load_ready
from finetune.launched import ranks_restored
from finetune.loss import LossModule, nll_sum, sequence_lengths
from finetune.methods import make_method
from finetune.recompute import recompute
from finetune.row_task import shares_prefix
from finetune.rows.batches import collate
from finetune.rows.encoding import encode_rows
from finetune.rows.formats import parse_row
from finetune.task import FineTuning
from tests.finetune.runs import make_rows, metrics
from tests.finetune.test_checkpoint import same_losses, stop_after
from tests.finetune.test_training import logits_of, plain_run

VARIANTS = {  # test id -> flags
    "rslora": ["--use_rslora", "--lora_dim", "4"],
    "dora": ["--use_dora"],
    "gaussian": ["--init_lora_weights", "gaussian"],
    "orthogonal": ["--init_lora_weights", "orthogonal"],
    "olora": ["--init_lora_weights", "olora"],
    "pissa": ["--init_lora_weights", "pissa"],
    "pissa_niter": ["--init_lora_weights", "pissa_niter_4"],
    "pissa-zero3": ["--init_lora_weights", "pissa", "--ds_file", "ds_zero3_no_offload.json"],
    "pissa-rslora-dora": ["--init_lora_weights", "pissa", "--use_rslora", "--use_dora"],
    "all-linear": ["--lora_module_name", "all-linear"],
}


@pytest.fixture(scope="module")
def first_loss(flags, train, tmp_path_factory) -> float:
    out = tmp_path_factory.mktemp("plain") / "out"
    train(flags(out, "--max_steps", 1))
    return metrics(out)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_export_and_merge(flags, train, tmp_path, bases, first_loss, name):
    """The plain loop's losses.

    The export, put on the original base and merged into it, is the model.
    """
    words = flags(
        tmp_path / "out",
        *VARIANTS[name],
        "--num_train_epochs",
        2,
        "--max_steps",
        6,
        "--learning_rate",
        "2e-3",
    )
    folder = train(words)
    losses, model = plain_run(words, 4)
    assert losses[0] == pytest.approx(first_loss, rel=1e-5)  # no start changes what the model says
    assert metrics(tmp_path / "out")[:4] == pytest.approx(losses, rel=1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert any("magnitude" in n for n in trained) == ("dora" in name)
    assert (
        {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in trained}
        == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    ) == (name == "all-linear")

    config = parse_config(words)
    task = FineTuning(config)
    task.load_rows()
    with ranks_restored():
        init_distributed()
        engine, model, *_ = build_engine(config, task, 6)
    base = {"name_or_path": "", "fingerprint": read_manifest(folder)["base_model"]["fingerprint"]}
    assert (
        Checkpointer(config, tmp_path / "out", engine, model, task, base=base).resume(folder)[
            "step"
        ]
        == 6
    )
    with torch.no_grad():
        wanted = logits_of(model.eval(), folder)
    adapted = load_model(folder, dtype=torch.float32)
    assert torch.allclose(logits_of(adapted, folder), wanted, atol=1e-4)
    assert not torch.allclose(
        logits_of(load_model(bases["glm2"], dtype=torch.float32), folder), wanted, atol=1e-2
    )
    assert merge_lora.merge(bases["glm2"], folder, tmp_path / "merged").difference < 1e-4
    assert torch.allclose(
        logits_of(load_model(tmp_path / "merged", dtype=torch.float32), folder), wanted, atol=1e-4
    )


def test_pissa_resumes_and_refuses_another_start(flags, train, tmp_path, monkeypatch, capsys):
    words = [*VARIANTS["pissa_niter"], "--num_train_epochs", 2, "--lora_dropout", "0.2"]
    train(flags(tmp_path / "a", *words))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(flags(tmp_path / "b", *words))
    folder = train(flags(tmp_path / "b", *words, "--resume_from_checkpoint", "auto"))
    assert same_losses(tmp_path / "a", tmp_path / "b")
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in adapter.items() if "lora_A" in n} == {16}
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    save_file(
        {n: t.flip(-1).contiguous() if "lora_A" in n else t for n, t in adapter.items()},
        folder / "adapter_model.safetensors",
    )
    write_checksums(folder)
    capsys.readouterr()
    assert command_line.main(flags(tmp_path / "b", *words, "--resume_from_checkpoint", "auto")) == 1
    assert "another start" in capsys.readouterr().err


def test_loraplus_has_two_rates(flags, train, tmp_path):
    """B's first step is `ratio` times that without it; A's is the same.

    AdamW's first step is the learning rate, whatever the gradient.
    """
    moved = {}
    for ratio in (1, 8):
        folder = train(
            flags(
                tmp_path / f"{ratio}",
                "--max_steps",
                1,
                "--loraplus_lr_ratio",
                ratio,
                "--weight_decay",
                0,
            )
        )
        moved[ratio] = {
            n: t
            for n, t in load_file(folder / "adapter_model.safetensors").items()
            if "lora_B" in n
        }
    for name, tensor in moved[1].items():
        assert tensor.abs().max() == pytest.approx(1e-3, rel=1e-2)  # a tenth of the rate
        assert torch.allclose(moved[8][name], 8 * tensor, rtol=1e-3, atol=1e-6)
    words = ["--num_train_epochs", 2, "--loraplus_lr_ratio", 4]
    whole = train(flags(tmp_path / "whole", *words, "--save_model_step", 3))
    again = train(
        flags(
            tmp_path / "again", *words, "--resume_from_checkpoint", whole.parent / "epoch-1-step-3"
        )
    )
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize("bits, method", [(4, "lora"), (8, "lora"), (4, "ptuning-v2-mlp")])
def test_quantised_base(flags, train, tmp_path, bases, bits, method):
    """Steps over 4 and 8 bits: the plain loop's falling losses.

    The adapter loads onto whole and onto quantised weights.
    """
    pytest.importorskip("bitsandbytes")
    words = flags(
        tmp_path / "out", "--quantization_bit", bits, "--num_train_epochs", 4, method=method
    )
    folder = train(words)
    losses, model = plain_run(words, 4)
    found = metrics(tmp_path / "out")
    assert found[:4] == pytest.approx(losses, rel=1e-3) and found[-1] < 0.95 * found[0]
    assert {
        p.dtype
        for n, p in model.named_parameters()
        if "query_key_value" in n and p.ndim == 2 and "lora" not in n
    } == {torch.uint8 if bits == 4 else torch.int8}
    assert {
        p.dtype
        for n, p in model.named_parameters()
        if "output_layer" in n or "embedding" in n or p.requires_grad
    } == {torch.float32}
    assert not any(
        "absmax" in n or "SCB" in n for n in load_file(next(folder.glob("*model.safetensors")))
    )
    plain = logits_of(load_model(bases["glm2"], dtype=torch.float32), folder)
    quantised, whole = (
        logits_of(load_model(folder, dtype=torch.float32, quantization_bit=b), folder)
        for b in (bits, None)
    )
    change = (whole - plain).norm()
    assert torch.equal(
        logits_of(
            load_ready(str(folder), device="cpu", precision="fp32", quantization_bit=bits), folder
        ),
        quantised,
    )
    assert (quantised - whole).norm() < 0.3 * change and change > 0.1 * plain.norm()
    again = train(
        flags(
            tmp_path / "b",
            "--quantization_bit",
            bits,
            "--num_train_epochs",
            4,
            "--resume_from_checkpoint",
            folder.parent / "epoch-2-step-8",
            method=method,
        )
    )
    assert again.name == folder.name and metrics(tmp_path / "b") == found[8:]


REFUSED = {
    "--use_dora --ds_file ds_zero3_no_offload.json": "ZeRO-3",
    "--quantization_bit 4 --ds_file ds_zero3_offload.json": "ZeRO-3",
    "--quantization_bit 4 --train_type all --lora_dropout 0.1": (
        "--quantization_bit needs frozen weights"
    ),
    "--quantization_bit 5": "invalid choice: 5",
    "--quantization_bit 4 --init_lora_weights pissa": "needs whole weights",
    "--init_lora_weights eva": "got 'eva'",
    "--gradient_checkpointing_layers 1": "needs --gradient_checkpointing",
    "--gradient_checkpointing --gradient_checkpointing_layers x": "N or a-b",
    "--gradient_checkpointing --gradient_checkpointing_layers 1-2": "2 layers, 0 to 1",
    "--label_smoothing 1": "must be in [0, 1)",
    "--loraplus_lr_ratio 0": "must be above 0",
    "--init_lora_weights orthogonal --lora_dim 3": "even",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(flags, tmp_path, capsys, words):
    try:
        code = command_line.main(flags(tmp_path / "out", *words.split()))
    except SystemExit as error:
        code = error.code
    assert (
        code and REFUSED[words] in capsys.readouterr().err and not list(tmp_path.glob("out/epoch*"))
    )


def test_without_bitsandbytes(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert command_line.main(flags(tmp_path / "out", "--quantization_bit", 4)) == 1
    assert "[qlora]" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def data(bases):
    rows = [parse_row(item, f"f:{i}") for i, item in enumerate(make_rows(5))]
    return encode_rows(
        rows, load_tokenizer(bases["glm2"]), FAMILIES["glm2"], max_len=96, max_src_len=64
    )


LAYOUTS = [{"ragged": True}, {"ragged": True, "multiple": 32}, {"ragged": False}]


@pytest.mark.parametrize("lora", ["query_key_value", "query_key_value,output_layer"])
def test_label_smoothing(flags, bases, data, lora):
    """torch's own loss over the vocabulary, also with LoRA on the output layer.

    None in evaluation.
    """
    config = parse_config(flags("x", "--lora_module_name", lora))
    model = (
        make_method(config).make_trainable(load_model(bases["glm2"], dtype=torch.float32)).eval()
    )
    found, ids = [], [torch.tensor(data.ids(row)).long() for row in range(len(data))]
    masked = [data.n_masked(row) for row in range(len(data))]
    for smoothing in (0.0, 0.2):
        with torch.no_grad():
            logits = [
                model(input_ids=row[None]).logits[0, n - 1 : -1] for row, n in zip(ids, masked)
            ]
        targets = torch.cat([row[n:] for row, n in zip(ids, masked)])
        wanted = F.cross_entropy(
            torch.cat(logits), targets, reduction="sum", label_smoothing=smoothing
        )
        for layout in LAYOUTS:
            module = LossModule(model, smoothing=smoothing).train()
            found.append(float(module(**collate(data, [0, 1, 2, 3, 4, -1], **layout)).detach()))
            assert found[-1] == pytest.approx(float(wanted), rel=1e-5)
    module.eval()
    assert (
        float(module(**collate(data, [0, 1, 2, 3, 4])).detach())
        == pytest.approx(found[0], rel=1e-5)
        != found[-1]
    )


def test_neftune_noise(bases, data):
    """Uniform within alpha / sqrt(L d), L each sequence's length in every layout.

    Off in evaluation.
    """
    model = load_model(bases["glm2"], dtype=torch.float32)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(out))
    read = []
    model.transformer.encoder.layers[0].register_forward_pre_hook(
        lambda m, args: read.append(args[0])
    )
    lengths = (data.row_lengths[:3] - 1).tolist()
    for layout in LAYOUTS:
        batch = collate(data, [0, 1, 2], **layout)
        module = LossModule(model, noise_alpha=5).train()
        clean = model.get_input_embeddings()(batch["input_ids"])
        read.clear()
        module(**batch)
        noise, start = (read[0] - clean).detach(), 0
        assert sequence_lengths(**batch).unique().tolist() == sorted(set(lengths))
        for i, length in enumerate(lengths):
            own = noise[0, start : start + length] if layout["ragged"] else noise[i, :length]
            start += length
            bound = 5 / math.sqrt(length * own.shape[-1])
            assert own.abs().max() <= bound * (1 + 1e-4) and own.abs().max() > 0.98 * bound
            assert abs(float(own.mean())) < 0.05 * bound and float(own.std()) == pytest.approx(
                bound / math.sqrt(3), rel=0.05
            )
        module.eval()
        assert float(module(**batch)) == pytest.approx(float(nll_sum(model, **batch)), rel=1e-6)
    assert len(model.get_input_embeddings()._forward_hooks) == 1  # this test's own


def test_neftune_resumes_bit_for_bit(flags, train, tmp_path):
    words = ["--neftune_noise_alpha", 5, "--label_smoothing", 0.1, "--num_train_epochs", 2]
    folder = train(flags(tmp_path / "a", *words, "--save_model_step", 3))
    train(flags(tmp_path / "plain", *words[2:]))
    train(
        flags(tmp_path / "b", *words, "--resume_from_checkpoint", folder.parent / "epoch-1-step-3")
    )
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")[3:]
    assert metrics(tmp_path / "a")[0] != metrics(tmp_path / "plain")[0]
    assert shares_prefix(parse_config(flags("x"))) and not shares_prefix(
        parse_config(flags("x", *map(str, words)))
    )


def test_recomputing_some_layers(flags, train, tmp_path, bases):
    """The numbers stay; 1 and 0-0 are the first layer, 1-1 the second."""
    model = load_model(bases["glm2"])
    for chosen, wanted in {
        "1": [True, False],
        "0-0": [True, False],
        "1-1": [False, True],
        "2": [True, True],
        "": [True, True],
    }.items():
        recompute(model, "True", chosen)
        assert [
            block.gradient_checkpointing for block in model.transformer.encoder.layers
        ] == wanted
    runs = []
    for n, more in enumerate(
        [[], ["--gradient_checkpointing", "--gradient_checkpointing_layers", "1-1"]]
    ):
        train(flags(tmp_path / f"{n}", "--max_steps", 3, *more))
        runs.append(metrics(tmp_path / f"{n}"))
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)
