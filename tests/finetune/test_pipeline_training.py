"""--num_stages: a model in stages trains as one process does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.config import parse_config
from finetune.engine import check_start
from finetune.stages import layer_bounds
from tests.conftest import tiny_model
from tests.finetune.runs import ROOT, command, launch, metrics

STEPS = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3]
TWO = ["--num_stages", 2, "--ds_file", "ds_zero1.json"]
# What is trained in two stages and in one process: family, method, flags of both.
CASES = {
    "glm-lora": ("glm", "lora", []),
    "glm2-lora": ("glm2", "lora", []),
    "glm3-lora": ("glm3", "lora", []),
    "glm4-lora": ("glm4", "lora", []),
    "glm-all": ("glm", "all", []),
    "glm2-all": ("glm2", "all", []),
    "glm3-all": ("glm3", "all", []),
    "glm4-all": ("glm4", "all", []),
    "padded": ("glm2", "lora", ["--batching", "padded"]),
    "padded-glm": ("glm", "all", ["--batching", "grouped", "--per_device_train_batch_size", 4]),
    "one-row": ("glm2", "all", ["--per_device_train_batch_size", 1]),
    "recomputed": ("glm2", "lora", ["--gradient_checkpointing", "True"]),
    "smoothed": ("glm3", "all", ["--label_smoothing", "0.1"]),
    "loraplus": ("glm2", "lora", ["--loraplus_lr_ratio", "4", "--lora_module_name", "all-linear"]),
    "dora": ("glm2", "lora", ["--use_dora"]),
    "pissa": ("glm2", "lora", ["--init_lora_weights", "pissa"]),
    "bf16-all": ("glm2", "all", ["--precision", "bf16"]),
    "bf16-lora": ("glm4", "lora", ["--precision", "bf16"]),
}


def weights(folder) -> dict[str, torch.Tensor]:
    """The exported tensors of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_run(staged, plain, tolerance=1e-5, eval_keys=("eval_loss",)):
    """Losses, norms and exported weights of two runs' folders."""
    for key in ("train_loss", "grad_norm", *eval_keys):
        assert metrics(staged, key) == pytest.approx(metrics(plain, key), rel=tolerance)
        assert metrics(plain, key)
    [ours, theirs] = [sorted(run.glob("epoch-*"))[-1] for run in (staged, plain)]
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    assert ours.name == theirs.name
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, rtol=50 * tolerance, atol=50 * tolerance)


def test_two_stages_train_as_one_process(flags, train, rows_file, tmp_path):
    words = [*STEPS, "--eval_path", rows_file, "--max_steps", 2]
    train(flags(tmp_path / "plain", *words))
    launch("torchrun", "train.py", *flags(tmp_path / "staged", *words, *TWO))
    assert_same_run(tmp_path / "staged", tmp_path / "plain")


@pytest.fixture(scope="module")
def runs(flags, train, rows_file, tmp_path_factory):
    """{name: (folder of the run in two stages, of the plain one)} of CASES."""
    folder = tmp_path_factory.mktemp("runs")
    found, staged = {}, []
    for name, (family, method, more) in CASES.items():
        more = [*STEPS, "--num_train_epochs", 2, "--eval_path", rows_file, *more]
        found[name] = folder / f"{name}-staged", folder / name
        train(flags(found[name][1], *more, family=family, method=method))
        staged.append(flags(found[name][0], *more, *TWO, family=family, method=method))
    (folder / "cases.json").write_text(json.dumps(staged))
    launch("torchrun", "tests/finetune/worker.py", folder / "cases.json", timeout=1200)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_family_and_method(runs, name):
    assert_same_run(*runs[name], tolerance=5e-3 if "bf16" in name else 1e-5)


