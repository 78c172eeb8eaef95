"""Batches by their size and by the number of GPUs: a table, and a picture of it.

python -m serving.sweep --model chatglm2-6b --gpus 1,2,4 --batches 5,10,20 --profile rtx3090
python -m serving.sweep --run --model DIR --batches 1,2,4,8 --output_tokens 64

Without --run by the cost model, of any published model on any GPU, on paper. With it the real
engine answers such batches on this machine, on one device or, by --gpus, on several.
"""

import argparse
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatglm.commands import Parser, run_command, whole
from finetune.evaluation.inference import LoadingFlags, add_loading_flags, add_packing_flag
from finetune.files import check_file_to_write, write_json
from finetune.flag_effects import Effect, check_given
from finetune.memory.shapes import shape_source
from finetune.out_of_memory import explained, memory_there
from finetune.placing import DEPLOYER_NAMES
from predictor.pictures import check_picture
from serving.cost_model.devices import GIB, MAX_DEVICES
from serving.cost_model.model import ModelSizes, read_profile
from serving.simulate.experiment_common import print_markdown
from serving.sweep.paper import sweep_on_paper
from serving.sweep.pictures import draw_sweep
from serving.sweep.rows import SweepRow, SweptSizes, table_rows

PROG = "serving.sweep"
PAPER_GPUS, RUN_GPUS = (1, 2, 4), (1,)
PAPER_BATCHES, RUN_BATCHES = (1, 5, 10, 15, 20, 25, 30), (1, 2, 4, 8)
RUN = Effect("--run", lambda c: c.run)
PAPER = Effect("a sweep on paper, without --run", lambda c: not c.run)
EFFECTS = {
    "gpu": PAPER,
    **dict.fromkeys(("base_model", "mode", "prompt_style", "device", "precision"), RUN),
    **dict.fromkeys(("keep_quantized", "repetitions"), RUN),
}


@dataclass(frozen=True)
class SweepFlags(LoadingFlags):
    """The flags of the command; `sweep_parser` has their meaning and defaults."""

    model: str
    run: bool
    gpus: tuple[int, ...] | None
    batches: tuple[int, ...] | None
    prompt_tokens: int
    output_tokens: int
    deployer: str
    gpu: str | None
    profile: str | None
    repetitions: int
    json: Path | None
    picture: Path | None
    keep_quantized: bool

    @property
    def sizes(self) -> SweptSizes:
        return SweptSizes(
            self.gpus or (RUN_GPUS if self.run else PAPER_GPUS),
            self.batches or (RUN_BATCHES if self.run else PAPER_BATCHES),
            self.prompt_tokens,
            self.output_tokens,
            self.deployer,
        )

    def printable(self) -> dict[str, Any]:
        """By name, with paths as text."""
        values = asdict(self)
        for name, value in values.items():
            values[name] = str(value) if isinstance(value, Path) else value
        return values


