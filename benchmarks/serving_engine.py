"""Tokens per second of the engines, in interleaved runs: static, continuous, transformers' own.

    python benchmarks/serving_engine.py [--peer] [--layout] [--quick] [--json FILE]
        [--repetitions 5] [--threads 1] [--static 8] [--rows 16]

The model has 6 layers of 512, ChatGLM2's proportions and its vocabulary, random weights in bf16.
Such a model never stops, so each request has its own number of tokens: log-normal, median 100, at
most 512; all arrive at the start. Useful tokens are those requested; what a static batch computes
after a row has ended is not useful.
    static           transformers' generate, batches of --static in order of arrival
                     (serving.engines.static_engine under `fifo`)
    continuous       --rows sequences at once (serving.engines.continuous_engine under `fcfs`)
With --layout also
    laid-out         `continuous` on weights as serving.server lays them out on a CPU
                     (serving.engines.onednn_weights)
With --peer also, on one GlmForCausalLM of the same size:
    peer             transformers' continuous batching (paged cache, sdpa): as many sequences at
                     once, KV and prompt tokens as `continuous` has
    continuous-glm   the continuous engine
A ratio is taken within each repetition, whose subjects run one after another; the table shows
medians. On a shared machine the ratio by CPU seconds (of all threads; --threads 1) says more than
the one by wall-clock time.
"""

import argparse
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serving.request import Limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LAYERS, HIDDEN, VOCABULARY, FFN = 6, 512, 65024, 1712
CAP = 512  # tokens of an answer
LONGEST_PROMPT = 96  # tokens
PREFILL = 256  # prompt tokens in one pass

Work = list[tuple[list[int], int]]  # (prompt ids, answer tokens) of each request
Subject = Callable[[Work], tuple[float, float]]  # the seconds and CPU seconds of a work
Rates = dict[str, list[float]]  # {subject: tokens per second of each repetition}


def workload(count: int, cap: int, seed: int) -> Work:
    """Random requests: prompts of 16 to LONGEST_PROMPT ids, log-normal answer lengths."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = np.clip(np.round(rng.lognormal(np.log(100), 1.0, count)), 1, cap).astype(int).tolist()
    work: Work = []
    for length in lengths:
        prompt = rng.integers(0, VOCABULARY, rng.integers(16, LONGEST_PROMPT + 1)).tolist()
        work.append((prompt, length))
    return work


def make_model() -> "PreTrainedModel":
    """A random ChatGLM2 of LAYERS x HIDDEN."""
    import torch
    from transformers import AutoModelForCausalLM

    from chatglm.configuration import ChatGLM2Config

    config = ChatGLM2Config(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        kv_channels=64,
        multi_query_group_num=2,
        ffn_hidden_size=FFN,
        padded_vocab_size=VOCABULARY,
        glm_family="glm2",
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()


def make_glm() -> "PreTrainedModel":
    """GlmForCausalLM with the parameters of make_model's, in other names."""
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        attention_bias=True,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    return GlmForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()


class Clock:
    """Wall-clock seconds, and CPU seconds of all threads, from construction to stop()."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]


def ours(name: str, policy: str, model: "PreTrainedModel", limits: "Limits") -> Subject:
    """A subject that runs an engine under a policy, by the scheduler with a wall clock."""
    from serving.engines import Sampling, WallClock, make_engine
    from serving.policies.continuous import POLICIES
    from serving.request import Request
    from serving.scheduler import Replay, run_scheduler
    from serving.simulate.engine import LinearCost

    engine = make_engine(name, model, limits, LinearCost(), [])

    def subject(work: Work) -> tuple[float, float]:
        clock = Clock()
        requests, answers = [], []
        for number, (prompt, length) in enumerate(work):
            requests.append(Request(number, len(prompt), 0.0, 1e9))
            answers.append(engine.submit(requests[-1], prompt, Sampling(length)))
        for _ in run_scheduler(POLICIES[policy], engine, WallClock(), Replay(requests)):
            pass
        seconds = clock.stop()
        for answer, (_, length) in zip(answers, work):
            assert len(answer.tokens) == length
        return seconds

    return subject


def peer(model: "PreTrainedModel", rows: int, kv_tokens: int) -> Subject:
    """transformers' continuous batching; its cache is built once, its thread once a turn."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = 32
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=kv_tokens // page,
        max_batch_tokens=PREFILL + rows,
        max_requests_per_batch=rows,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    nothing_stops = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=CAP
    )
    manager = model.init_continuous_batching(
        generation_config=nothing_stops, continuous_batching_config=settings
    )

    def subject(work: Work) -> tuple[float, float]:
        manager.start()
        try:
            clock = Clock()
            wanted = {}
            for prompt, length in work:
                wanted[manager.add_request(prompt, max_new_tokens=length)] = length
            generated = {}
            while len(generated) < len(work):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has died")
                if result is not None and result.is_finished():
                    generated[result.request_id] = len(result.generated_tokens)
            seconds = clock.stop()
        finally:
            manager.stop(keep_for_next_session=True)
        assert generated == wanted
        return seconds

    return subject


