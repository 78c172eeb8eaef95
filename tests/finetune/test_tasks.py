"""The contract of an entry of train.TASKS: one loop, the same flags, checkpoints and launchers."""

import json
import subprocess
import sys
import time

import pytest

import train as command_line
from chatglm import load_model
from finetune.checkpoint import committed_checkpoints
from finetune.config import flags_of
from finetune.flag_groups import TASK_NAMES
from tests.finetune.runs import METHODS, ROOT, child_env, launch, metrics
from tests.finetune.tasks import CASES, last_metrics, learns, parse, run, stop_in_step, task_flags
from tests.finetune.test_checkpoint import same_losses
from tests.finetune.test_flag_effects import GLOBAL

NEEDED = ["--model_name_or_path", "m", "--train_path", "t"]
# Flags of tasks that change every run; the others have their effects in a table.
OWN = {"packing", "objective", "txt_documents", "pairs", "margin", "score_margin", "center"}
OWN |= {"loss_type", "beta", "rewards", "reward_clip", "missing_end_penalty", "num_generations"}
OWN |= {"max_new_tokens", "temperature", "top_p", "top_k", "kl_coef", "clip_range"}
OWN |= {"clip_range_high", "clip_range_value", "rollout_steps", "rollout_epochs", "rollout_batch"}
OWN |= {"length_predictor", "advantage_scale", "loss_norm", "vf_coef", "gamma", "gae_lambda"}
OWN |= {"whiten_rewards", "ema_decay", "pretrain_path"}
TASKS = [name for name in CASES if name != "finetune"]  # its own tests go deeper
# Every family with one method, and one family with every method; slow: all of them.
QUICK = [(family, "lora") for family in ("glm", "glm2", "glm3", "glm4")]
QUICK += [("glm2", method) for method in METHODS if method != "lora"]
GRID = list(QUICK)
for other in ("glm", "glm3", "glm4"):
    for name in sorted(METHODS.keys() - {"lora"}):
        GRID.append(pytest.param(other, name, marks=pytest.mark.slow))


def test_the_registry_is_the_flags_choices():
    assert tuple(command_line.TASKS) == TASK_NAMES
    assert {*CASES, "predictor"} == set(TASK_NAMES)  # the predictor has contract tests of its own


@pytest.mark.parametrize("task", TASKS)
def test_flags(task, capsys):
    """--task names it, its help is its own, and a flag without effect is refused by name."""
    config_class = command_line.TASKS[task].config()
    names = {f.name for f in flags_of(config_class)}
    assert names - GLOBAL - OWN <= config_class.effects.keys()
    assert parse([*NEEDED, "--task", task, *CASES[task].flags]).task == task
    with pytest.raises(SystemExit):
        parse(["--task", task, "--help"])
    assert config_class.title in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        more = [*CASES[task].flags, "--train_type", "all", "--lora_dim", "4"]
        parse([*NEEDED, "--task", task, *more])
    assert "--lora_dim needs --train_type lora" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = (
        "import sys, train\n"
        "for entry in list(train.TASKS.values())[:-1]: entry.config()\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family, method", GRID)
def test_trains(bases, tmp_path, task, family, method):
    """The loss falls, the metrics are there, and what is exported loads."""
    more = ["--num_train_epochs", 3]
    if (task, method) == ("dpo", "ptuning-v2"):  # a few vectors move a random model little
        more += ["--learning_rate", "0.1"]
    folder = run(task_flags(task, CASES[task], bases[family], tmp_path, *more, method=method))
    assert learns(tmp_path / "out", CASES[task])
    assert set(last_metrics(folder)) == {"loss", *CASES[task].metrics}
    load_model(folder)


@pytest.mark.parametrize("task", TASKS)
def test_other_causal_models(bases, tmp_path, task):
    words = task_flags(task, CASES[task], bases["qwen2"], tmp_path, "--lora_module_name", "q_proj")
    run([*words, "--num_train_epochs", "3"])
    assert learns(tmp_path / "out", CASES[task])


@pytest.mark.parametrize("method", ["lora", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_stopped_and_resumed_is_bit_identical(bases, tmp_path, monkeypatch, task, method):
    case, base = CASES[task], bases["glm2"]
    more = ["--num_train_epochs", 3]
    more += ["--lora_dropout", "0.2"] if method == "lora" else []
    words = task_flags(task, case, base, tmp_path / "a", *more, method=method)
    last = run(words)
    steps = len(metrics(tmp_path / "a" / "out"))
    again = task_flags(task, case, base, tmp_path / "b", *more, method=method)
    with monkeypatch.context() as patch:
        stop_in_step(patch, steps // 2)
        run(again)
    assert 0 < len(metrics(tmp_path / "b" / "out")) < steps
    resumed = run([*again, "--resume_from_checkpoint", "auto"])
    assert same_losses(tmp_path / "a" / "out", tmp_path / "b" / "out")
    for file in last.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_kill_9(bases, tmp_path, task):
    """A real process and a real SIGKILL: what a resumed run repeats is the same, bit for bit."""
    case, base = CASES[task], bases["glm2"]
    more = ["--num_train_epochs", 4, "--save_model_step", 1]
    run(task_flags(task, case, base, tmp_path / "whole", *more))
    words = task_flags(task, case, base, tmp_path / "killed", *more)
    out = tmp_path / "killed" / "out"
    child = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=child_env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while child.poll() is None and not committed_checkpoints(out):
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    run([*words, "--resume_from_checkpoint", "auto"])
    assert same_losses(out, tmp_path / "whole" / "out")


@pytest.mark.launch
@pytest.mark.slow
def test_two_ranks(bases, ds_files, tmp_path):
    """2 ranks under ZeRO-2 and ZeRO-3 give 1 rank's losses and metrics; one launch for all."""
    cases = []
    for task in TASKS:
        for ds_file, method in (("ds_zero2.json", "lora"), ("ds_zero3_no_offload.json", "all")):
            file = ds_files.get(ds_file, ds_file)
            folder = tmp_path / f"{task}-{method}"
            shared = ["--num_train_epochs", 2, "--ds_file", file]
            one = ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2]
            place = (task, CASES[task], bases["glm2"])
            run(task_flags(*place, folder / "1", *shared, *one, method=method))
            cases.append(task_flags(*place, folder / "2", *shared, *one[2:], method=method))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch("torchrun", "tests/finetune/worker.py", tmp_path / "cases.json")
    for task in TASKS:
        for method in ("lora", "all"):
            one, two = (tmp_path / f"{task}-{method}" / str(n) / "out" for n in (1, 2))
            # A mean of advantages is near 0: what is compared is their rounding.
            wanted = pytest.approx(metrics(one), rel=1e-4, abs=1e-6)
            assert metrics(two) == wanted, (task, method)
            names = ("loss", *CASES[task].metrics)
            for name in names:
                key = f"eval_{name}"
                assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-3), (task, name)


@pytest.mark.parametrize("task", TASKS)
def test_a_bad_row_is_one_line(bases, tmp_path, task):
    words = task_flags(task, CASES[task], bases["glm2"], tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"nothing": 1}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:14: [^\n]*$"):
        run(words)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    run([*words, "--on_bad_row", "skip", "--max_steps", "1"])


@pytest.mark.parametrize("task", TASKS)
def test_memory_is_estimated(bases, tmp_path, task, capsys):
    words = task_flags(task, CASES[task], bases["glm2"], tmp_path, "--estimate_memory")
    assert command_line.main(words) == 0
    assert "fits: " in capsys.readouterr().out
