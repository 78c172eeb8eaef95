"""Tokens a second of the engines: static batches in order of arrival against continuous batching, in interleaved runs.

    python benchmarks/serving_engine.py [--quick] [--json FILE] [--repetitions 5] [--threads 1] [--static 8] [--rows 16] [--peer]

The model has 6 layers of 512, ChatGLM2's proportions and its vocabulary, random weights in bf16. Such a model never stops, so each
request asks for its own number of tokens: log-normal, median 100, at most 512; all are there from the start. Useful tokens are those
asked for; what a static batch computes after a row has ended is not.
    static        transformers' generate, batches of --static in order of arrival (serving.engines.static under `fifo`)
    continuous    --rows sequences at once (serving.engines.continuous under `fcfs`)
    peer          with --peer: transformers' own continuous batching on GlmForCausalLM of the same size
A ratio is taken within each repetition, whose subjects follow one another; the table shows medians. On a machine that others use too, the
ratio by CPU seconds (of all threads; --threads 1) says more than the one by the clock.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LAYERS, HIDDEN, VOCABULARY, FFN = 6, 512, 65024, 1712


def workload(count: int, cap: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt ids, answer tokens) of requests: prompts of 16 to 96 ids."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = np.clip(np.round(rng.lognormal(np.log(100), 1.0, count)), 1, cap).astype(int).tolist()
    return [(rng.integers(1000, 60000, rng.integers(16, 97)).tolist(), length) for length in lengths]


def make_model():
    import torch
    from transformers import AutoModelForCausalLM

    from chatglm.configuration import ChatGLM2Config

    config = ChatGLM2Config(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=8, kv_channels=64, multi_query_group_num=2,
        ffn_hidden_size=FFN, padded_vocab_size=VOCABULARY, glm_family="glm2",
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def ours(name: str, policy: str, model, limits):
    """A subject: work -> seconds, through the scheduler with a wall clock."""
    from serving.continuous import POLICIES
    from serving.engines import Sampling, WallClock, make_engine
    from serving.request import Request
    from serving.scheduler import Replay, run
    from serving.simulated import LinearCost

    engine = make_engine(name, model, limits, LinearCost(), [])

    def subject(work) -> float:
        requests = [Request(i, len(prompt), 0.0, 1e9) for i, (prompt, _) in enumerate(work)]
        answers = [engine.submit(r, prompt, Sampling(length)) for r, (prompt, length) in zip(requests, work)]
        begin = time.perf_counter()
        for _ in run(POLICIES[policy], engine, WallClock(), Replay(requests)):
            pass
        seconds = time.perf_counter() - begin
        assert [len(a.tokens) for a in answers] == [length for _, length in work]
        return seconds

    return subject


def peer(rows: int, kv_tokens: int):
    """transformers' continuous batching, a manager for each turn."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig, GlmConfig, GlmForCausalLM

    config = GlmConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=FFN,
        vocab_size=VOCABULARY, attention_bias=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GlmForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    block = 32
    settings = ContinuousBatchingConfig(num_blocks=kv_tokens // block, page_size=block, max_batch_tokens=512)

    def subject(work) -> float:
        # Started for its turn alone: its thread would take time from the others' turns.
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=512),
            continuous_batching_config=settings,
        )
        manager.start()
        begin = time.perf_counter()
        for prompt, length in work:
            manager.add_request(prompt, max_new_tokens=length)
        left = len(work)
        while left:
            result = manager.get_result(timeout=1)
            left -= result is not None and result.is_finished()
            assert result is not None or manager.is_running(), "transformers' manager has died"
        seconds = time.perf_counter() - begin
        manager.stop()
        return seconds

    return subject


def measure(subjects, count: int, cap: int, repetitions: int, args) -> tuple[dict, dict]:
    """Useful tokens a second of each subject, by repetition; and a second of this process's time, all threads together."""
    rates, cpu_rates = {name: [] for name in subjects}, {name: [] for name in subjects}
    for subject in subjects.values():  # shapes are compiled, memory is there
        subject(workload(args.rows, min(cap, 96), 1))
    for repetition in range(repetitions):
        work = workload(count, cap, args.seed + 2 + repetition)
        tokens = sum(length for _, length in work)
        for name, subject in subjects.items():
            begin = time.process_time()
            rates[name].append(tokens / subject(work))
            cpu_rates[name].append(tokens / (time.process_time() - begin))
            found = f"{rates[name][-1]:8.1f} tokens/s {cpu_rates[name][-1]:8.1f} tokens/CPU s"
            print(f"{repetition + 1}/{repetitions} {name:12} {found}", file=sys.stderr, flush=True)
    return rates, cpu_rates


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 requests of at most 64 tokens, once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--static", type=int, default=8, help="rows of a static batch [8]")
    parser.add_argument("--rows", type=int, default=16, help="sequences of the continuous engine [16]")
    parser.add_argument("--peer", action="store_true", help="transformers' continuous batching too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    import torch

    from serving.request import Limits

    torch.set_num_threads(args.threads)
    count, cap, repetitions = (16, 64, 1) if args.quick else (args.requests, 512, args.repetitions)
    model = make_model()
    whole = 96 + 512 + 1
    sizes = {"max_tokens": 4096, "prefill_tokens": 256}
    subjects = {
        "static": ours("static", "fifo", model, Limits(max_batch=args.static, kv_tokens=args.static * 4096, **sizes)),
        "continuous": ours("continuous", "fcfs", model, Limits(max_batch=args.rows, kv_tokens=max(args.rows * whole, 4096), **sizes)),
    }
    if args.peer:
        subjects["peer"] = peer(args.rows, args.rows * whole)
    rates, cpu_rates = measure(subjects, count, cap, repetitions, args)
    result = {"threads": args.threads, "requests": count, "rates": rates, "cpu_rates": cpu_rates, "ratios": {}, "cpu_ratios": {}}
    print(f"{'engine':12} {'tokens/s':>9} {'x static':>9} {'a CPU s':>9} {'x static':>9}")
    for name in subjects:
        line = f"{name:12}"
        for found, ratios in ((rates, "ratios"), (cpu_rates, "cpu_ratios")):
            result[ratios][name] = statistics.median(a / b for a, b in zip(found[name], found["static"]))
            line += f" {statistics.median(found[name]):9.1f} {result[ratios][name]:9.2f}"
        print(line)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
