"""What re-reading running answers costs: CPU time of decode steps with and without, in pairs.

    python benchmarks/reread_cost.py [--model DIR [--precision bf16]] [--rereader DIR] [--rows 16]
        [--prompt 64] [--layer N] [--every 64] [--pairs 20] [--threads 1] [--quick] [--json FILE]

Two continuous engines on one model decode the same rows, greedily (sampling would only add to the
step). A pair is `every` steps of the one and as many of the other, in turns first; each interval
holds one reading of every row: hook, running sums, copies to the host, and the predictions, which
come in one batch. The figure is the CPU time (of all threads) that the second took more, as a share
of the first's, with the mean's 95 % interval over the pairs (Student's t); beside it, which other
load on the machine blurs less, the CPU time within the calls that re-reading adds.

Without --model: that of benchmarks/serving_engine.py (6 layers of 512, random weights, bf16).
Without --rereader: a random one that reads the last and the mean state of one layer, as large as
those that train.py makes (64 hidden units, 24 bins).
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from predictor.prediction import LengthPrediction
    from serving.engines import TextEngine
    from serving.engines.rereads import StateRereader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

UNITS, BINS = 64, 24
WARM_STEPS = 8


class RandomRereader:
    """A network of random weights over the states of one layer; as StateRereader."""

    def __init__(self, layer: int, every: int, hidden_size: int) -> None:
        draw = np.random.default_rng(0)
        self.layers = (layer,)
        self.every, self.hidden_size = every, hidden_size
        self.weighs_entropy = False
        self.first = draw.normal(0, 0.05, (2 * hidden_size, UNITS)).astype(np.float32)
        self.out = draw.normal(0, 0.1, (UNITS, BINS)).astype(np.float32)
        self.edges = np.unique(np.round(np.geomspace(1, 2048, BINS + 1)))

    def read(
        self,
        at: np.ndarray,
        last: np.ndarray,
        mean: np.ndarray,
        priors: "Sequence[LengthPrediction | None]",
    ) -> "list[LengthPrediction]":
        """As StateRereader.read."""
        from predictor.prediction import from_bins

        states = np.concatenate([last[:, 0], mean[:, 0]], axis=1)
        logits = np.maximum(states @ self.first, 0) @ self.out
        weights = np.exp(logits - logits.max(1, keepdims=True))[:, : len(self.edges) - 1]
        found = []
        for place, row in zip(at.tolist(), weights.astype(float)):
            edges = np.concatenate([[0.0], self.edges + place])
            found.append(from_bins(np.concatenate([[0.0], row / row.sum()]), edges))
        return found


def open_model(flags: argparse.Namespace) -> Any:
    """The model of --model, or that of benchmarks/serving_engine.py."""
    from benchmarks.serving_engine import make_model
    from finetune.evaluation.inference import load_ready

    if flags.model is None:
        return make_model()
    return load_ready(flags.model, device="cpu", precision=flags.precision)


def open_rereader(flags: argparse.Namespace, model: Any) -> "StateRereader":
    """That of --rereader, or a random one for the layer at three quarters of the depth."""
    if flags.rereader is not None:
        from serving.replicas.served_model import load_rereader

        return load_rereader(flags.rereader)
    from serving.engines.bodies import decoder_layers, hidden_size_of

    layer = flags.layer or max(3 * len(decoder_layers(model)) // 4, 1)
    return RandomRereader(layer, flags.every, hidden_size_of(model))


def open_engines(flags: argparse.Namespace) -> "tuple[TextEngine, TextEngine, int]":
    """(engine without, engine with, steps of an interval), with all rows admitted and prefilled."""
    import torch

    from serving.engines import Sampling, make_engine
    from serving.engines.answers import vocabulary_of
    from serving.request import Limits, Plan, Record, Request
    from serving.simulate.engine import LinearCost

    torch.set_num_threads(flags.threads)
    model = open_model(flags)
    rereader = open_rereader(flags, model)
    steps = WARM_STEPS + flags.pairs * rereader.every
    longest = flags.prompt + steps + 2
    limits = Limits(flags.rows, flags.rows * longest, longest)
    engines = []
    for options in ({}, {"rereader": rereader}):
        engine = make_engine("continuous", model, limits, LinearCost(), [], **options)
        draw = random.Random(0)
        records, reserve = [], {}
        for number in range(flags.rows):
            prompt = [draw.randrange(vocabulary_of(model)) for _ in range(flags.prompt)]
            request = Request(number, flags.prompt, 0.0, 1e9)
            engine.submit(request, prompt, Sampling(ignore_stops=True))
            records.append(Record(request))
            reserve[number] = longest
        engine.step(Plan(tuple(records), (), reserve, horizon_steps=WARM_STEPS))
        engines.append(engine)
    return engines[0], engines[1], rereader.every


def cpu_seconds(engine: "TextEngine", steps: int) -> float:
    """CPU time of all threads over some decode steps."""
    from serving.request import Plan

    begin = time.process_time()
    engine.step(Plan(horizon_steps=steps))
    return time.process_time() - begin


class TimedCalls:
    """CPU seconds within some of an object's methods, which are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Count the time of a method from now on."""
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            begin = time.process_time()
            result = method(*arguments)
            self.seconds += time.process_time() - begin
            return result

        setattr(owner, name, timed)


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The figures of all pairs."""
    from serving.simulate.statistics import interval

    plain, tapped, steps = open_engines(flags)
    rereads: Any = getattr(tapped, "rereads", None)
    own = TimedCalls()
    for owner, name in ((rereads.tap, "see"), (rereads.tap, "add"), (rereads, "read")):
        own.watch(owner, name)
    without, shares = [], []
    for pair in range(flags.pairs):
        order = (plain, tapped) if pair % 2 else (tapped, plain)
        seconds = {}
        for engine in order:
            seconds[engine] = cpu_seconds(engine, steps)
        without.append(seconds[plain] / steps)
        shares.append(100 * (seconds[tapped] / seconds[plain] - 1))
    share, half = interval(shares)
    return {
        "step_ms": 1e3 * float(np.mean(without)),
        "share_percent": share,
        "half_width": half,
        "median_percent": float(np.median(shares)),
        "own_ms": 1e3 * own.seconds / (flags.pairs * steps),
        "readings": rereads.count,
        "rereader_ms": 1e3 * rereads.seconds / max(rereads.count, 1),
        "pairs": shares,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder, on the CPU")
    parser.add_argument("--precision", default="bf16", help="of --model [bf16]")
    parser.add_argument("--rereader", help="folder of a predictor of hidden states")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--layer", type=int, help="that a random rereader reads, from 1")
    parser.add_argument("--every", type=int, default=64, help="of a random rereader")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rows, few pairs")
    parser.add_argument("--json", help="write all figures there")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.rows, flags.prompt, flags.every, flags.pairs = 4, 8, 4, 3
    found = measure(flags)
    print(
        f"{flags.rows} rows, {found['step_ms']:.1f} ms CPU a step without; re-reading adds "
        f"{found['share_percent']:.2f} % +- {found['half_width']:.2f} (median of the pairs "
        f"{found['median_percent']:.2f}); within its own calls {found['own_ms']:.3f} ms a step, "
        f"{100 * found['own_ms'] / found['step_ms']:.2f} %; {found['readings']} readings, "
        f"{found['rereader_ms']:.2f} ms each in the rereader"
    )
    if flags.json:
        Path(flags.json).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
