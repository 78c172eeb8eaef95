"""CLUE by python -m finetune.benchmark and by lm-evaluation-harness's hf model, task by task.

    python scripts/prepare_clue.py --input DOWNLOADED --output clue
    python benchmarks/clue_speed.py --data clue

Each task is scored by both, one after the other, on the same rows and one thread; the seconds are
the CPU's, of the model's part (texts to scores). Exit code 1 where metrics differ, or likelihoods
by more than TOLERANCE. Without --model, one of random weights is made, whose vocabulary is trained
on the rows. To have one that has learned something, train it on the examples
(prepare_clue.py --training_rows; docs/results.md has the commands).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from operator import ne
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.client_env import environment_python  # noqa: E402
from benchmarks.clue_harness import MARK  # noqa: E402
from chatglm.commands import Parser, run_command  # noqa: E402
from chatglm.remote_code import holds_chatglm  # noqa: E402
from finetune.benchmark.command import (  # noqa: E402
    BenchmarkFlags,
    TaskRun,
    load_scorer,
    questions_of,
)
from finetune.benchmark.results import TaskResult, summarise  # noqa: E402
from finetune.benchmark.tasks import CLUE, TaskIndex  # noqa: E402
from finetune.config import parse_positive  # noqa: E402
from finetune.files import write_json  # noqa: E402
from finetune.record import print_columns  # noqa: E402

TOLERANCE = 1e-3  # of a log-likelihood, in fp32
HEADS = ["task", "shots", "rows", "choices", "score", "harness", "here", "chance"]
HEADS += ["harness s", "here s", "times", "largest difference"]


class Harness:
    """lm-evaluation-harness in a process of its own environment, its model loaded once.

    Args:
        data: folder in which the tasks find their rows.
    """

    def __init__(self, model: Path, data: Path, **settings: Any):
        settings = {
            "model": str(model.resolve()),
            "batch_size": 16,
            "max_length": None,
            "include_path": [str(CLUE)],
            "chatglm": False,
        } | settings
        command = [environment_python("lm_eval"), ROOT / "benchmarks/clue_harness.py"]
        command.append(json.dumps(settings))
        self.cache = tempfile.TemporaryDirectory()
        self.log = tempfile.TemporaryFile("w+")
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": self.cache.name,
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=data,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.read()

    def read(self) -> Any:
        """The next answer; raises ValueError with the process's last lines where it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.process.wait()
        self.log.seek(0)
        raise ValueError(f"the harness ended: {self.log.read()[-1500:]}")

    def score(self, task: str, shots: int, limit: int | None) -> dict[str, Any]:
        """What clue_harness.py answers for a task."""
        assert self.process.stdin is not None
        asked = {"task": task, "shots": shots, "limit": limit}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = self.read()
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()
        self.cache.cleanup()


@dataclass(frozen=True)
class Compared:
    """A task by both."""

    result: TaskResult
    theirs: dict[str, Any]
    ours_seconds: float
    choices: float

    @property
    def difference(self) -> float:
        """The largest of all likelihoods; the share of written answers that differ."""
        if self.result.answers:
            pairs = list(zip(self.result.answers, self.theirs["answers"], strict=True))
            return sum(starmap(ne, pairs)) / len(pairs)
        largest = 0.0
        for mine, other in zip(self.result.likelihoods, self.theirs["likelihoods"], strict=True):
            for a, b in zip(mine, other, strict=True):
                largest = max(largest, abs(a - b))
        return largest

    @property
    def agrees(self) -> bool:
        metrics = self.result.metrics
        equal = all(abs(self.theirs["metrics"][n] - value) < 1e-9 for n, value in metrics.items())
        return equal and self.difference <= (0 if self.result.answers else TOLERANCE)


def score_here(run: TaskRun, scorer: Any) -> tuple[TaskResult, float]:
    """The result of finetune.benchmark, and the CPU seconds of its model's part."""
    task, likelihoods, answers = run.task, [], []
    begun = time.process_time()
    if task.output_type == "multiple_choice":
        likelihoods = scorer.scores(run.questions, lambda count: None)
    else:
        answers = scorer.answers(run.questions, task.until, task.max_gen_toks, lambda count: None)
    seconds = time.process_time() - begun
    result = summarise(
        task, run.shots, run.questions, likelihoods=likelihoods, answers=answers, seconds=seconds
    )
    return result, seconds


def compare(run: TaskRun, scorer: Any, harness: Harness, limit: int | None) -> Compared:
    result, seconds = score_here(run, scorer)
    theirs = harness.score(run.task.name, run.shots, limit)
    choices = 1 / (result.chance or 1)  # a row has one right choice
    return Compared(result, theirs, seconds, choices)


