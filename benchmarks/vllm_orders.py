# ruff: noqa: E402
"""Orders before vLLM, by its own scheduler without a model: the gateway's policies, our class.

    python benchmarks/vllm_scheduler.py --orders --lengths heldout.jsonl --predictor DIR
        --cells FILE [--seeds 10] [--requests 200] [--max_batch 4,16] [--loads 0.8,1.2]

The same Poisson arrivals and answers go through vLLM's scheduler (benchmarks/vllm_clock.py; its
model is mocked) in its own order, by the priorities that the gateway's code makes of each policy,
and through LengthScheduler. NAME+true has the true lengths for predicted ones, LengthScheduler@0.3
that boost_rate. A step takes --step_ms, --row_ms for each sequence in it and --prompt_ms for each
token of a prompt, by default what SmolLM2-135M-Instruct takes on a core. Load 1 is what these costs
allow with a full batch. One mocked token stands for --grain of the rows' tokens and takes as long.

Cells are lines of --cells: the same command goes on where it was stopped. Intervals are of pairs:
the same seed's arrivals and answers, at 95 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.cells import Cell, KeptCells, changes, print_table, shown_mean
from benchmarks.client_env import environment_python
from benchmarks.rows import read_lines
from chatglm.commands import Parser, number, run_command, whole
from predictor.prediction import LengthPrediction, from_bins
from serving.gateway.dispatch import ORDERS
from serving.gateway.flags import gateway_parser

CLOCK_FILE = Path(__file__).with_name("vllm_clock.py")
OWN, CLASS, TRUE, RATE = "vllm", "LengthScheduler", "+true", "@"
DEFAULT = gateway_parser().get_default("policy")
POLICIES = tuple(filter("fcfs".__ne__, ORDERS))
TOLD_TRUTH = ("sjf+true", "gittins_mean+true", "LengthScheduler+true")
BYTES_PER_TOKEN = 4  # of a prompt, about
TEMPLATE_TOKENS = 25  # of a chat's template around it
BLOCK_TOKENS = 16
PASS_TOKENS = 2048
SHOWN = {  # column -> metric
    "mean s": "mean_s",
    "p99 s": "p99_s",
    "mean of the short half s": "short_s",
    "largest wait s": "wait_s",
    "in time %": "in_time",
}
AGAINST = {f"{OWN} %": OWN, f"{DEFAULT} %": DEFAULT}


def lengths_of(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of --lengths in mocked tokens, with what the predictor says of them."""
    from predictor.runtime import LengthPredictor

    rows = read_lines(flags.lengths)
    predictor = LengthPredictor.from_pretrained(flags.predictor)
    found = []
    for row, prediction in zip(rows, predictor.predict([row["prompt"] for row in rows])):
        prompt = TEMPLATE_TOKENS + len(row["prompt"].encode()) / BYTES_PER_TOKEN
        answer = mocked_tokens(min(row["output_tokens"], flags.cap), flags)
        known = from_bins(np.array([0.0, 1.0]), np.array([0.0, answer - 0.5, answer + 0.5]))
        shorter = LengthPrediction(
            prediction.probabilities, prediction.edges / flags.grain, prediction.rank_score
        )
        found.append(
            {
                "prompt": mocked_tokens(prompt, flags),
                "answer": answer,
                "prediction": shorter.to_dict(),
                "known": known.to_dict(),
            }
        )
    return found


def mocked_tokens(tokens: float, flags: argparse.Namespace) -> int:
    return max(round(tokens / flags.grain), 1)


