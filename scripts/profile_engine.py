"""Measure what serving a model costs on this machine, as a profile for the simulator, the deployers
and the server.

    python scripts/profile_engine.py --model output/quickstart/merged \\
        --output output/quickstart/engine.json
    python -m serving.simulate --profile output/quickstart/engine.json \\
        --model output/quickstart/merged --element_bytes 4 --rate 20

Times decode steps of the real engine by rows and context, and prompts by length, in turns, and fits
the cost model to the means; and what scheduler and policy take between two steps. --rows keeps the
timings as the CSV file that `python -m serving.cost_model fit` reads.
"""

import argparse
import csv
import io
import sys
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command
from finetune.evaluation.inference import LoadingFlags, add_loading_flags
from finetune.files import write_aside
from serving.cost_model.fit import Measurement
from serving.engines import IN_PROCESS
from serving.policies.continuous import POLICIES
from serving.request import Limits


@dataclass(frozen=True)
class ProfileFlags(LoadingFlags):
    """The flags of this command."""

    model: str
    output: Path
    rows: Path | None
    engine: str
    max_batch: int
    max_tokens: int
    kv_tokens: int
    repetitions: int


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="profile_engine.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a model, adapter or prefix folder")
    parser.add_argument("--output", required=True, type=Path, help="profile to write, .json")
    parser.add_argument("--rows", type=Path, help="also write the timings here, .csv")
    parser.add_argument(
        "--engine", choices=tuple(IN_PROCESS), default="continuous", help="[continuous]"
    )
    parser.add_argument("--max_batch", type=int, default=16, help="most answers at once [16]")
    parser.add_argument(
        "--max_tokens", type=int, default=2048, help="longest prompt and answer [2048]"
    )
    parser.add_argument("--kv_tokens", type=int, default=16384, help="KV cache in tokens [16384]")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="timings of each setting; their mean counts [5]"
    )
    add_loading_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {args.repetitions}")
    flags = ProfileFlags(**vars(args))
    return run_command(parser.prog, lambda: profile(flags))


def write_timings(path: Path, rows: list[Measurement]) -> None:
    """The timings as CSV."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow("batch_size" if f.name == "batch" else f.name for f in fields(Measurement))
    writer.writerows(map(astuple, rows))
    write_aside(path, table.getvalue())


def print_errors(errors: dict[str, dict[str, float]]) -> None:
    """The fit's errors, a line for each kind of timing."""
    for name, found in errors.items():
        print(
            f"{name:10} {found['rows']} timings: median {100 * found['median_abs_error']:.1f} %, "
            f"P90 {100 * found['p90_abs_error']:.1f} %"
        )


def profile(flags: ProfileFlags) -> None:
    limits = Limits(flags.max_batch, flags.kv_tokens, flags.max_tokens)
    from tqdm import tqdm

    from chatglm import load_tokenizer
    from finetune.evaluation.inference import load_ready
    from serving.engines.profiling import profile_engine
    from serving.engines.served_cost import cost_device

    tokenizer = load_tokenizer(
        flags.model, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    model = load_ready(
        flags.model,
        mode=flags.mode,
        base=flags.base_model,
        device=flags.device,
        precision=flags.precision,
    )
    measured, rows = profile_engine(
        flags.engine,
        model,
        tokenizer,
        flags.model,
        limits,
        cost_device(model.device),
        POLICIES["fifo" if flags.engine == "static" else "fcfs"],
        flags.repetitions,
        lambda timings, total: iter(tqdm(timings, total=total, desc="timing", unit="timing")),
    )
    replace(measured, name=flags.output.stem).save(flags.output)
    if flags.rows:
        write_timings(flags.rows, rows)
    print_errors(measured.made["errors"])
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    sys.exit(main())
