# ruff: noqa: E402
"""How fast the answers of a rollout are written: transformers' generate in batches, the continuous
engine in order of arrival, and by guessed length.

    python benchmarks/rollouts.py --json rollouts.json

A random Qwen2; prompts whose answers have lengths of a long tail: a prompt's median is drawn from a
lognormal distribution, each of its answers deviates from it. No end token is known to the models;
every answer is truncated at its drawn length, so all ways write the same tokens. generate computes
a batch until its longest answer has ended. The ways take turns within a repetition; figures are
medians, in CPU seconds of the process on one thread, which a shared machine does not stretch.
"first" knows nothing of a prompt but what its siblings show, "later" has seen one rollout. Passes
are forward passes: what a rollout costs where a pass takes as long with few rows as with many, as
on a GPU that waits for its memory. On a CPU a pass with fewer rows is cheaper.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from finetune.config import parse_positive
from finetune.reinforcement.rollout import RolloutRequest, RolloutSampling
from serving.rollouts.continuous import ContinuousRollouts, RolloutArrivals

TYPICAL = 24  # tokens: the median over prompts
PROMPT_SPREAD, SIBLING_SPREAD = 1.0, 0.25  # deviations of the logarithm


def make_requests(
    prompts: int, siblings: int, longest: int, vocabulary: int, seed: int
) -> list[RolloutRequest]:
    """Answers to random prompts of 8 to 40 tokens, siblings side by side."""
    draw = np.random.default_rng(seed)
    requests = []
    for number in range(prompts):
        ids = draw.integers(0, vocabulary, draw.integers(8, 41)).tolist()
        typical = TYPICAL * draw.lognormal(0, PROMPT_SPREAD)
        for sample in range(siblings):
            tokens = round(typical * draw.lognormal(0, SIBLING_SPREAD))
            tokens = min(max(tokens, 1), longest)
            sampling_seed = seed * 1_000_000 + number * 1000 + sample
            requests.append(RolloutRequest(ids, "", str(number), sampling_seed, tokens))
    return requests


def make_model(hidden: int, layers: int, vocabulary: int) -> Any:
    """A random Qwen2 in fp32 that knows no end token."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(hidden // 64, 1),
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


class Written(NamedTuple):
    """What a way wrote: tokens of answers, in so many forward passes."""

    tokens: int
    passes: int


def generate_in_batches(model: Any, requests: Sequence[RolloutRequest], size: int) -> Written:
    """transformers' generate over batches in order of arrival."""
    import torch

    written = passes = 0
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        longest = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=max(request.max_new_tokens for request in batch),
                pad_token_id=0,
            )
        written += sum(request.max_new_tokens for request in batch)
        passes += max(request.max_new_tokens for request in batch)
    return Written(written, passes)


def engine_way(
    model: Any, requests: Sequence[RolloutRequest], size: int, ordered: bool, learnt: bool
) -> Callable[[], Written]:
    """A run of the engine; `learnt`: after a rollout of the same prompts."""
    rollouts = ContinuousRollouts([], size, ordered=ordered)
    if learnt:
        lengths: dict[str, list[int]] = {}
        for request in requests:
            lengths.setdefault(request.group, []).append(request.max_new_tokens)
        rollouts.learn(lengths)

    def run() -> Written:
        arrivals = RolloutArrivals(rollouts, model, requests, RolloutSampling())
        arrivals.run()
        tokens = 0
        for number in range(len(requests)):
            tokens += len(arrivals.result(number).tokens)
        return Written(tokens, arrivals.engine.runner.stage.passes)

    return run


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{way: {seconds, tokens_per_second}}, medians over the repetitions."""
    model = make_model(args.hidden, args.layers, args.vocabulary)
    seconds: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    passes: dict[str, list[int]] = {}
    for repetition in range(args.repetitions):
        requests = make_requests(
            args.prompts, args.siblings, args.longest, args.vocabulary, repetition
        )
        batch = args.max_batch
        ways: dict[str, Callable[[], Written]] = {
            "transformers' generate": lambda given=requests: generate_in_batches(
                model, given, args.max_batch
            ),
            "engine, order of arrival": engine_way(model, requests, batch, False, False),
            "engine, guessed lengths, first": engine_way(model, requests, batch, True, False),
            "engine, guessed lengths, later": engine_way(model, requests, batch, True, True),
        }
        if repetition == 0:
            generate_in_batches(model, requests[:2], 2)
        wanted = sum(request.max_new_tokens for request in requests)
        for name, way in ways.items():
            started = time.process_time()
            written = way()
            took = time.process_time() - started
            if written.tokens != wanted:
                raise RuntimeError(f"{name} wrote {written.tokens} tokens of {wanted}")
            seconds.setdefault(name, []).append(took)
            speeds.setdefault(name, []).append(written.tokens / took)
            passes.setdefault(name, []).append(written.passes)
    return {
        name: {
            "seconds": median(seconds[name]),
            "tokens_per_second": median(speeds[name]),
            "passes": median(passes[name]),
        }
        for name in seconds
    }


def print_table(found: dict[str, dict[str, float]]) -> None:
    """Each way beside generate and beside the order of arrival."""
    generate, arrival = list(found.values())[:2]
    print("| way | CPU s | tokens/s | faster than generate | than arrival order | passes |")
    print("|---|---|---|---|---|---|")
    for name, values in found.items():
        took = values["seconds"]
        print(
            f"| {name} | {took:.1f} | {values['tokens_per_second']:.0f} | "
            f"{generate['seconds'] / took:.2f} x | {arrival['seconds'] / took:.2f} x | "
            f"{values['passes']:.0f} |"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, meaning in (
        ("prompts", 48, "prompts of a rollout"),
        ("siblings", 8, "answers to each prompt"),
        ("longest", 512, "tokens of an answer at most"),
        ("max_batch", 64, "answers that are written at once"),
        ("hidden", 128, "width of the model"),
        ("layers", 4, "of the model"),
        ("vocabulary", 2000, "of the model"),
        ("repetitions", 3, "of all ways, with other prompts"),
    ):
        parser.add_argument(
            f"--{name}", type=parse_positive, default=default, help=f"{meaning} [{default}]"
        )
    parser.add_argument("--json", type=Path, help="the figures")
    args = parser.parse_args(argv)
    found = measure(args)
    print_table(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
