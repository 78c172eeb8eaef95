"""How much memory a fine-tuning needs, by part, without weights and without a GPU.

    python -m finetune.memory --model chatglm2-6b --train_type lora --max_len 1560 \\
        --per_device_train_batch_size 1 --gpu A40
    python -m finetune.memory --compare_seeds   the published rows of memory against the formula
    python -m finetune.memory --table           what each method needs, as in docs/results.md
    python -m finetune.memory --suggest --model chatglm2-6b --train_type all --gpu A40 --num_gpus 4
    python -m finetune.memory --guide           which ZeRO file for which card, as in docs/zero.md
    python train.py --estimate_memory ...       the run that the other flags describe

finetune/memory/formula.py has the formula. GB in print are GiB, as nvidia-smi's. Free of torch.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from chatglm.commands import Parser, number, run_command
from chatglm.files import read_json
from finetune.config import RowsConfig, TrainConfig, add_flag, changed_flags
from finetune.ds_file import fill_sizes, read_ds_file
from finetune.files import write_json
from finetune.flag_effects import ESTIMATING, ONE_RUN, TRAINING, check_given, refuse_without_effect
from finetune.memory.cards import CARDS, GIB, MIB
from finetune.memory.formula import Estimate, estimate
from finetune.memory.guide import LANGUAGES, guide_text
from finetune.memory.run import Run, Zero
from finetune.memory.search import LIMIT, largest, make_zero
from finetune.memory.shapes import PUBLISHED, TABLED, read_shape, shape_source, short_name
from finetune.memory.suggest import print_suggestions
from finetune.methods import first_layers, layer_number, module_names
from finetune.stages import check_zero_stage

Mode = Literal["ours", "plain"]
Change = tuple[str, Run]  # the change in words and flags, and the changed run


def cheapest_change(run: Run, card: float) -> str:
    """The first change that makes a run fit, from the cheap ones to those that need more GPUs."""
    for text, changed in changes_by_cost(run, card):
        estimated = estimate(changed)
        if changed != run and estimated.needed <= card:
            return text + host_note(changed, estimated)
    return "nothing on this card: take a larger one"


def host_note(run: Run, estimated: Estimate) -> str:
    """How much host memory an offloaded optimizer takes; empty without one."""
    if run.zero is None or not run.zero.offload_optimizer:
        return ""
    return f" ({sum(estimated.host.values()) / GIB:.0f} GB of host RAM)"


def changes_by_cost(run: Run, card: float) -> Iterator[Change]:
    """Changes that keep the step's rows, then one row at a time with ZeRO, then shorter rows."""
    yield from changes_of_batch(run, card)
    if not run.ours:
        packed = replace(run, mode="ours", precision="bf16")
        yield "this project's packed loop (--mode ours)", packed
    one = replace(checkpointed(run), batch=1, real_tokens=None)
    words = "--gradient_checkpointing, --per_device_train_batch_size 1"
    changes = changes_of_stages(one) if one.stages > 1 else changes_of_zero(one)
    for text, changed in changes:
        yield f"{words} and {text}", changed
    if shorter := largest(one, "length", card, step=8):
        yield f"{words} and --max_len {shorter}", replace(one, length=shorter)


def checkpointed(run: Run) -> Run:
    """The run with every layer checkpointed in full."""
    return replace(run, checkpointing=True, selective=False)