def table_line(compared: Compared) -> list[str]:
    result, theirs = compared.result, compared.theirs["seconds"]
    words = "written" if result.answers else f"{compared.choices:.0f}"
    where = [result.task, str(result.shots), str(result.rows), words]
    score = "f1" if result.answers else "acc"
    scores = [f"{compared.theirs['metrics'][score]:.3f}", f"{result.metrics[score]:.3f}"]
    chance = "" if result.chance is None else f"{result.chance:.3f}"
    times = theirs / compared.ours_seconds
    seconds = [f"{theirs:.2f}", f"{compared.ours_seconds:.2f}", f"{times:.1f}"]
    return [*where, score, *scores, chance, *seconds, f"{compared.difference:.1e}"]


def rows_text(data: Path) -> Iterator[str]:
    for file in sorted(data.rglob("*.jsonl")):
        yield from file.read_text(encoding="utf-8").splitlines()


def make_model(folder: Path, data: Path, vocabulary: int, hidden: int, layers: int) -> Path:
    """A Llama of random weights, with byte pairs trained on the rows of the data folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows_text(data), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # choices differ by much more than rounding does
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@contextmanager
def chosen_model(flags: argparse.Namespace) -> Iterator[Path]:
    """--model, or a made one in a folder that is removed afterwards."""
    if flags.model:
        yield Path(flags.model)
        return
    with tempfile.TemporaryDirectory() as place:
        sizes = (flags.vocabulary, flags.hidden, flags.layers)
        yield make_model(Path(place) / "model", Path(flags.data), *sizes)


def measure(flags: argparse.Namespace) -> int:
    """Print the table; 1 where the two differ."""
    import torch

    torch.set_num_threads(1)
    index = TaskIndex.of_folders([CLUE])
    names = index.expand(flags.tasks.split(","))
    data = Path(flags.data)
    with chosen_model(flags) as model:
        benchmark_flags = BenchmarkFlags(
            model_path=str(model),
            base_model=None,
            mode=None,
            device="cpu",
            precision="fp32",
            tasks=flags.tasks,
            include_path="",
            data=flags.data,
            shots=(flags.shots,),
            limit=flags.rows,
            batch_tokens=flags.batch_tokens,
            max_length=flags.max_length,
            output=None,
            submission=None,
        )
        scorer = load_scorer(benchmark_flags)
        harness = Harness(
            model,
            data,
            batch_size=flags.batch_size,
            max_length=scorer.max_length,
            chatglm=holds_chatglm(str(model)),
        )
        every = []
        for name in names:
            run = questions_of(index.load(name), flags.shots, benchmark_flags)
            every.append(compare(run, scorer, harness, flags.rows))
            print("  ".join(table_line(every[-1])), file=sys.stderr, flush=True)
        harness.close()
    lines = list(map(table_line, every))
    print_columns(HEADS, lines)
    theirs = ours = 0.0
    for compared in every:
        theirs += compared.theirs["seconds"]
        ours += compared.ours_seconds
    print(f"together: {theirs:.1f} s by the harness, {ours:.1f} s here, {theirs / ours:.1f} times")
    differing = [compared.result.task for compared in every if not compared.agrees]
    print(f"metrics or likelihoods differ: {', '.join(differing) or 'nowhere'}")
    if flags.json:
        write_json(flags.json, [HEADS, *lines])
    return int(bool(differing))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="clue_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of scripts/prepare_clue.py")
    parser.add_argument("--model", help="a folder that transformers loads [one is made]")
    parser.add_argument("--tasks", default="clue", help="tasks and groups [clue]")
    parser.add_argument("--shots", type=int, default=0, help="examples before a row [0]")
    parser.add_argument("--rows", type=parse_positive, default=100, help="of each task [100]")
    parser.add_argument("--max_length", type=parse_positive, help="longest input in tokens")
    parser.add_argument("--batch_size", type=parse_positive, default=16, help="the harness's [16]")
    parser.add_argument(
        "--batch_tokens", type=parse_positive, default=4096, help="finetune.benchmark's [4096]"
    )
    parser.add_argument("--vocabulary", type=parse_positive, default=3000, help="made model's")
    parser.add_argument("--hidden", type=parse_positive, default=64, help="made model's [64]")
    parser.add_argument("--layers", type=parse_positive, default=2, help="made model's [2]")
    parser.add_argument("--json", help="file of the table")
    flags = parser.parse_args(argv)
    return run_command(parser.prog, lambda: measure(flags))


if __name__ == "__main__":
    sys.exit(main())
