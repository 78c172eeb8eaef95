# ruff: noqa: E402
"""A thousand replicas behind one gateway, simulated: routing by predicted work and its rivals.

    python benchmarks/scale.py --cells FILE [--traces azure_conv,mooncake] [--loads 0.8,0.95]
        [--routers predicted_work,...] [--replicas 1000] [--requests 500000]
    python benchmarks/scale.py --cells FILE --routers predicted_work --requests 10000000

A cell is one router on one trace at one load, a line of --cells: the same command goes on where it
was stopped. A recorded trace is laid many times over itself, so that conversations keep their
rhythm. Loads are shares of what one replica answers of that trace when it always has work, times
the replicas. Replicas are alike and serve first come first served by LinearCost, near ChatGLM2-6B
in fp16 on one A100; mooncake's keep the last --cache_tokens of prompts' beginnings beside.

After the tables: what gateways need at that rate, by the measured CPU milliseconds of a request and
of an event of a stream (benchmarks/gateway_overhead.py) and of a prediction (a part of a request).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from benchmarks.cells import Cell, KeptCells, print_table
from chatglm.commands import Parser, number, run_command, whole
from serving.policies.continuous import POLICIES
from serving.request import Limits
from serving.simulate.compare import simulate
from serving.simulate.engine import LinearCost
from serving.simulate.fleet import FleetSetting, simulate_fleet
from serving.simulate.routers import ROUTERS
from serving.simulate.scaled_trace import has_blocks, scale_trace
from serving.simulate.workload import TRACES, PredictorModel

KV_TOKENS = 200_000  # of a replica: 28 KiB a token of ChatGLM2-6B are 5.5 GB
LIMITS = Limits(64, KV_TOKENS, 32_768, 2048)
COST = LinearCost(KV_TOKENS)
FULL_REQUESTS = 3000  # of the run that measures what one replica answers
SHOWN = {
    "mean s": "latency_mean_s",
    "p50 s": "latency_p50_s",
    "p99 s": "latency_p99_s",
    "first token p99 s": "ttft_p99_s",
    "in time %": "attainment",
    "spread of work %": "busy_spread",
    "prompts cached %": "cached_share",
    "KV in use %": "kv_used",
    "CPU s": "cpu_s",
}


@dataclass(frozen=True)
class ScaleFlags:
    """The command's flags; build_parser has their meaning and defaults."""

    cells: Path
    traces: str
    trace_folder: Path
    loads: str
    routers: str
    policy: str
    replicas: int
    requests: int
    sigma: float
    cache_tokens: int
    gateway_ms: float
    event_ms: float
    predict_ms: float

    def cell_list(self) -> list[Cell]:
        """What tells each cell from the others."""
        cells = []
        for trace in self.traces.split(","):
            for load in map(float, self.loads.split(",")):
                for router in self.routers.split(","):
                    if router.startswith("prefix") and not has_blocks(trace):
                        continue
                    cell = {"trace": trace, "load": load, "router": router, "policy": self.policy}
                    size = {"replicas": self.replicas, "requests": self.requests}
                    cells.append(cell | size | {"sigma": self.sigma})
        return cells


def full_rate(trace: str, folder: Path) -> float:
    """Requests a second that one replica answers when it always has work."""
    count = FULL_REQUESTS
    made = scale_trace(trace, count, 1e6, COST, traces=folder, max_tokens=LIMITS.max_tokens)
    metrics, _ = simulate(POLICIES["fcfs"], made.workload, COST, LIMITS)
    return metrics["requests"] / metrics["span_s"]