def changes_of_batch(run: Run, card: float) -> Iterator[Change]:
    """The same step, in smaller passes or with recomputed layers."""
    yield "--gradient_checkpointing", checkpointed(run)
    if batch := largest(run, "batch", card):
        passes = -(-run.batch * run.accumulation // batch)
        flags = f"--per_device_train_batch_size {batch} with --gradient_accumulation_steps {passes}"
        yield flags, replace(run, batch=batch, real_tokens=None)
    both = checkpointed(run)
    if batch := largest(both, "batch", card):
        flags = f"--gradient_checkpointing and --per_device_train_batch_size {batch}"
        yield flags, replace(both, batch=batch, real_tokens=None)


def changes_of_zero(run: Run) -> Iterator[Change]:
    """Smaller buckets, an offloaded optimizer, weights partitioned among these GPUs or more."""
    zero = run.zero or Zero(stage=0)

    def staged(run: Run, **change: Any) -> Run:
        return replace(run, zero=replace(zero, overlap=None, **change))

    if zero.reduce_bucket > 5e7:
        yield "a reduce_bucket_size of 5e7 in the --ds_file", staged(run, reduce_bucket=5e7)
    two = staged(run, stage=max(2, zero.stage), offload_optimizer=True)
    yield "--ds_file ds_zero2_offload.json", two
    for gpus in (run.gpus, 2, 4, 8):
        if gpus < run.gpus:
            continue
        on_gpus = f" on {gpus} GPUs" if gpus > run.gpus else ""
        more = replace(run, gpus=gpus)
        yield f"--ds_file ds_zero3_no_offload.json{on_gpus}", staged(more, stage=3)
        offloaded = staged(more, stage=3, offload_optimizer=True, offload_param=True)
        yield f"--ds_file ds_zero3_offload.json{on_gpus}", offloaded


def changes_of_stages(run: Run) -> Iterator[Change]:
    """More stages, on so many times more GPUs."""
    for times in (2, 4, 8):
        stages, gpus = run.stages * times, run.gpus * times
        if stages <= run.shape.layers:
            yield f"--num_stages {stages} on {gpus} GPUs", replace(run, stages=stages, gpus=gpus)


def read_zero(name: str, hidden: int) -> Zero:
    """The Zero of a DeepSpeed file, which is looked up and filled as train.py does."""
    path, ds = read_ds_file(name)
    try:
        return make_zero(fill_sizes(ds.get("zero_optimization", {"stage": 0}), hidden))
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"--ds_file: {path} is no DeepSpeed configuration") from None


# train.py's flags that an estimate depends on.
FLAGS = (
    "train_type",
    "max_len",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_stages",
    "gradient_checkpointing",
    "precision",
    "ds_file",
    "lora_dim",
    "lora_dropout",
    "lora_module_name",
    "freeze_module_name",
    "freeze_ratio",
    "pre_seq_len",
    "prefix_projection",
    "ptuning_version",
)
UNKNOWN_FLAGS = ("quantization_bit", "use_dora", "gradient_checkpointing_layers")
METHOD_TITLES = {"lora": "LoRA", "freeze": "freeze", "ptuning": "P-Tuning", "all": "full"}


def make_run(
    config: RowsConfig, *, mode: Mode = "ours", gpus: int = 1, card: str = "A40", **more: Any
) -> Run:
    """The run that train.py's flags describe; `more` are other fields of Run.

    Raises:
        ValueError: the estimate does not know a flag, or a name matches nothing in the model.
    """
    if unknown := [name for name in UNKNOWN_FLAGS if getattr(config, name)]:
        raise ValueError(
            f"the estimate does not know --{unknown[0]}: leave it out to see the run without it"
        )
    check_zero_stage(config.stages, config.ds_file)
    shape = read_shape(config.model_name_or_path)
    modules = tuple(module_names(config.lora_module_name))
    if modules == ("all-linear",):
        modules = tuple(short_name(name) for name in shape.linears)
    checkpointing = str(config.gradient_checkpointing)
    names = tuple(module_names(config.freeze_module_name))
    if config.freeze_ratio:
        names = later_parameters(list(shape.parameters), config.freeze_ratio)
    more = {"sequences": config.sequences, "label_share": config.label_share} | more
    frozen_copies, trained_copies = config.copies
    run = Run(
        shape,
        config.train_type,
        mode,
        batch=config.per_device_train_batch_size,
        length=config.max_len,
        checkpointing=checkpointing != "False",
        selective=checkpointing == "selective",
        precision=precision_on(config.precision, mode, card),
        gpus=gpus,
        zero=read_zero(config.ds_file, shape.hidden),
        accumulation=config.gradient_accumulation_steps,
        lora_dim=config.lora_dim,
        lora_modules=modules,
        lora_dropout=config.lora_dropout,
        freeze_names=names,
        pre_seq_len=config.pre_seq_len,
        projection=config.prefix_projection,
        version=config.resolved_ptuning_version,
        frozen_copies=frozen_copies,
        trained_copies=trained_copies,
        rollout_rows=config.rollout_rows,
        scorer=read_shape(base_folder(config.scorer)) if config.scorer else None,
        scores=config.scores,
        stages=config.stages,
        **more,
    )
    # A name that matches nothing raises here.
    run.trained  # noqa: B018
    return run


