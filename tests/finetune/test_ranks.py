"""Two ranks: all cases of one launch (conftest.two_ranks), which costs more than any one run."""

import json
import re
from pathlib import Path

import pytest
import torch

import train as command_line
from chatglm import load_model
from finetune.rows.sources import read_rows
from tests.finetune.runs import STOPS, TWO_RANKS, launch, metrics
from tests.finetune.test_checkpoint import same_losses
from tests.finetune.test_training import logits_of, plain_run

RANK = """
import torch.distributed as dist
from finetune.distributed import on_each_rank, rank
dist.init_process_group("gloo")
print(on_each_rank(rank), flush=True)
def fail():
    if rank():
        raise ValueError("no answer could be sampled")
try:
    on_each_rank(fail)
except ValueError as error:
    print(error, flush=True)
"""


@pytest.mark.launch
def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    written = launch("torchrun", script).stdout  # of two processes: lines may come in one another
    assert sorted(re.findall(r"\d", written)) == ["0", "1"]
    assert written.count("no answer could be sampled") == 2


@pytest.mark.launch
@pytest.mark.parametrize(
    "number", range(len(TWO_RANKS)), ids=["-".join(case) for case in TWO_RANKS]
)
def test_two_ranks(two_ranks, number):
    """2 ranks through the launcher give the plain loop's losses and export its model."""
    words = two_ranks[number]  # run once for all of them
    out = Path(words[words.index("--output_dir") + 1])
    losses, model = plain_run([*words, "--gradient_accumulation_steps", "2"], 8)
    assert metrics(out) == pytest.approx(losses, rel=1e-5)
    folder = out / "epoch-2-step-8"
    assert json.loads((folder / "manifest.json").read_text())["world_size"] == 2
    assert torch.allclose(
        logits_of(load_model(folder, dtype=torch.float32), folder),
        logits_of(model, folder),
        atol=2e-4,
    )


@pytest.mark.launch
def test_two_ranks_stop_early_where_one_does(two_ranks, flags, train, rows_file, tmp_path):
    """The same losses, the same last step.

    Both ranks' answers in one file, each row once, in order.
    """
    words = two_ranks[7]
    two, one = Path(words[words.index("--output_dir") + 1]), tmp_path / "out"
    train(flags(one, "--eval_path", rows_file, *STOPS, method="all"))
    assert (
        metrics(two, "eval_loss") == pytest.approx(metrics(one, "eval_loss"), rel=1e-3)
        and len(metrics(two)) == len(metrics(one)) < 24
    )
    assert [json.loads((out / "run.json").read_text())["status"] for out in (one, two)] == [
        "stopped early"
    ] * 2
    lines = [
        json.loads(line) for line in (two / "predictions" / "step-1.jsonl").read_text().splitlines()
    ]
    assert [line["reference"] for line in lines] == [
        list(row.answers) for row in read_rows(rows_file)[0]
    ]


@pytest.mark.launch
def test_two_ranks_resume_and_refuse_another_count(two_ranks, capsys):
    """ZeRO-3 on 2 ranks: a resume from the middle repeats the steps bit for bit.

    1 rank is refused, as its steps are smaller.
    """
    resumed, whole = (Path(words[words.index("--output_dir") + 1]) for words in two_ranks[5:7])
    assert same_losses(resumed, whole) and len(metrics(whole)) == 8
    assert (
        command_line.main(
            [
                *two_ranks[5],
                "--resume_from_checkpoint",
                "auto",
                "--per_device_train_batch_size",
                "2",
            ]
        )
        == 1
    )
    assert (
        "made by 2 ranks in steps of 4 rows, this run has 1 and steps of 2: "
        "go on with --gradient_accumulation_steps 2" in capsys.readouterr().err
    )