def machine_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common, in mocked tokens."""
    return {
        "pass_tokens": PASS_TOKENS,
        "blocks": flags.kv_tokens // BLOCK_TOKENS,
        "block_tokens": max(BLOCK_TOKENS // flags.grain, 1),
        "max_tokens": PASS_TOKENS,
        "cap": mocked_tokens(flags.cap, flags),
        "step_s": flags.step_ms * flags.grain / 1000,
        "row_s": flags.row_ms * flags.grain / 1000,
        "prompt_s": flags.prompt_ms * flags.grain / 1000,
        "slo_s": flags.slo_s,
        "in_flight": flags.in_flight,
    }


def capacity_of(rows: list[dict[str, Any]], machine: dict[str, Any], max_batch: int) -> float:
    """Answers a second where the batch is always full."""
    token_s = machine["step_s"] / max_batch + machine["row_s"]
    answer_s = token_s * mean(row["answer"] for row in rows)
    return 1 / (answer_s + machine["prompt_s"] * mean(row["prompt"] for row in rows))


def run_of(cell: Cell, rows: list[dict[str, Any]], flags: argparse.Namespace) -> dict[str, Any]:
    """The run of a cell; all orders of a seed, batch and load get the same requests."""
    machine, max_batch = machine_of(flags), cell["max_batch"]
    rng = np.random.default_rng((cell["seed"], max_batch))
    rate = cell["load"] * capacity_of(rows, machine, max_batch)
    arrivals = np.cumsum(rng.exponential(1 / rate, flags.requests))
    chosen = rng.integers(0, len(rows), flags.requests)
    order, _, rate = cell["order"].removesuffix(TRUE).partition(RATE)
    return machine | {
        "order": order,
        "truth": cell["order"].endswith(TRUE),
        "boost_rate": float(rate) if rate else None,
        "max_batch": max_batch,
        "requests": list(map(list, zip(chosen.tolist(), arrivals.tolist()))),
    }


def mocked_runs(
    python: str | Path, rows: list[dict[str, Any]], runs: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What vLLM's scheduler does in each run, one after the other; see vllm_clock.py."""
    with tempfile.TemporaryDirectory() as name:
        source, log = Path(name) / "work.json", Path(name) / "log"
        source.write_text(json.dumps({"rows": rows, "runs": runs}), encoding="utf-8")
        env = dict(os.environ, OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")
        env.pop("PYTHONPATH", None)
        words = [str(python), str(CLOCK_FILE), str(source)]
        with (
            log.open("w") as errors,
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=env, cwd=name) as it,
        ):
            yield from map(json.loads, it.stdout or ())
        if it.returncode:
            raise ValueError(f"vLLM's scheduler failed: {log.read_text().strip()[-800:]}")