def base_folder(model: str) -> str:
    """The folder of a model, or that of the base of an adapter or a prefix."""
    for file, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        path = Path(model) / file
        found = read_json(path).get(key) if path.is_file() else None
        if found and Path(found).is_dir():
            return str(found)
    return model


def later_parameters(names: list[str], ratio: float) -> tuple[str, ...]:
    """The names of the parameters that --freeze_ratio trains."""
    frozen = first_layers(names, ratio)
    return tuple(name for name in names if layer_number(name) not in frozen)


def precision_on(precision: str, mode: str, card: str) -> str:
    """The precision that "auto" means: train.py's choice on a card; fp16 for published runs."""
    if precision != "auto":
        return precision
    return "fp16" if mode == "plain" or card.startswith(("V100", "T4")) else "bf16"


def local_card() -> tuple[str, float] | None:
    """(name, bytes) of this machine's first GPU, from nvidia-smi; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        name, mib = done.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mib) * MIB
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def memory_figures(run: Run, card: str, size: float) -> dict[str, Any]:
    """All figures that are printed, in bytes."""
    estimated = estimate(run)
    fits = estimated.needed <= size
    described = {key: value for key, value in dataclasses.asdict(run).items() if key != "shape"}
    return {
        "run": described | {"trained_parameters": run.trained_count},
        "parts": estimated.parts,
        "total": estimated.total,
        "needed": estimated.needed,
        "host": estimated.host,
        "card": {"name": card, "bytes": size},
        "fits": fits,
        "largest_batch": largest(run, "batch", size),
        "longest_length": largest(run, "length", size),
        "cheapest_change": None if fits else cheapest_change(run, size),
    }


def print_figures(model: str, run: Run, figures: dict[str, Any]) -> None:
    """Print `memory_figures`."""
    trained = f"{run.trained_count:,} parameters trained"
    print(f"{describe_run(model, run)}; {trained}; {shape_source(model)}\n")
    show_parts("per GPU", figures["parts"], "peak")
    show_parts("host RAM, all processes", figures["host"], "total")
    card = figures["card"]["name"]
    size = figures["card"]["bytes"] / GIB
    needed = f"{figures['needed'] / GIB:.1f} GB"
    if figures["fits"]:
        print(f"\nfits: {needed} of the {card}'s {size:.1f}")
    else:
        print(f"\ndoes not fit: {needed}, and the {card} has {size:.1f}")
        print(f"cheapest change that fits: {figures['cheapest_change']}")
    print(f"largest batch at {run.length} tokens: {show_largest(figures['largest_batch'])}")
    print(f"longest row at batch {run.batch}: {show_largest(figures['longest_length'])}")
    if run.ours:
        labelled = f"{100 * run.label_share:.0f} % of the tokens labelled"
        error = "the formula's error on published rows: --compare_seeds"
        print(f"(rows packed, {labelled}; {error})")


def describe_run(model: str, run: Run) -> str:
    """The model and the settings of a run, in one line."""
    stage, offload = zero_words(run)
    kind = "selective" if run.selective else "on"
    pair = f"{run.sequences} x " if run.sequences > 1 else ""
    checkpointing = kind if run.checkpointing else "off"
    in_stages = f" in {run.stages} stages" if run.stages > 1 else ""
    return (
        f"{model}, {run.train_type}, {run.mode}, {run.precision}, ZeRO-{stage}{offload}, "
        f"{run.gpus} GPU(s){in_stages}, {run.batch} row(s) of {pair}{run.length} tokens, "
        f"gradient checkpointing {checkpointing}"
    )


def zero_words(run: Run) -> tuple[int, str]:
    """ZeRO's stage, and ", offload" where the optimizer is offloaded."""
    if run.zero is None:
        return 0, ""
    return run.zero.stage, ", offload" if run.zero.offload_optimizer else ""


