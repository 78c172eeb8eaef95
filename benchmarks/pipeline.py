"""Tokens per second of a pipeline of two stages, by micro-batches, against one process.

    python benchmarks/pipeline.py --tokenizer DIR [--quick] [--json FILE] [--repetitions 5]
        [--rows 64] [--requests 64] [--hidden 768] [--layers 12]

The model is scripts/prepare_small_model.py's: a ChatGLM2 of random weights, in fp32. All requests
arrive at the start; --rows of them run at once; each has its own number of tokens. Subjects:
    one-1t, one-2t      the continuous engine in one process, of 1 thread and of 2
    pipeline-M          2 processes of 1 thread, a half of the weights each, with M micro-batches
They run one after another within a repetition, and a ratio is taken within a repetition; the table
shows medians. Rates count prompt tokens and answer tokens. pipeline-1 computes one stage at a time;
what the others gain over it is what micro-batches gain. At best two stages have the rate of one-2t.
"""

import argparse
import json
import operator
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from serving.engines.continuous_engine import ContinuousEngine

PROMPTS, ANSWERS = (32, 96), (16, 64)  # tokens: shortest and longest
MICRO_BATCHES = (1, 2, 4)
QUICK = {"hidden": 64, "layers": 2, "rows": 4, "requests": 6, "repetitions": 1}

Subject = Callable[[int], float]  # the rate of the work that a seed gives
Rates = dict[str, list[float]]


def level_cut(folder: Path, layers: int) -> int:
    """How many layers the first stage has, so that the second, with the output layer, is level."""
    from serving.cost_model.model import ModelSizes

    sizes = ModelSizes.from_config(folder)
    output = sizes.output_bytes / sizes.layer_bytes
    return min(range(1, layers), key=lambda cut: max(cut, layers - cut + output))


def open_engines(
    folder: Path, layers: int, rows: int, micro_batches: list[int]
) -> dict[str, tuple["ContinuousEngine", int]]:
    """{subject: its engine, threads of this process}."""
    from finetune.placing import ReplicaSpec, StageSpec
    from serving.engines.pipeline import open_pipeline
    from serving.engines.stage_reports import ModelLoading
    from serving.request import Limits
    from serving.simulate.engine import LinearCost

    longest = PROMPTS[1] + ANSWERS[1] + 1
    limits = Limits(
        max_batch=rows, kv_tokens=rows * longest, max_tokens=longest, prefill_tokens=256
    )
    loading = ModelLoading(str(folder), precision="fp32")
    cut = level_cut(folder, layers)
    print(f"layers 0 to {cut - 1} | {cut} to {layers - 1} and the output layer", file=sys.stderr)
    whole = ReplicaSpec((StageSpec("cpu", 0, layers, 1),))
    halves = ReplicaSpec((StageSpec("cpu", 0, cut, 1), StageSpec("cpu", cut, layers, 1)))
    one = open_pipeline(loading, whole, limits, LinearCost(), stop_ids=[])
    engines = {"one-1t": (one, 1), "one-2t": (one, 2)}
    for count in micro_batches:
        engine = open_pipeline(
            loading, halves, limits, LinearCost(), stop_ids=[], micro_batches=count
        )
        engines[f"pipeline-{count}"] = engine, 1
    return engines


def make_subject(engine: "ContinuousEngine", threads: int, requests: int) -> Subject:
    """A subject that answers random prompts with an engine."""
    import torch

    from serving.engines import Sampling, WallClock
    from serving.policies.continuous import POLICIES
    from serving.request import Request
    from serving.scheduler import Replay, run_scheduler

    def subject(seed: int) -> float:
        draw = random.Random(seed)
        torch.set_num_threads(threads)
        arrivals, total = [], 0
        begin = time.perf_counter()
        for number in range(requests):
            prompt = [draw.randrange(200) for _ in range(draw.randint(*PROMPTS))]
            length = draw.randint(*ANSWERS)
            arrivals.append(Request(number, len(prompt), 0.0, 1e9))
            engine.submit(arrivals[-1], prompt, Sampling(length))
            total += len(prompt) + length
        for _ in run_scheduler(POLICIES["fcfs"], engine, WallClock(), Replay(arrivals)):
            pass
        return total / (time.perf_counter() - begin)

    return subject


def measure(subjects: dict[str, Subject], repetitions: int) -> Rates:
    """Tokens per second of each subject, by repetition; one before does not count."""
    rates: Rates = {name: [] for name in subjects}
    for repetition in range(repetitions + 1):
        for name, subject in subjects.items():
            rate = subject(repetition)
            if repetition:
                rates[name].append(rate)
                line = f"{repetition}/{repetitions} {name:12} {rate:8.1f} tokens/s"
                print(line, file=sys.stderr, flush=True)
    return rates


def median_ratio(rates: Rates, name: str, other: str) -> float:
    return statistics.median(map(operator.truediv, rates[name], rates[other]))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a ChatGLM2 tokenizer")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="sequences at once [64]")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=768, help="width [768]")
    parser.add_argument("--layers", type=int, default=12, help="blocks [12]")
    return parser


def run_subjects(args: argparse.Namespace, folder: Path) -> dict:
    """The figures of all subjects on a model made in a folder."""
    from scripts.prepare_small_model import make_model

    model = make_model(
        "glm2",
        args.tokenizer,
        folder / "model",
        hidden_size=args.hidden,
        num_layers=args.layers,
        ffn=4 * args.hidden,
    )
    micro_batches = [count for count in MICRO_BATCHES if count <= args.rows]
    engines = open_engines(model, args.layers, args.rows, micro_batches)
    try:
        subjects = {}
        for name, (engine, threads) in engines.items():
            subjects[name] = make_subject(engine, threads, args.requests)
        rates = measure(subjects, args.repetitions)
        stages = {}
        for name, (engine, _) in engines.items():
            seconds = [round(report.seconds, 3) for report in engine.stage_reports()]
            stages[name] = seconds
    finally:
        for engine, _ in engines.values():
            engine.close()
    return {"rates": rates, "stage_seconds": stages}


def main(argv: list[str] | None = None) -> dict:
    args = build_parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    with tempfile.TemporaryDirectory() as folder:
        result = run_subjects(args, Path(folder))
    rates: Rates = result["rates"]
    result["ratios"] = {}
    print(f"{'subject':12} {'tokens/s':>9} {'x one-1t':>9} {'x one-2t':>9} {'x pipeline-1':>13}")
    for name in rates:
        ratios = [median_ratio(rates, name, other) for other in ("one-1t", "one-2t", "pipeline-1")]
        result["ratios"][name] = dict(zip(("one-1t", "one-2t", "pipeline-1"), ratios))
        numbers = "{:9.2f} {:9.2f} {:13.2f}".format(*ratios)
        print(f"{name:12} {statistics.median(rates[name]):9.1f} {numbers}")
    gain = result["gain"] = result["ratios"]["pipeline-2"]["pipeline-1"]
    print(f"gain of 2 micro-batches over 1: {gain:.2f}x")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