def figures(
    run: dict[str, Any], found: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Of a run: seconds from arrival to the end, and to admission."""
    numbers, arrivals = map(np.array, zip(*run["requests"]))
    admitted, ended = np.array(found["spans"]).T
    answers = np.array([rows[row]["answer"] for row in numbers])
    short = answers.argsort(kind="stable")[: max(len(answers) // 2, 1)]
    latencies = ended - arrivals
    return {
        "mean_s": float(latencies.mean()),
        "p99_s": float(np.quantile(latencies, 0.99)),
        "short_s": float(latencies[short].mean()),
        "wait_s": float((admitted - arrivals).max()),
        "in_time": float(100 * (latencies <= run["slo_s"]).mean()),
        "span_s": float(ended.max() - arrivals[0]),
        "preempted": found["preempted"],
        "own_us": found["own_us"],
    }


def cell_list(flags: argparse.Namespace) -> list[Cell]:
    """Seed by seed. Raises ValueError for an order that is none."""
    orders = flags.order.split(",")
    for name in orders:
        if not is_order(name):
            wanted = ", ".join((OWN, CLASS, f"{CLASS}{RATE}BOOST_RATE", *ORDERS))
            raise ValueError(f"--order: wanted some of {wanted}, or NAME{TRUE}; got {name!r}")
    cells = []
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        for max_batch in map(int, flags.max_batch.split(",")):
            for load in map(float, flags.loads.split(",")):
                for name in orders:
                    cell = {"order": name, "max_batch": max_batch, "load": load, "seed": seed}
                    cells.append(cell)
    return cells


def is_order(name: str) -> bool:
    order, _, rate = name.removesuffix(TRUE).partition(RATE)
    if not rate:
        return RATE not in name and order in (OWN, CLASS, *ORDERS)
    return order == CLASS and rate.replace(".", "", 1).isdecimal() and float(rate) > 0


def run_cells(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing; the rows of all that are asked for."""
    cells = cell_list(flags)
    rows = lengths_of(flags)
    kept = KeptCells(flags.cells, {name: str(getattr(flags, name)) for name in KEPT})
    python = flags.python or environment_python("vllm")
    missing = kept.missing(cells)
    runs = [run_of(cell, rows, flags) for cell in missing]
    for cell, run, found in zip(missing, runs, mocked_runs(python, rows, runs) if runs else ()):
        kept.add(cell | figures(run, found, rows))
    return [row for row in map(kept.find, cells) if row is not None]


def print_tables(rows: list[dict[str, Any]]) -> None:
    """A table for each batch and load: means over seeds, and pairs with vLLM's and the default."""
    columns = ["order", *SHOWN, "preempted", "us a step"]
    for metric in ("mean", "p99"):
        columns += [f"{metric} against {name}" for name in AGAINST]
    for max_batch, load in dict.fromkeys((row["max_batch"], row["load"]) for row in rows):
        print(f"\n{max_batch} at once, {load} of capacity\n")
        by_order: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            if (row["max_batch"], row["load"]) == (max_batch, load):
                by_order.setdefault(row["order"], {})[row["seed"]] = row
        print_table(columns, [table_line(name, by_order) for name in by_order])


def table_line(name: str, by_order: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    runs = by_order[name]
    line = [f"`{name}`"]
    for metric in (*SHOWN.values(), "preempted", "own_us"):
        line.append(f"{mean(run[metric] for run in runs.values()):.3g}")
    for metric in ("mean_s", "p99_s"):
        for base in AGAINST.values():
            pairs = changes(runs, by_order.get(base, {}), metric) if base != name else []
            line.append(shown_mean(pairs, "+.1f"))
    return line


KEPT = ("lengths", "predictor", "requests", "cap", "slo_s", "kv_tokens", "grain", "in_flight")
KEPT += ("step_ms", "row_ms", "prompt_ms")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vllm_scheduler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = "this comparison, in place of the simulator's decisions"
    parser.add_argument("--orders", action="store_true", required=True, help=mode)
    rows = "rows with prompt and output_tokens"
    parser.add_argument("--lengths", type=Path, required=True, help=rows)
    parser.add_argument("--predictor", required=True, help="of these lengths")
    parser.add_argument("--cells", type=Path, required=True, help="where cells are kept")
    names = ",".join((OWN, *POLICIES, CLASS, *TOLD_TRUTH))
    parser.add_argument("--order", default=names, help="[%(default)s]")
    parser.add_argument("--seeds", type=whole(), default=10, help="[10]")
    parser.add_argument("--first_seed", type=whole(0), default=0, help="[0]")
    parser.add_argument("--requests", type=whole(), default=200, help="of a run [200]")
    parser.add_argument("--max_batch", default="4,16", help="answers at once [%(default)s]")
    parser.add_argument("--loads", default="0.8,1.2", help="of capacity [%(default)s]")
    parser.add_argument("--cap", type=whole(), default=512, help="longest answer, in tokens [512]")
    above = number(above=True)
    parser.add_argument("--slo_s", type=above, default=30.0, help="as the gateway's [30]")
    parser.add_argument("--kv_tokens", type=whole(), default=46080, help="of memory [46080]")
    parser.add_argument("--step_ms", type=above, default=58.0, help="of a step [58]")
    parser.add_argument("--row_ms", type=number(), default=4.0, help="of a sequence in it [4]")
    parser.add_argument("--prompt_ms", type=number(), default=1.6, help="of a prompt's token [1.6]")
    parser.add_argument("--grain", type=whole(), default=4, help="tokens of a mocked one [4]")
    flight = "steps scheduled ahead, the one that runs among them: 1 on CPUs, 2 on GPUs [1]"
    parser.add_argument("--in_flight", type=int, choices=(1, 2), default=1, help=flight)
    parser.add_argument("--python", help="of an environment with vLLM [made where it is missing]")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = build_parser().parse_args(argv)
    return run_command("vllm_scheduler", lambda: print_tables(run_cells(flags)))