def show_parts(title: str, parts: dict[str, float], total: str) -> None:
    """Print {part: bytes} as a table in GiB, with the sum in a last line named `total`."""
    print(f"{title:<28}{'GB':>8}")
    for name, size in (*parts.items(), (total, sum(parts.values()))):
        rounded = round(size / GIB, 2) + 0.0  # never -0.00
        print(f"  {name:<26}{rounded:8.2f}")


def show_largest(value: int) -> str:
    """A batch or a length that fits, in words where it is 0 or beyond the search."""
    if value == 0:
        return "none fits"
    return f"over {LIMIT // 2}" if value >= LIMIT // 2 else str(value)


def estimate_run(config: RowsConfig) -> None:
    """Print the estimate of train.py --estimate_memory.

    It is for this machine's GPU, else for an A40, and for the launcher's world size, or without a
    launcher for one GPU a stage.
    """
    card, size = local_card() or ("A40", CARDS["A40"] * MIB)
    gpus = int(os.environ.get("WORLD_SIZE", config.stages))
    run = make_run(config, gpus=gpus, card=card)
    if int(os.environ.get("RANK", 0)) == 0:
        print_figures(config.model_name_or_path, run, memory_figures(run, card, size))


# Method, --ds_file and GPUs of each run in --table.
TABLE_RUNS = (
    ("lora", "ds_zero2.json", 1),
    ("ptuning", "ds_zero2.json", 1),
    ("freeze", "ds_zero2.json", 1),
    ("all", "ds_zero3_no_offload.json", 4),
    ("all", "ds_zero3_offload.json", 4),
)


