"""Rows per second of offline answers, in interleaved runs.

    python benchmarks/offline.py [--rows 96] [--batch_size 8] [--answer 40] [--repetitions 5]
        [--hidden 512] [--layers 6] [--error 0.4] [--quick] [--json FILE]

Prompts of data/spo_train.json are sampled from a random model (ChatGLM2's architecture, fp32) by
processes of one thread, as finetune.predict --devices cpu@1,cpu@1 does it. Each row has a seed of
its own, so that all subjects give it about the same answer: the end token comes with a probability
of 1/--answer, and answers are cut at four times that.
    one         one process, batches by prompt length
    two         two processes, the same batches
    predicted   one process, batches by predicted length (--predictor). A prediction is the row's
                length of a run before, times a log-normal error of deviation --error
    both        two processes, batches by predicted length
A ratio is taken within each repetition, whose subjects run one after another; the table shows
medians. A step is one pass of the model; padding is the share of rows x steps that gave no token.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.evaluation.generation import PromptBatch
    from finetune.evaluation.inference import InferenceSetup
    from finetune.evaluation.predict import PredictionFlags
    from finetune.evaluation.replicas import OfflineReplicas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = ROOT / "data" / "spo_train.json"
SUBJECTS = {"one": (1, False), "two": (2, False), "predicted": (1, True), "both": (2, True)}
Run = dict[str, float]  # {"rows_per_s", "tokens_per_s", "steps", "padding"}


def make_folder(flags: argparse.Namespace, folder: Path) -> Path:
    """A random model with a tokenizer of the rows."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    words = ["--input", str(ROWS), "--output_dir", str(folder / "tokenizer")]
    if make_tokenizer([*words, "--vocab_size", "800", "--family", "glm2"]):
        raise ValueError(f"no tokenizer of {ROWS}")
    return make_model(
        "glm2",
        folder / "tokenizer",
        folder / "model",
        hidden_size=flags.hidden,
        num_layers=flags.layers,
        ffn=3 * flags.hidden,
    )


def read_setup(folder: Path) -> tuple["PredictionFlags", "InferenceSetup"]:
    from finetune.evaluation.inference import prepare_inference
    from finetune.evaluation.predict import PredictionFlags, build_parser

    words = ["--model_path", str(folder), "--prompt", "x", "--max_src_len", "128"]
    flags = PredictionFlags(**vars(build_parser().parse_args(words)))
    return flags, prepare_inference(flags)


def batches_of(
    encoded: list[list[int]], predicted: list[float], batch_size: int
) -> list["PromptBatch"]:
    """Batches in the order of the commands, with a seed for each row."""
    from dataclasses import replace

    from finetune.evaluation.generation import longest_first, make_batches

    batches = []
    for batch in make_batches(encoded, longest_first(encoded, predicted), batch_size):
        batches.append(replace(batch, row_seeds=list(batch.numbers)))
    return batches


def run_batches(
    replicas: "OfflineReplicas", batches: list["PromptBatch"]
) -> tuple[Run, dict[int, int]]:
    """(figures, {row: tokens of its answer}) of one run."""
    lengths: dict[int, int] = {}
    steps = places = 0
    start_s = time.perf_counter()
    for batch, answers in replicas.answers(batches):
        most = 0
        for i, (ids, ended) in zip(batch.numbers, answers):
            lengths[i] = len(ids)
            most = max(most, len(ids) + ended)
        steps += most
        places += most * len(answers)
    seconds = time.perf_counter() - start_s
    tokens = sum(lengths.values())
    figures = {
        "rows_per_s": len(lengths) / seconds,
        "tokens_per_s": tokens / seconds,
        "steps": steps,
        "padding": 1 - tokens / places,
    }
    return figures, lengths


def wait_for_all(replicas: "OfflineReplicas", batches: list["PromptBatch"]) -> dict[int, int]:
    """Run batches until every process has answered one; returns the last run's lengths."""
    while True:
        _, lengths = run_batches(replicas, batches)
        if all(replica.figures.rows for replica in replicas.replicas):
            return lengths


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, list[Run]]:
    """{subject: figures of each repetition}."""
    from chatglm.loading import stop_ids
    from finetune.evaluation.generation import AnswerOptions, encode_prompts
    from finetune.evaluation.replicas import OfflineReplicas
    from finetune.placing import ReplicaSpec, StageSpec
    from finetune.rows.sources import RowReader, read_questions

    model = make_folder(flags, folder)
    inference, setup = read_setup(model)
    rows = read_questions(str(ROWS), "--file", RowReader("", "auto", {}))[: flags.rows]
    encoded = []
    for prompt in encode_prompts(setup.tokenizer, [row.prompt for row in rows], 128):
        encoded.append(prompt.input_ids)
    stops = stop_ids(setup.tokenizer)
    bias = math.log(len(setup.tokenizer) / flags.answer / len(stops))
    options = {
        "max_new_tokens": 4 * flags.answer,
        "sequence_bias": [[[stop], bias] for stop in stops],
    }
    settings = AnswerOptions(options, {"temperature": 1.0, "top_p": 1.0})
    spec = ReplicaSpec((StageSpec("cpu", 0, flags.layers, 1),))
    found: dict[str, list[Run]] = {name: [] for name in SUBJECTS}
    with (
        OfflineReplicas([spec], inference, setup, settings) as one,
        OfflineReplicas([spec] * 2, inference, setup, settings) as two,
    ):
        by_prompt = batches_of(encoded, [], flags.batch_size)
        lengths = wait_for_all(one, by_prompt)
        wait_for_all(two, by_prompt)
        draw = random.Random(0)
        predicted = []
        for i in range(len(encoded)):
            predicted.append((1 + lengths[i]) * draw.lognormvariate(0, flags.error))
        by_length = batches_of(encoded, predicted, flags.batch_size)
        for _ in range(flags.repetitions):
            for name, (count, ordered) in SUBJECTS.items():
                batches = by_length if ordered else by_prompt
                found[name].append(run_batches(one if count == 1 else two, batches)[0])
    return found


def print_table(found: dict[str, list[Run]]) -> None:
    print("            rows/s   tokens/s     steps   padding   rows/s of one")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = []
        for run, base in zip(runs, found["one"]):
            ratios.append(run["rows_per_s"] / base["rows_per_s"])
        print(
            f"{name:10} {middle['rows_per_s']:7.2f} {middle['tokens_per_s']:10.1f} "
            f"{middle['steps']:9.0f} {middle['padding']:8.1%} {statistics.median(ratios):14.2f}x"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--answer", type=int, default=40, help="mean tokens of an answer, about")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--error", type=float, default=0.4, help="of predictions, in log tokens")
    parser.add_argument("--quick", action="store_true", help="few rows of a small model, once")
    parser.add_argument("--json", help="write all figures there")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.rows, flags.answer, flags.repetitions = 16, 6, 1
        flags.hidden, flags.layers, flags.batch_size = 64, 2, 4
    with tempfile.TemporaryDirectory() as folder:
        found = measure(flags, Path(folder))
    print_table(found)
    if flags.json:
        Path(flags.json).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
