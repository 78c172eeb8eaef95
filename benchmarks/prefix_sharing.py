"""What a common system prompt costs with and without prefix sharing, in interleaved runs.

    python benchmarks/prefix_sharing.py [--rows 16] [--system 512] [--question 32] [--answer 32]
        [--repetitions 5] [--threads 1] [--prefill 512] [--quick] [--json FILE]

All rows arrive at once: one system prompt and a question of their own, in random tokens. The model
is that of benchmarks/serving_engine.py (6 layers of 512, random weights, bf16), under `fcfs`.
    off     every prompt is computed (--prefix_cache_tokens 0)
    on      the first row computes the system prompt, the others copy it
    kept    the same system prompt, asked again with other questions after all rows have left
Each repetition has a new system prompt and runs the subjects one after another; the table shows
medians. TTFT is the mean over the rows from arrival to the first token.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.engines import TextEngine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SUBJECTS = ("off", "on", "kept")
Figures = dict[str, list[float]]  # {"ttft_s", "tokens_per_s", "copied_tokens": one a repetition}


def run_rows(engine: "TextEngine", prompts: list[list[int]], answer: int) -> tuple[float, float]:
    """(mean seconds to the first token, answer tokens a second) of prompts that arrive at once."""
    from serving.engines import Sampling, WallClock
    from serving.policies.continuous import POLICIES
    from serving.request import Request
    from serving.scheduler import Replay, run_scheduler

    requests, firsts = [], {}
    begin = time.perf_counter()

    def listen(ended, token):
        firsts.setdefault(ended.id, time.perf_counter() - begin)

    for number, prompt in enumerate(prompts):
        requests.append(Request(number, len(prompt), 0.0, 1e9))
        sampling = Sampling(answer, ignore_stops=True)
        engine.submit(requests[-1], prompt, sampling, listen)
    for _ in run_scheduler(POLICIES["fcfs"], engine, WallClock(), Replay(requests)):
        pass
    seconds = time.perf_counter() - begin
    return statistics.mean(firsts.values()), len(prompts) * answer / seconds


def measure(flags: argparse.Namespace) -> dict[str, Figures]:
    """{subject: figures} of all repetitions."""
    import torch

    from benchmarks.serving_engine import VOCABULARY, make_model
    from serving.engines import make_engine
    from serving.request import Limits
    from serving.simulate.engine import LinearCost

    torch.set_num_threads(flags.threads)
    model = make_model()
    prompt_tokens = flags.system + flags.question
    tokens = prompt_tokens + flags.answer
    limits = Limits(
        max_batch=flags.rows,
        kv_tokens=flags.rows * (tokens + 1),
        max_tokens=tokens + 1,
        prefill_tokens=flags.prefill,
    )
    engines = {}
    for name, kept in (("off", 0), ("on", prompt_tokens + flags.answer)):
        engines[name] = make_engine(
            "continuous", model, limits, LinearCost(), [], prefix_cache_tokens=kept
        )
    figures: dict[str, Figures] = {}
    for name in SUBJECTS:
        figures[name] = {"ttft_s": [], "tokens_per_s": [], "copied_tokens": []}
    rng = random.Random(0)
    for repetition in range(-1, flags.repetitions):  # the first one warms up
        system = [rng.randrange(VOCABULARY) for _ in range(flags.system)]
        for name in SUBJECTS:
            prompts = []
            for _ in range(flags.rows):
                question = [rng.randrange(VOCABULARY) for _ in range(flags.question)]
                prompts.append(system + question)
            engine = engines["off" if name == "off" else "on"]
            prefixes = getattr(engine, "prefixes", None)
            before = prefixes.copied_tokens if prefixes else 0
            ttft_s, rate = run_rows(engine, prompts, flags.answer)
            if repetition >= 0:
                figures[name]["ttft_s"].append(ttft_s)
                figures[name]["tokens_per_s"].append(rate)
                copied = prefixes.copied_tokens - before if prefixes else 0
                figures[name]["copied_tokens"].append(copied)
    return figures


def print_table(figures: dict[str, Figures]) -> None:
    print("          TTFT s   answer tokens/s   prompt tokens copied   TTFT vs off")
    for name, of in figures.items():
        ratios = []
        for mine, off in zip(of["ttft_s"], figures["off"]["ttft_s"]):
            ratios.append(mine / off)
        ttft, rate, copied = (statistics.median(of[key]) for key in of)
        ratio = statistics.median(ratios)
        print(f"{name:8} {ttft:7.3f} {rate:17.1f} {copied:22.0f} {ratio:13.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--system", type=int, default=512, help="tokens of the system prompt")
    parser.add_argument("--question", type=int, default=32, help="tokens of each question")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens in one pass")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few small rows, once")
    parser.add_argument("--json", help="write all figures there")
    flags = parser.parse_args(argv)
    if flags.quick:
        flags.rows, flags.system, flags.question, flags.answer = 4, 64, 8, 4
        flags.repetitions = 1
    figures = measure(flags)
    print_table(figures)
    if flags.json:
        Path(flags.json).write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