def run_cell(cell: Cell, rate: float, flags: ScaleFlags) -> dict[str, Any]:
    """The figures of a cell; deterministic but for cpu_s."""
    begin = time.process_time()
    predictor = PredictorModel.normal(flags.sigma)
    trace = scale_trace(
        cell["trace"],
        flags.requests,
        rate,
        COST,
        predictor=predictor,
        traces=flags.trace_folder,
        max_tokens=LIMITS.max_tokens,
    )
    policy = POLICIES[flags.policy]
    setting = FleetSetting(flags.replicas, policy, COST, LIMITS, flags.cache_tokens)
    name = f"{cell['router']} {cell['trace']} {cell['load']}"
    with tqdm(total=flags.requests, desc=name, unit="request", disable=None) as bar:

        def show(arrived: int) -> None:
            bar.update(arrived - bar.n)

        metrics = simulate_fleet(trace, setting, ROUTERS[cell["router"]](), show)
    return {"rate": rate, **metrics, "cpu_s": time.process_time() - begin}


def run_cells(flags: ScaleFlags) -> list[dict[str, Any]]:
    """The wanted cells, those that are missing run and written first."""
    rates: dict[str, float] = {}

    def measure(cell: Cell) -> dict[str, Any]:
        trace = cell["trace"]
        if trace not in rates:
            rates[trace] = full_rate(trace, flags.trace_folder)
        return run_cell(cell, cell["load"] * rates[trace] * flags.replicas, flags)

    kept = KeptCells(flags.cells)
    wanted = flags.cell_list()
    kept.run_missing(wanted, measure)
    return list(filter(None, map(kept.find, wanted)))


def print_tables(rows: list[dict[str, Any]], flags: ScaleFlags) -> None:
    """One for each trace and load, and under it what the gateway needs."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["trace"], row["load"]), []).append(row)
    for (trace, load), group in groups.items():
        rate = group[0]["rate"]
        print(f"\n{trace} at {load} of capacity, {rate:,.0f} requests a second\n")
        lines = []
        for row in group:
            values = [row["router"]]
            for heading, metric in SHOWN.items():
                factor = 100 if "%" in heading else 1
                values.append(f"{factor * row[metric]:.4g}")
            lines.append(values)
        print_table(["router", *SHOWN], lines)
        streams = rate * min(row["latency_mean_s"] for row in group)
        events = max(row["throughput_tps"] for row in group)  # one a token
        print(
            f"\nGateways: {rate * flags.gateway_ms / 1000:.1f} cores for requests, of which "
            f"{rate * flags.predict_ms / 1000:.1f} for predictions, and "
            f"{events * flags.event_ms / 1000:.1f} for {events:,.0f} events a second; "
            f"open streams: {streams:,.0f}"
        )


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--cells", type=Path, required=True, help="file of the cells; what is there is not run")
    add("--traces", default="azure_conv,mooncake", help=f"of {', '.join(TRACES)} [%(default)s]")
    add("--trace_folder", type=Path, default=ROOT / "../shared/data/traces", help="[%(default)s]")
    add("--loads", default="0.8,0.95", help="shares of the capacity [%(default)s]")
    add("--routers", default=",".join(ROUTERS), help="[%(default)s]")
    add("--policy", default="fcfs", choices=POLICIES, help="of each replica's queue [%(default)s]")
    add("--replicas", type=whole(1), default=1000, help="[%(default)s]")
    add("--requests", type=whole(2), default=500_000, help="of a cell [%(default)s]")
    add("--sigma", type=number(0, 10), default=0.8, help="of predictions' log errors [%(default)s]")
    add("--cache_tokens", type=whole(0), default=400_000, help="of a replica [%(default)s]")
    add("--gateway_ms", type=number(0), default=2.13, help="CPU a request [%(default)s]")
    add("--event_ms", type=number(0), default=0.034, help="CPU an event [%(default)s]")
    add("--predict_ms", type=number(0), default=0.4, help="of it, the prediction [%(default)s]")
    return parser


def main() -> int:
    flags = ScaleFlags(**vars(build_parser().parse_args()))

    def run() -> int:
        for name, known in (("routers", ROUTERS), ("traces", TRACES)):
            for given in getattr(flags, name).split(","):
                if given not in known:
                    raise ValueError(f"--{name}: wanted some of {', '.join(known)}; got {given}")
        print_tables(run_cells(flags), flags)
        return 0

    return run_command("scale", run)


if __name__ == "__main__":
    sys.exit(main())
