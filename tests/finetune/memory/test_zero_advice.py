"""--suggest and --guide: what fits a card at the least cost, and docs/zero.md."""

import json
from dataclasses import replace

import pytest

from finetune.config import TrainConfig
from finetune.distributed import deepspeed_config
from finetune.ds_file import read_ds_file
from finetune.memory.advice import CHOICES, RECOMPUTING, longest_that_fits, suggestions
from finetune.memory.cards import CARDS, MIB
from finetune.memory.command import main, make_run, read_zero
from finetune.memory.formula import estimate
from finetune.memory.guide import guide_text
from tests.conftest import REPO_ROOT


def run_of(method: str, gpus: int = 1, rows: int = 16, **more):
    config = TrainConfig(
        model_name_or_path="chatglm2-6b",
        train_path="-",
        train_type=method,
        per_device_train_batch_size=rows,
        **more,
    )
    return make_run(config, gpus=gpus)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.title)
def test_every_choice_is_a_file_that_train_py_takes(choice, tmp_path):
    """What the estimate takes for a choice is what it reads from the written file."""
    path = tmp_path / "ds.json"
    path.write_text(choice.content())
    assert read_zero(str(path), 4096) == choice.zero(4096)
    config = TrainConfig(model_name_or_path="-", train_path="-", ds_file=str(path))
    made = deepspeed_config(
        config, precision="bf16", adapters=False, total_steps=10, hidden_size=64, world=2
    )
    assert made["zero_optimization"]["stage"] == choice.zero(64).stage
    if not choice.changes:
        assert json.loads(choice.content()) == read_ds_file(choice.file)[1]


@pytest.mark.parametrize("method, gpus", [("lora", 1), ("all", 1), ("all", 4), ("freeze", 2)])
@pytest.mark.parametrize("card", ["T4", "A40", "H200"])
def test_suggestions_fit_and_keep_the_step(method, gpus, card):
    asked, size = run_of(method, gpus), CARDS[card] * MIB
    found = suggestions(asked, size)
    assert found and [each.cost for each in found] == sorted(each.cost for each in found)
    for each in found:
        assert estimate(each.run).needed <= size
        assert each.run.batch * each.run.accumulation == 16 and each.run.gpus == gpus
        assert each.run.zero == each.choice.zero(4096) and gpus >= each.choice.ranks
    # Nothing cheaper than the first fits, even with one row a pass.
    best = found[0]
    for choice in CHOICES:
        for recomputing, slower in RECOMPUTING.items():
            if choice.slower * slower < best.cost and gpus >= choice.ranks:
                one = replace(
                    best.run,
                    zero=choice.zero(4096),
                    checkpointing=recomputing != "False",
                    selective=recomputing == "selective",
                    batch=1,
                    accumulation=16,
                )
                assert estimate(one).needed > size


def test_what_is_asked_is_kept():
    """A large card changes nothing; recomputing that is asked stays; host RAM is a limit."""
    size = CARDS["H200"] * MIB
    best = suggestions(run_of("lora", rows=4), size)[0]
    assert (best.choice, best.recomputing, best.run.batch) == (CHOICES[0], "False", 4)
    asked = run_of("lora", rows=4, gradient_checkpointing="selective")
    assert {each.recomputing for each in suggestions(asked, size)} == {"selective", "True"}
    full = run_of("all", gpus=2)
    card = CARDS["RTX3090"] * MIB
    least = min(each.host_bytes for each in suggestions(full, card))
    assert suggestions(full, card, least) and not suggestions(full, card, 0.9 * least)
    length, _ = longest_that_fits(full, card)
    assert not suggestions(replace(full, length=length + 8, batch=1), card)


def test_suggest(tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--suggest", "--model", "chatglm2-6b", "--train_type", "all", "--gpu", "A40"]
    assert main([*words, "--num_gpus", "4", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(file.read_text())["suggestions"]
    assert figures[0]["flags"] in shown and "other ways that fit" in shown
    assert figures[0]["needed"] <= CARDS["A40"] * MIB
    # A shipped file is not written again; a changed one is.
    out = tmp_path / "ds.json"
    assert main([*words, "--num_gpus", "4", "--write", str(out)]) == 0
    assert "is shipped and does it" in capsys.readouterr().out and not out.exists()
    words[2], words[6] = "chatglm2-6b", "T4"
    assert main([*words, "--num_gpus", "4", "--write", str(out)]) == 0
    shown = capsys.readouterr().out
    zero = json.loads(out.read_text())["zero_optimization"]
    assert f"--ds_file {out} " in shown and zero["stage3_max_live_parameters"] == 10**8


@pytest.mark.parametrize(
    "words, said",
    [
        (["--max_len", "200000"], "no DeepSpeed file makes rows of 200000 tokens fit 1 x T4"),
        (["--host_gb", "20"], "--host_gb 20: what fits 1 x T4 needs at least "),
    ],
)
def test_nothing_fits_is_one_line(words, said, capsys):
    asked = ["--suggest", "--model", "chatglm2-6b", "--train_type", "all", "--gpu", "T4"]
    assert main([*asked, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"finetune.memory: error: {said}") and error.count("\n") == 1
    assert "--train_type lora" in error


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "chatglm2-6b", "--write", "x.json"],
        ["--model", "chatglm2-6b", "--suggest", "--ds_file", "ds_zero3_offload.json"],
        ["--guide", "--model", "chatglm2-6b"],
        ["--table", "--suggest"],
    ],
)
def test_flags_without_effect_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "it has no effect otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("language, page", [("en", "docs/zero.md"), ("zh", "docs/zh/zero.md")])
def test_the_page_is_what_the_command_prints(language, page):
    text = (REPO_ROOT / page).read_text(encoding="utf-8")
    begin, end = f"<!-- --guide {language} -->\n\n", "\n\n<!-- end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.split(begin)[1].split(end)[0] == guide_text(language, make_run)
