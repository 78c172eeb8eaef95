"""--adapter: training that goes on from an adapter, this toolkit's or another's."""

import json
import re
import shutil

import pytest
import torch

import merge_lora
import train as command_line
from chatglm import load_model
from finetune.config import parse_config
from finetune.task import FineTuning
from tests.chatglm.test_foreign_adapters import peft_config, random_lora, write_adapter
from tests.finetune.runs import metrics
from tests.finetune.test_checkpoint import same_losses, stop_after
from tests.finetune.test_training import logits_of

# The flags of LoRA that `flags` gives, which a run from an adapter of other sizes leaves out.
LORA = ("--lora_dim", "--lora_alpha", "--lora_module_name", "--lora_dropout")
NAMES = "base_model.model.{}.lora_{}.weight"


def without_lora(words):
    kept = list(map(str, words))
    for flag in LORA:
        while flag in kept:
            place = kept.index(flag)
            del kept[place : place + 2]
    return kept


def foreign(base, folder, **changes):
    """An adapter of all linear layers in attention, of rank 4 and 2, as LLaMA-Factory saves it."""
    lora = random_lora(base, layers=range(2))
    lora |= random_lora(
        base, rank=2, layers=range(2), names=["transformer.encoder.layers.{}.self_attention.dense"]
    )
    tensors = {}
    for module, (a, b) in lora.items():
        tensors |= {NAMES.format(module, "A"): a, NAMES.format(module, "B"): 0.1 * b}
    targets = {"target_modules": ["dense", "query_key_value"], "layers_to_transform": [0, 1]}
    options = targets | {"rank_pattern": {"dense": 2}} | changes
    return write_adapter(folder, peft_config(base, **options), tensors)


def test_training_goes_on_from_an_adapter_of_others(flags, train, bases, tmp_path):
    folder = foreign(bases["glm2"], tmp_path / "ad")
    words = without_lora(flags(tmp_path / "out", "--adapter", folder, "--max_steps", 3))
    config = parse_config(words)
    assert (config.lora_dim, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.lora_module_name == "dense,query_key_value"
    task = FineTuning(config)
    started = task.build_model(torch.float32).eval()
    adapted = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(logits_of(started, folder), logits_of(adapted, folder))
    trained = {n for n, p in started.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)

    last = train(words)
    found = load_model(last, dtype=torch.float32)
    with torch.no_grad():
        wanted = logits_of(found, last)
        assert not torch.allclose(wanted, logits_of(adapted, folder), atol=1e-3)
    assert merge_lora.merge(bases["glm2"], last, tmp_path / "merged").difference < 1e-4
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(logits_of(merged, last), wanted, atol=1e-3)
    saved = json.loads((last / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"]) == (4, {"dense": 2})
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["flags"]["adapter"] == str(folder) and record["flags"]["lora_dim"] == 4


@pytest.mark.parametrize("stage", ["ds_zero2_no_offload.json", "ds_zero3_no_offload.json"])
def test_two_runs_are_one(flags, train, adapter, tmp_path, stage):
    """The loss of a run's first step is that of the adapter; a resumed run is an unbroken one."""
    dropout = ["--lora_dropout", "0.2"]

    def words(name, *more):
        start = ["--adapter", adapter, "--ds_file", stage, "--max_steps", 4]
        return [*without_lora(flags(tmp_path / name, *start, *more)), *dropout]

    train(words("a"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        train(words("b"))
    train(words("b", "--resume_from_checkpoint", "auto"))
    assert same_losses(tmp_path / "a", tmp_path / "b")
    train(flags(tmp_path / "new", "--max_steps", 1))
    assert metrics(tmp_path / "a")[0] < metrics(tmp_path / "new")[0] - 0.01


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_dim", 3], "--lora_dim 3 contradicts --adapter"),
        (["--lora_alpha", 3], "--lora_alpha 3 contradicts --adapter"),
        (["--lora_module_name", "dense"], "--lora_module_name dense contradicts --adapter"),
        (["--use_dora"], "--use_dora True contradicts --adapter"),
        (["--init_lora_weights", "pissa"], "--init_lora_weights needs --train_type lora without"),
        (["--train_type", "all"], "--adapter needs --train_type lora; got all"),
    ],
)
def test_flags_that_contradict_are_refused_by_name(flags, adapter, tmp_path, capsys, more, said):
    words = [*without_lora(flags(tmp_path / "out", "--adapter", adapter)), *map(str, more)]
    with pytest.raises(SystemExit) as stop:
        parse_config(words)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in err and len(err.splitlines()) == 1


REFUSED = {  # test id -> (changes of adapter_config.json, what is said)
    "ia3": ({"peft_type": "IA3"}, "wanted peft_type LORA, got .IA3."),
    "embedding": ({"modules_to_save": ["word_embeddings"]}, "modules_to_save .* not trained on"),
    "bias": ({"bias": "all"}, "bias .* not trained on"),
    "rank": ({"r": "4"}, "r cannot be .4."),
    "alpha": ({"lora_alpha": True}, "lora_alpha cannot be true"),
    "targets": ({"target_modules": []}, "target_modules cannot be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_trained_on(flags, bases, tmp_path, capsys, case):
    changes, said = REFUSED[case]
    folder = foreign(bases["glm2"], tmp_path / "ad", **changes)
    with pytest.raises(SystemExit):
        parse_config(without_lora(flags(tmp_path / "out", "--adapter", folder)))
    assert_one_line(capsys, said)


def assert_one_line(capsys, said):
    err = capsys.readouterr().err.strip()
    assert re.search(said, err) and len(err.splitlines()) == 1, err


def test_an_adapter_of_another_base_or_start_is_refused(flags, adapter, bases, tmp_path, capsys):
    other = shutil.copytree(adapter, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["base_model"]["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    words = without_lora(flags(tmp_path / "out", "--adapter", other, "--max_steps", 1))
    assert command_line.main(words) == 1
    assert "fingerprints differ" in capsys.readouterr().err.strip().splitlines()[-1]
    pissa = foreign(bases["glm2"], tmp_path / "pissa", init_lora_weights="pissa")
    words = without_lora(flags(tmp_path / "out", "--adapter", pissa, "--max_steps", 1))
    assert command_line.main(words) == 1
    assert "training changed its base" in capsys.readouterr().err.strip().splitlines()[-1]