def whole_list(text: str, most: int) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once, in order."""
    return tuple(sorted(set(map(whole(1, most), text.split(",")))))


def gpu_counts(text: str) -> tuple[int, ...]:
    return whole_list(text, MAX_DEVICES)


def batch_sizes(text: str) -> tuple[int, ...]:
    return whole_list(text, 100_000)


def sweep_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="chatglm2-6b", help="published name, or a model's folder [chatglm2-6b]")
    add("--run", action="store_true", help="measure the real engine on this machine")
    gpus = "numbers of devices, with commas [1,2,4; with --run 1]"
    add("--gpus", type=gpu_counts, metavar="LIST", help=gpus)
    batches = "requests of a batch, with commas [1,5,10,15,20,25,30; with --run 1,2,4,8]"
    add("--batches", type=batch_sizes, metavar="LIST", help=batches)
    add("--prompt_tokens", type=whole(), default=35, metavar="N", help="of each prompt [35]")
    add("--output_tokens", type=whole(), default=256, metavar="N", help="of each answer [256]")
    deployer = "places the layers on several devices [even]"
    add("--deployer", choices=DEPLOYER_NAMES, default="even", help=deployer)
    gpu = "of serving/cost_model/devices.py, or a .json file [the profile's]"
    add("--gpu", metavar="NAME", help=gpu)
    profile = (
        "of serving/cost_model/profiles, or a .json file [datasheet; with --run no prediction]"
    )
    add("--profile", help=profile)
    repeated = "runs of each batch, whose median counts [3]"
    add("--repetitions", type=whole(), default=3, metavar="N", help=repeated)
    add("--json", type=Path, metavar="FILE", help="write the rows")
    add("--picture", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    add_loading_flags(parser)
    add_packing_flag(parser)
    return parser


def rows_on_paper(flags: SweepFlags) -> tuple[list[SweepRow], str]:
    """(rows, title)."""
    profile = read_profile(flags.profile or "datasheet")
    model = ModelSizes.from_config(flags.model)
    rows = list(sweep_on_paper(model, profile, flags.gpu, flags.sizes))
    gpu = flags.gpu or profile.device_name
    return rows, f"{shape_source(flags.model)}, on paper: {gpu}, profile {profile.name}"


def sweep_advice(flags: SweepFlags) -> str:
    where, size = memory_there()
    return (
        f"{flags.model} with {max(flags.sizes.batches)} requests of {flags.sizes.tokens} tokens "
        f"needs more than the {size / GIB:.1f} GB of this {where}: give smaller --batches"
    )


def measured_rows(flags: SweepFlags) -> tuple[list[SweepRow], str]:
    """(rows, title)."""
    from tqdm import tqdm

    from chatglm import load_tokenizer
    from chatglm.hub import resolve_folder
    from serving.replicas.devices import count_gpus
    from serving.replicas.served_sizes import element_bytes_of, served_sizes
    from serving.sweep.measured import measure_sweep

    folder = resolve_folder(flags.model, weights=True)
    tokenizer = load_tokenizer(
        folder, mode=flags.mode, base=flags.base_model, prompt_style=flags.prompt_style
    )
    profile = None if flags.profile is None else read_profile(flags.profile)
    sizes, repetitions = flags.sizes, flags.repetitions
    width = element_bytes_of(flags.precision, count_gpus() > 0 and flags.device != "cpu")
    model = served_sizes(
        str(folder), base=flags.base_model, element_bytes=width, keep_quantized=flags.keep_quantized
    ).model
    total = len(sizes.gpus) * len(sizes.batches) * repetitions
    bar = tqdm(total=total, desc="batches", unit="batch", disable=None)
    with bar, explained(lambda: sweep_advice(flags)):
        rows = list(measure_sweep(flags, sizes, tokenizer, model, profile, repetitions, bar))
    return rows, f"{flags.model}, measured: median of {repetitions} runs of each batch"


def run_sweep(flags: SweepFlags) -> None:
    """Everything after the flags. Raises ValueError, OSError in one line."""
    if flags.picture is not None:
        check_picture(flags.picture)
    if flags.json is not None:
        check_file_to_write(flags.json, "--json")
    rows, title = measured_rows(flags) if flags.run else rows_on_paper(flags)
    title = f"{title}; {flags.prompt_tokens} + {flags.output_tokens} tokens a request"
    print_markdown(title, table_rows(rows))
    for row in rows:
        if row.why:
            print(f"{row.gpus} device(s), batch {row.batch}: {row.why}")
            break
    if flags.json is not None:
        written = [asdict(row) | {"tokens_s": row.tokens_s} for row in rows]
        write_json(flags.json, {"settings": flags.printable(), "rows": written})
    if flags.picture is not None:
        draw_sweep(flags.picture, rows, title)


def main(argv: list[str] | None = None) -> int:
    parser = sweep_parser()
    args = parser.parse_args(argv)
    check_given(parser, vars(args), EFFECTS)
    flags = SweepFlags(**vars(args))
    logging.getLogger("serving.engines.runner").setLevel(logging.CRITICAL)
    return run_command(PROG, lambda: run_sweep(flags))


if __name__ == "__main__":
    sys.exit(main())
