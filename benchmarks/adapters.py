"""Tokens per second of one batch with many LoRA adapters, with one, and with none.

    python benchmarks/adapters.py [--quick] [--json FILE] [--rows 8] [--adapters 8] [--rank 8]
        [--repetitions 9] [--threads 1] [--engine continuous]

The model is that of scripts/prepare_small_model.py: ChatGLM2 with 4 layers of 256, random weights
in fp32, here with a vocabulary of --vocabulary. Every adapter changes all linear layers of the
blocks. The subjects answer the same prompts, --rows at once, each answer --tokens long:
    none     the base
    one      all rows with one adapter
    many     each row with one of --adapters, in turn
They run one after another within a repetition; a ratio is taken within a repetition, and the table
shows medians. On a shared machine the ratio by CPU seconds (of all threads; --threads 1) says more
than the one by wall-clock time.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serving.engines import TextEngine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HIDDEN, LAYERS, FFN = 256, 4, 688
PROMPT = 32  # tokens
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
POLICY_OF = {"continuous": "fcfs", "static": "fifo"}
Subject = Callable[[int], tuple[float, float]]  # tokens per second, and per CPU second
Rates = dict[str, list[float]]  # {subject: of each repetition}


def make_base(vocabulary: int) -> "PreTrainedModel":
    """A ChatGLM2 of random weights, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from chatglm.configuration import ChatGLM2Config

    config = ChatGLM2Config(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        kv_channels=HIDDEN // 8,
        multi_query_group_num=2,
        ffn_hidden_size=FFN,
        padded_vocab_size=vocabulary,
        glm_family="glm2",
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def write_adapters(model: "PreTrainedModel", folder: Path, count: int, rank: int) -> list[str]:
    """Write random adapters of the model as folders of their names; returns the names."""
    import torch
    from safetensors.torch import save_file

    from finetune.files import write_json
    from serving.engines.adapter_files import linear_sizes

    names = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        state = {}
        for module, (rows, columns) in linear_sizes(model).items():
            if module.endswith(TARGETS):
                start = f"base_model.model.{module}.lora"
                a = torch.randn(rank, columns, generator=generator) * columns**-0.5
                state[f"{start}_A.weight"] = a
                state[f"{start}_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
        names.append(f"adapter-{number}")
        (folder / names[-1]).mkdir()
        save_file(state, folder / names[-1] / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": TARGETS}
        write_json(folder / names[-1] / "adapter_config.json", config)
    return names


def make_subject(
    engine_name: str,
    model: "PreTrainedModel",
    folder: Path,
    names: list[str | None],
    rows: int,
    tokens: int,
) -> Subject:
    """A subject whose rows have the adapters `names` in turn."""
    import numpy as np

    from serving.engines import Sampling, WallClock
    from serving.policies.continuous import POLICIES
    from serving.request import Request
    from serving.scheduler import Replay, run_scheduler

    engine = make_loaded_engine(engine_name, model, folder, names, rows)
    policy, vocabulary = POLICIES[POLICY_OF[engine_name]], model.config.padded_vocab_size

    def subject(seed: int) -> tuple[float, float]:
        prompts = np.random.default_rng(seed).integers(0, vocabulary, (rows, PROMPT)).tolist()
        answers, requests = [], []
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for number, prompt in enumerate(prompts):
            sampling = Sampling(tokens, adapter=names[number % len(names)])
            requests.append(Request(number, PROMPT, 0.0, 1e9))
            answers.append(engine.submit(requests[-1], prompt, sampling))
        for _ in run_scheduler(policy, engine, WallClock(), Replay(requests)):
            pass
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        assert all(len(answer.tokens) == tokens for answer in answers)
        return rows * tokens / seconds, rows * tokens / cpu_seconds

    return subject


def make_loaded_engine(
    name: str, model: "PreTrainedModel", folder: Path, adapters: list[str | None], rows: int
) -> "TextEngine":
    """An engine of so many rows with the adapters of a folder loaded."""
    from serving.engines import make_engine
    from serving.request import Limits
    from serving.simulate.engine import LinearCost

    # `fifo` plans for prompts and 2,048 tokens of each row.
    limits = Limits(max_batch=rows, kv_tokens=rows * 4096, max_tokens=2048)
    engine = make_engine(name, model, limits, LinearCost(), [])
    for adapter in adapters:
        if adapter is not None:
            assert engine.adapters is not None
            engine.adapters.load(adapter, folder / adapter)
    return engine


def measure(subjects: dict[str, Subject], repetitions: int) -> tuple[Rates, Rates]:
    """Tokens per second and per CPU second of each subject, by repetition.

    One repetition before does not count.
    """
    rates: Rates = {name: [] for name in subjects}
    cpu_rates: Rates = {name: [] for name in subjects}
    for repetition in range(-1, repetitions):
        for name, subject in subjects.items():
            rate, cpu_rate = subject(repetition + 1)
            if repetition >= 0:
                rates[name].append(rate)
                cpu_rates[name].append(cpu_rate)
                figures = f"{rate:8.1f} tokens/s {cpu_rate:8.1f} tokens/CPU s"
                line = f"{repetition + 1}/{repetitions} {name:6} {figures}"
                print(line, file=sys.stderr, flush=True)
    return rates, cpu_rates


def measure_all(args: argparse.Namespace, tokens: int, repetitions: int) -> tuple[Rates, Rates]:
    """`measure` of the three subjects, from the command's flags."""
    model = make_base(args.vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_adapters(model, folder, args.adapters, args.rank)
        subjects = {}
        every = [("none", [None]), ("one", names[:1]), ("many", names)]
        for name, adapters in every:
            # An engine hooks its model's layers, so each has a model of its own.
            subjects[name] = make_subject(
                args.engine, make_base(args.vocabulary), folder, adapters, args.rows, tokens
            )
        return measure(subjects, repetitions)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="answers of 4 tokens, once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--engine", choices=tuple(POLICY_OF), default="continuous")
    parser.add_argument("--rows", type=int, default=8, help="answers at once [8]")
    parser.add_argument("--adapters", type=int, default=8, help="of `many` [8]")
    parser.add_argument("--rank", type=int, default=8, help="of each adapter [8]")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer [128]")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the model [8192]")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def ratio(rates: Rates, name: str, other: str) -> float:
    """The median over the repetitions of one subject's rate over another's."""
    quotients = []
    for mine, theirs in zip(rates[name], rates[other]):
        quotients.append(mine / theirs)
    return statistics.median(quotients)


def print_table(result: dict) -> None:
    columns = ("tokens/s", "x one", "x none", "tokens/CPU s", "x one", "x none")
    print(f"| {result['rows']} rows | adapters | {' | '.join(columns)} |")
    print(f"|---|---{'|---' * len(columns)}|")
    for name, count in (("none", 0), ("one", 1), ("many", result["adapters"])):
        line = f"| {name} | {count} |"
        for by in (result["rates"], result["cpu_rates"]):
            ratios = f"{ratio(by, name, 'one'):.2f} | {ratio(by, name, 'none'):.2f}"
            line += f" {statistics.median(by[name]):.0f} | {ratios} |"
        print(line)


def main(argv: list[str] | None = None) -> dict:
    args = build_parser().parse_args(argv)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    import torch

    from finetune.files import write_json

    torch.set_num_threads(args.threads)
    tokens, repetitions = (4, 1) if args.quick else (args.tokens, args.repetitions)
    rates, cpu_rates = measure_all(args, tokens, repetitions)
    result = {
        "engine": args.engine,
        "rows": args.rows,
        "adapters": args.adapters,
        "rank": args.rank,
        "rates": rates,
        "cpu_rates": cpu_rates,
        "many_over_one": ratio(rates, "many", "one"),
        "many_over_one_cpu": ratio(cpu_rates, "many", "one"),
    }
    print_table(result)
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