# What four ranks run: family, method, stages, DeepSpeed's file, flags.
GRIDS = {
    "four-stages": ("glm2", "lora", 4, "ds_zero1.json", []),
    "four-stages-tied": ("glm", "all", 4, "zero0.json", []),
    "two-by-two-lora": ("glm4", "lora", 2, "zero0.json", []),
    "two-by-two": ("glm3", "all", 2, "ds_zero1.json", []),
    "two-by-two-tied": ("glm", "all", 2, "ds_zero1.json", []),
    "two-by-two-bf16": ("glm2", "all", 2, "zero0.json", ["--precision", "bf16"]),
    "two-by-two-offload": ("glm4", "all", 2, "offload.json", []),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """{name: path} of DeepSpeed files that are not shipped."""
    folder = tmp_path_factory.mktemp("files")
    text = (ROOT / "ds_configs" / "ds_zero1.json").read_text()
    for name, change in {
        "zero0.json": {"stage": 0},
        "offload.json": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    }.items():
        ds = json.loads(text)
        ds["zero_optimization"] |= change
        (folder / name).write_text(json.dumps(ds))
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def grids(flags, train, files, bases, rows_file, tmp_path_factory):
    """{name: (folder of the run on four ranks, of the plain one)} of GRIDS; models of 4 layers."""
    from scripts.prepare_small_model import make_model

    folder = tmp_path_factory.mktemp("grids")
    found, staged = {}, []
    sizes = {"hidden_size": 64, "num_layers": 4, "heads": 4, "ffn": 128}
    for name, (family, method, stages, ds_file, more) in GRIDS.items():
        base = folder / f"base-{family}"
        if not base.exists():
            make_model(family, bases[family].parent / f"tokenizer-{family}", base, **sizes)
        more = ["--model_name_or_path", base, "--eval_path", rows_file, "--max_steps", 3, *more]
        found[name] = folder / f"{name}-staged", folder / name
        passes = 3 * 4 // stages
        words = [*STEPS, *more, "--gradient_accumulation_steps", passes]
        train(flags(found[name][1], *words, family=family, method=method))
        words = [*STEPS, *more, "--num_stages", stages, "--ds_file", files.get(ds_file, ds_file)]
        staged.append(flags(found[name][0], *words, family=family, method=method))
    (folder / "cases.json").write_text(json.dumps(staged))
    worker = "tests/finetune/worker.py"
    launch("torchrun", worker, folder / "cases.json", ranks=4, timeout=1200)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_four_ranks(grids, name):
    """Stages between others, and pipelines side by side."""
    assert_same_run(*grids[name], tolerance=5e-3 if "bf16" in name else 1e-5)


@pytest.mark.slow
def test_a_resume_repeats_the_steps(flags, files, tmp_path):
    """With dropout, bit for bit; on the stages that the checkpoint was made on."""
    cases = []
    for name, method, ds_file in (
        ("lora", "lora", files["zero0.json"]),
        ("zero1", "lora", "ds_zero1.json"),
        ("all", "all", "ds_zero1.json"),
    ):
        words = [
            *STEPS,
            "--num_train_epochs",
            2,
            "--save_model_step",
            2,
            *TWO,
            "--ds_file",
            ds_file,
        ]
        words += ["--lora_dropout", "0.3"] if method == "lora" else []
        whole = flags(tmp_path / name, *words, method=method)
        again = flags(tmp_path / f"{name}-again", *words, method=method)
        first = tmp_path / f"{name}-again" / "epoch-1-step-2"
        cases += [whole, again, [*again, "--resume_from_checkpoint", str(first)]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch("deepspeed", "tests/finetune/worker.py", tmp_path / "cases.json", timeout=900)
    for name in ("lora", "zero1", "all"):
        whole, again = tmp_path / name, tmp_path / f"{name}-again"
        assert len(metrics(whole)) == 6 and metrics(again) == metrics(whole)
        assert (again / "set-aside-1").is_dir()
        assert_same_run(again, whole, tolerance=0, eval_keys=())
    resumed = [*cases[2], "--resume_from_checkpoint", "auto", "--num_stages", "1"]
    done = command("train.py", *resumed, ok=False)
    assert "--num_stages: was 2, is 1" in done.stderr
    more = [*cases[2], "--resume_from_checkpoint", "auto"]
    done = launch("torchrun", "train.py", *more, ranks=4, ok=False)
    assert "made by 2 ranks: a run with --num_stages resumes on as many" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_type", "freeze"], "--num_stages 2 trains with --train_type lora or all"),
        (["--train_type", "ptuning"], "trains with --train_type lora or all; got ptuning"),
        (["--quantization_bit", 4], "no rank has the whole model, which --quantization_bit needs"),
        (["--neftune_noise_alpha", 5], "which --neftune_noise_alpha needs"),
        (["--eval_path", "rows.json", "--eval_metrics", "bleu"], "which --eval_metrics needs"),
    ],
)
def test_flags_that_stages_cannot_have(flags, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        parse_config(flags(tmp_path, "--num_stages", 2, *map(str, more)))
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]


def test_ranks_and_zero_that_do_not_fit(flags, tmp_path, monkeypatch):
    two = parse_config(flags(tmp_path, "--num_stages", 2))
    with pytest.raises(ValueError, match="wanted a multiple of 2 ranks.*this run has 1$"):
        check_start(two, tmp_path)
    monkeypatch.setattr("finetune.distributed.world_size", lambda: 4)
    with pytest.raises(ValueError, match="ZeRO-0 or 1.*ds_zero2.json asks for ZeRO-2"):
        check_start(two, tmp_path)


@pytest.mark.parametrize(
    ("sizes", "stages", "bounds"),
    [
        ([266, *[203] * 28, 0, 266], 4, [0, 7, 15, 23, 31]),  # ChatGLM2-6B, in millions
        ([1, 1, 1, 1, 1], 2, [0, 2, 5]),
        ([900, 1, 1, 1, 0, 0], 3, [0, 2, 3, 6]),
    ],
)
def test_layers_are_shared_out_by_size(sizes, stages, bounds):
    assert layer_bounds(sizes, stages) == bounds


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="--num_stages 3: this model has 2 layers"):
        layer_bounds([5, 1, 1, 0, 5], 3)


def test_models_that_have_no_stages():
    """Said before any process is waited for."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from finetune.pipeline import StagedModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 2}
    other = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="needs a ChatGLM or GLM-4; .* is a qwen2"):
        StagedModel(other, 2)
    model = tiny_model("glm2")
    with pytest.raises(ValueError, match="--num_stages 4: this model has 3 layers, one a stage"):
        StagedModel(model, 4)
    model.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="train in each stage; only 1 of them have any"):
        StagedModel(model, 2)
