"""What the contract tests of train.TASKS share: a toy of each task, and its runs."""

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import train as command_line
from finetune.config import parse_config
from finetune.engine import Loop
from tests.finetune.runs import METHODS, PARTS, STATES, make_rows, metrics, write_rows


@dataclass(frozen=True)
class Case:
    """A toy of a task.

    Attributes:
        rows: makes rows, of (number of rows, seed).
        flags: beside the shared ones.
        metrics: of its evaluation, besides the loss.
        passes: over the same answers, where the answers are sampled.
    """

    rows: Callable[[int, int], list[dict]]
    flags: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    passes: int = 1


def make_texts(count: int, seed: int = 0) -> list[dict]:
    """Texts of unlike lengths: 1 to 9 sentences."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        parts = [draw.choice(PARTS) + draw.choice(STATES) for _ in range(draw.randint(1, 9))]
        rows.append({"text": "。".join(parts) + "。"})
    return rows


def parse(words: list[str]):
    """The configuration of a command line of train.py."""
    configs = {name: entry.config for name, entry in command_line.TASKS.items()}
    return parse_config(list(map(str, words)), configs)


def run(words: list[str]) -> Path:
    """Train in this process as train.py does; the last checkpoint, also where a signal stopped."""
    from finetune.stopping import StoppedBySignal

    config = parse(words)
    try:
        return command_line.TASKS[config.task].train(config)
    except StoppedBySignal as stopped:
        return stopped.folder


def task_flags(task: str, case: Case, base: Path, folder: Path, *more, method="lora") -> list[str]:
    """The flags of a short run of a toy, whose output is folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "train.jsonl", case.rows(13, 0))
    held_out = write_rows(folder / "eval.jsonl", case.rows(5, 1))
    words = ["--task", task, "--model_name_or_path", base, "--train_path", rows]
    words += ["--eval_path", held_out, "--output_dir", folder / "out", "--max_len", 96]
    words += ["--per_device_train_batch_size", 4, "--learning_rate", "1e-2", "--warmup_ratio", 0]
    words += [] if "--streaming" in more else ["--data_cache="]
    words += ["--show_loss_step", 1000, *METHODS[method], *case.flags, *more]
    return list(map(str, words))


def stop_in_step(patch, step: int) -> None:
    """Send this process a SIGTERM while it computes `step`."""
    made = Loop.make_batches

    def counting(self, number):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(self, number)

    patch.setattr(Loop, "make_batches", counting)


def last_metrics(folder: Path) -> dict[str, float]:
    """The metrics of a checkpoint's evaluation."""
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def learns(out: Path, case: Case) -> bool:
    """Whether the loss of a run of three epochs fell from the first to the last, on average; of
    sampled answers from the first pass over them to the last: those of another rollout are others.
    """
    losses = metrics(out)
    if case.passes == 1:
        epoch = max(1, len(losses) // 3)  # the steps of one: the same rows
        return fmean(losses[-epoch:]) < fmean(losses[:epoch])
    assert min(metrics(out, "rollout_seconds")) > 0
    return fmean(losses[case.passes - 1 :: case.passes]) < fmean(losses[:: case.passes])


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """A part's state: the better answer names it, the worse one another."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        part = draw.choice(PARTS)
        state, other = draw.sample(STATES, 2)
        rows.append(
            {
                "prompt": f"{part}{state}，它怎么了？",
                "chosen": f"{part}_性能故障_{state}" * draw.randint(1, 2),
                "rejected": f"{part}_性能故障_{other}",
            }
        )  # fmt: skip - a row as a file has it
    return rows


def make_prompts(count: int, seed: int = 0) -> list[dict]:
    """Questions, without answers in every second row."""
    rows: list[dict] = []
    for number, row in enumerate(make_pairs(count, seed)):
        answer = {"response": row["chosen"]} if number % 2 else {}
        rows.append({"prompt": row["prompt"]} | answer)
    return rows


# Answers of a few tokens, the more rewarded the more they are Chinese.
ROLLOUT_FLAGS = ("--rewards", "pattern_share", "--reward_pattern", "[一-龥]")
ROLLOUT_FLAGS += ("--max_new_tokens", "6", "--num_generations", "4", "--rollout_epochs", "2")
ROLLOUT_METRICS = ("reward", "kl", "answer_tokens")
PAIR_METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
CASES = {
    "finetune": Case(make_rows),
    "pretrain": Case(make_texts, metrics=("perplexity", "bits_per_byte")),
    "reward": Case(make_pairs, metrics=("accuracy", "margin")),
    "dpo": Case(make_pairs, metrics=PAIR_METRICS),
    "grpo": Case(make_prompts, ROLLOUT_FLAGS, ROLLOUT_METRICS, passes=2),
    "ppo": Case(make_prompts, ROLLOUT_FLAGS, ROLLOUT_METRICS, passes=2),
}