def print_methods(card: str, size: float) -> dict[str, Any]:
    """Print what each method needs of one GPU at 1560 tokens, batch 1, and the longest row that
    fits the card; returns the figures."""
    print(
        "| model | method | GPUs | needed at 1560 tokens, GB | with checkpointing | "
        f"longest row on {card} | with checkpointing |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for model in TABLED:
        for method, ds_file, gpus in TABLE_RUNS:
            row = method_row(model, method, ds_file, gpus, size)
            need = row["needed_gib"]
            longest = [value or "none" for value in row["longest"]]
            print(
                f"| {model} | {row['method']} | {gpus} | {need[0]:.1f} | {need[1]:.1f} | "
                f"{longest[0]} | {longest[1]} |"
            )
            rows.append(row)
    return {"card": card, "rows": rows}


def method_row(model: str, method: str, ds_file: str, gpus: int, size: float) -> dict[str, Any]:
    """Figures of one run without and with checkpointing, on a card of `size` bytes."""
    config = TrainConfig(
        model_name_or_path=model,
        train_path="-",
        train_type=method,
        max_len=1560,
        per_device_train_batch_size=1,
        ds_file=ds_file,
    )
    run = make_run(config, gpus=gpus)
    runs = [replace(run, checkpointing=on) for on in (False, True)]
    _, offload = zero_words(run)
    return {
        "model": model,
        "method": METHOD_TITLES[method] + offload,
        "gpus": gpus,
        "needed_gib": [estimate(each).needed / GIB for each in runs],
        "longest": [largest(each, "length", size, step=8) for each in runs],
    }


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.memory",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"a folder with config.json, or {', '.join(PUBLISHED)}"
    )
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in FLAGS:
        add_flag(parser, fields[name])
    parser.add_argument(
        "--mode",
        choices=("ours", "plain"),
        default="ours",
        help="this project's loop, or the seeds' (padded rows, full logits) [ours]",
    )
    parser.add_argument(
        "--gpus", "--num_gpus", type=int, default=1, metavar="INT", help="GPUs in all [1]"
    )
    parser.add_argument("--gpu", choices=tuple(CARDS), default="A40", help="the card [A40]")
    parser.add_argument(
        "--label_share",
        type=float,
        default=0.25,
        metavar="FLOAT",
        help="share of the tokens that carry loss [0.25]",
    )
    parser.add_argument(
        "--real_tokens",
        type=int,
        metavar="INT",
        help="real tokens of a step's rows on one GPU [batch x max_len]",
    )
    parser.add_argument(
        "--compare_seeds", action="store_true", help="the published rows against the formula"
    )
    parser.add_argument(
        "--fit", action="store_true", help="with --compare_seeds: fit the constants anew"
    )
    parser.add_argument(
        "--table", action="store_true", help="what each method needs, for the published models"
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="the DeepSpeed file and flags that fit the card at the least cost, with the same rows "
        "a step",
    )
    parser.add_argument(
        "--host_gb",
        type=number(1),
        metavar="FLOAT",
        help="with --suggest: RAM of the machine, GB [any]",
    )
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="with --suggest: write its DeepSpeed file there where no shipped one does",
    )
    parser.add_argument(
        "--guide",
        choices=tuple(LANGUAGES),
        nargs="?",
        const="en",
        help="the tables of docs/zero.md, or in Chinese those of docs/zh/zero.md",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def check_flags(parser: argparse.ArgumentParser, args: dict[str, Any]) -> TrainConfig:
    """The training that the flags describe.

    Exits by `parser.error` where a flag has no effect beside the others.
    """
    check_given(parser, args, dict.fromkeys(FLAGS, ONE_RUN) | ESTIMATING)
    given = {name: args[name] for name in FLAGS if name in args}
    try:
        config = TrainConfig(
            model_name_or_path=args["model"] or "-", train_path="-", max_src_len=1, **given
        )
        refuse_without_effect(config, changed_flags(TrainConfig, given), TRAINING)
        return config
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    if args["fit"] and not args["compare_seeds"]:
        parser.error("--fit needs --compare_seeds")
    if not (args["compare_seeds"] or args["table"] or args["guide"] or args["model"]):
        parser.error("--model is required: a folder with config.json or a published name")
    config = check_flags(parser, args)
    return run_command(parser.prog, lambda: print_memory(args, config))


def print_memory(args: dict[str, Any], config: TrainConfig) -> None:
    """Print what the flags ask for: an estimate, --suggest, --table, --guide or --compare_seeds."""
    card = args["gpu"]
    size = CARDS[card] * MIB
    if args["json"] and not Path(args["json"]).parent.is_dir():
        raise ValueError(f"--json: no such folder: {Path(args['json']).parent}")
    if args["compare_seeds"]:
        from finetune.memory import published
        from finetune.memory.formula import Constants

        constants = Constants()
        if args["fit"]:
            constants = published.fit_constants(published.a40_rows())
        figures = published.compare_published(constants)
        published.print_comparison_with_published(figures)
    elif args["table"]:
        figures = print_methods(card, size)
    elif args["guide"]:
        print(guide_text(args["guide"], make_run))
    else:
        described = make_run(
            config,
            mode=args["mode"],
            gpus=args["gpus"],
            card=card,
            label_share=args["label_share"],
            real_tokens=args["real_tokens"],
        )
        if args["suggest"]:
            figures = print_suggestions(args, described, size)
            if args["json"]:
                write_json(args["json"], figures)
            return
        figures = memory_figures(described, card, size)
        print_figures(args["model"], described, figures)
    if args["json"]:
        write_json(args["json"], figures)


if __name__ == "__main__":
    sys.exit(main())