def measure(
    subjects: dict[str, Subject], count: int, cap: int, repetitions: int, rows: int, seed: int
) -> tuple[Rates, Rates]:
    """Useful tokens per second of each subject, by repetition.

    Also per CPU second of this process, all threads together. The warm-up has `rows` requests.
    """
    rates: Rates = {name: [] for name in subjects}
    cpu_rates: Rates = {name: [] for name in subjects}
    # Warm-up: compiles shapes, allocates memory.
    for subject in subjects.values():
        subject(workload(rows, min(cap, 96), 1))
    for repetition in range(repetitions):
        work = workload(count, cap, seed + 2 + repetition)
        tokens = sum(length for _, length in work)
        for name, subject in subjects.items():
            seconds, cpu_seconds = subject(work)
            rates[name].append(tokens / seconds)
            cpu_rates[name].append(tokens / cpu_seconds)
            figures = f"{rates[name][-1]:8.1f} tokens/s {cpu_rates[name][-1]:8.1f} tokens/CPU s"
            line = f"{repetition + 1}/{repetitions} {name:14} {figures}"
            print(line, file=sys.stderr, flush=True)
    return rates, cpu_rates


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="8 requests of at most 24 tokens, once"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--static", type=int, default=8, help="rows of a static batch [8]")
    parser.add_argument(
        "--rows", type=int, default=16, help="sequences of the continuous engine [16]"
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="transformers' continuous batching too, and ours on the same GlmForCausalLM",
    )
    parser.add_argument(
        "--layout",
        action="store_true",
        help="the continuous engine on weights as a server lays them out on a CPU, too",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def ratios_of(rates: Rates, against: list[str]) -> dict[str, dict[str, float]]:
    """{subject: {"x_other": median over the repetitions of its rate over the other's}}."""
    ratios: dict[str, dict[str, float]] = {}
    for name, mine in rates.items():
        ratios[name] = {}
        for other in against:
            quotients = map(operator.truediv, mine, rates[other])
            ratios[name][f"x_{other}"] = statistics.median(quotients)
    return ratios


def print_table(result: dict, against: list[str]) -> None:
    titles = [f"{f'x {other}':>10}" for other in against]
    print("".join([f"{'engine':14}", f"{'tokens/s':>10}", *titles, f"{'a CPU s':>10}", *titles]))
    for name in result["rates"]:
        line = f"{name:14}"
        for rates, ratios in (("rates", "ratios"), ("cpu_rates", "cpu_ratios")):
            line += f"{statistics.median(result[rates][name]):10.1f}"
            line += "".join(map("{:10.2f}".format, result[ratios][name].values()))
        print(line)


def main(argv: list[str] | None = None) -> dict:
    args = build_parser().parse_args(argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    import torch

    from finetune.files import write_json
    from serving.engines.onednn_weights import use_onednn_layout
    from serving.request import Limits

    torch.set_num_threads(args.threads)
    count, cap, repetitions = (8, 24, 1) if args.quick else (args.requests, CAP, args.repetitions)
    model = make_model()
    sizes = {"max_tokens": 4096, "prefill_tokens": PREFILL}
    static = Limits(max_batch=args.static, kv_tokens=args.static * 4096, **sizes)
    continuous = Limits(
        max_batch=args.rows, kv_tokens=max(args.rows * (LONGEST_PROMPT + CAP + 1), 4096), **sizes
    )
    subjects = {
        "static": ours("static", "fifo", model, static),
        "continuous": ours("continuous", "fcfs", model, continuous),
    }
    if args.layout:
        laid_out = make_model()
        use_onednn_layout(laid_out)
        subjects["laid-out"] = ours("continuous", "fcfs", laid_out, continuous)
    if args.peer:
        glm = make_glm()
        subjects |= {
            "peer": peer(glm, args.rows, continuous.kv_tokens),
            "continuous-glm": ours("continuous", "fcfs", glm, continuous),
        }
    rates, cpu_rates = measure(subjects, count, cap, repetitions, args.rows, args.seed)
    against = [name for name in ("static", "peer") if name in subjects]
    if args.layout:
        against.append("continuous")
    result = {
        "threads": args.threads,
        "requests": count,
        "rates": rates,
        "cpu_rates": cpu_rates,
        "ratios": ratios_of(rates, against),
        "cpu_ratios": ratios_of(cpu_rates, against),
    }
    print_table(result, against)
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
