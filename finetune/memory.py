"""How much memory a fine-tuning needs, by part, without weights and without a GPU.

    python -m finetune.memory --model chatglm2-6b --train_type lora --max_len 1560 --per_device_train_batch_size 1 --gpu A40
    python -m finetune.memory --compare_seeds          (the published rows of memory against the formula)
    python -m finetune.memory --table                  (what each method needs, as in docs/results.md)
    python train.py --estimate_memory ...              (the run that the other flags describe)

The formula is finetune/memory_formula.py's. GB in print are GiB, as nvidia-smi's. Free of torch.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from finetune.config import TrainConfig, add_flag, changed_flags
from finetune.ds_file import BETWEEN_RANKS, fill_sizes, read_ds_file
from finetune.files import write_json
from finetune.flag_effects import ESTIMATING, ONE_RUN, TRAINING, check_given, refuse_without_effect
from finetune.memory_formula import GIB, MIB, Run, Zero, estimate
from finetune.memory_shapes import PUBLISHED, read_shape, shape_source
from finetune.methods import module_names

# The whole memory that nvidia-smi reports, MiB.
CARDS = {
    "T4": 15360, "V100-16G": 16160, "A10": 23028, "RTX3090": 24576, "RTX4090": 24564, "V100-32G": 32510, "A100-40G": 40960,
    "A40": 46068, "L40S": 46068, "A100-80G": 81920, "H100": 81559, "H200": 143771,
}  # fmt: skip
LIMIT = 2**20  # no search for a batch or a length goes further


def largest(run: Run, name: str, card: float, step: int = 1) -> int:
    """The largest "batch" or "length" that fits the card, all rows at their longest, in multiples of `step`; 0 where none does."""

    def fits(units: int) -> bool:
        return estimate(replace(run, real_tokens=None, **{name: units * step})).needed <= card

    low, high = 0, 1
    while high * step < LIMIT and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def cheapest_change(run: Run, card: float) -> str:
    """The first change that makes a run fit, from those that cost little to those that cost machines."""
    zero = run.zero or Zero(stage=0)

    def staged(run: Run, **change) -> Run:
        return replace(run, zero=replace(zero, overlap=None, **change))

    changes = [("--gradient_checkpointing", replace(run, checkpointing=True, selective=False))]
    if batch := largest(run, "batch", card):
        changes.append((f"--per_device_train_batch_size {batch} with --gradient_accumulation_steps {-(-run.batch * run.accumulation // batch)}",
                        replace(run, batch=batch, real_tokens=None)))  # fmt: skip
    both = replace(run, checkpointing=True, selective=False)
    if batch := largest(both, "batch", card):
        changes.append((f"--gradient_checkpointing and --per_device_train_batch_size {batch}", replace(both, batch=batch, real_tokens=None)))
    if not run.ours:
        changes.append(("this project's packed loop (--mode ours)", replace(run, mode="ours", precision="bf16")))
    one = replace(both, batch=1, real_tokens=None)
    words = "--gradient_checkpointing, --per_device_train_batch_size 1"
    if zero.reduce_bucket > 5e7:
        changes.append((f"{words} and a reduce_bucket_size of 5e7 in the --ds_file", staged(one, reduce_bucket=5e7)))
    offload = {"stage": max(2, zero.stage), "offload_optimizer": True}
    changes.append((f"{words} and --ds_file ds_zero2_offload.json", staged(one, **offload)))
    for gpus in (run.gpus, 2, 4, 8):
        if gpus >= run.gpus:
            more = f" on {gpus} GPUs" if gpus > run.gpus else ""
            changes.append((f"{words} and --ds_file ds_zero3_no_offload.json{more}", staged(replace(one, gpus=gpus), stage=3)))
            changes.append((f"{words} and --ds_file ds_zero3_offload.json{more}",
                            staged(replace(one, gpus=gpus), stage=3, offload_optimizer=True, offload_param=True)))  # fmt: skip
    if shorter := largest(one, "length", card, step=8):
        changes.append((f"{words} and --max_len {shorter}", replace(one, length=shorter)))
    for text, changed in changes:
        found = estimate(changed)
        if changed != run and found.needed <= card:
            return text + (f" ({sum(found.host.values()) / GIB:.0f} GB of host RAM)" if changed.zero and changed.zero.offload_optimizer else "")
    return "nothing on this card: take a larger one"


def read_zero(name: str, hidden: int) -> Zero:
    """From a DeepSpeed file, looked up and filled as train.py does."""
    path, ds = read_ds_file(name)
    try:
        zero = {k: v for k, v in fill_sizes(ds.get("zero_optimization", {"stage": 0}), hidden).items() if v != "auto"}
        sizes = {"reduce_bucket": "reduce_bucket_size", "prefetch": "stage3_prefetch_bucket_size", "live": "stage3_max_live_parameters"}
        return Zero(
            stage=int(zero.get("stage", 0)), overlap=zero.get("overlap_comm"), obeyed=not zero.keys() <= BETWEEN_RANKS,
            **{f"offload_{k}": (zero.get(f"offload_{k}") or {}).get("device", "none") not in ("none", "auto") for k in ("optimizer", "param")},
            **{field: float(zero[key]) for field, key in sizes.items() if zero.get(key) is not None},
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"--ds_file: {path} is no DeepSpeed configuration") from None


# train.py's flags that an estimate depends on.
FLAGS = (
    "train_type", "max_len", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "precision",
    "ds_file", "lora_dim", "lora_dropout", "lora_module_name", "freeze_module_name", "pre_seq_len", "prefix_projection", "ptuning_version",
)  # fmt: skip
METHOD_TITLES = {"lora": "LoRA", "freeze": "freeze", "ptuning": "P-Tuning", "all": "full"}


def make_run(config: TrainConfig, *, mode: str = "ours", gpus: int = 1, card: str = "A40", **more) -> Run:
    """The run that train.py's flags describe; raises ValueError for what does not fit the model."""
    if unknown := [name for name in ("quantization_bit", "use_dora", "gradient_checkpointing_layers") if getattr(config, name)]:
        raise ValueError(f"the estimate does not know --{unknown[0]}: leave it out to see the run without it")
    shape = read_shape(config.model_name_or_path)
    modules = tuple(module_names(config.lora_module_name))
    if modules == ("all-linear",):
        modules = tuple(name.rsplit(".", 1)[-1] for name in shape.linears)
    precision, checkpointing = config.precision, str(config.gradient_checkpointing)
    if precision == "auto":  # what train.py finds on such a card; the seeds trained in fp16
        precision = "fp16" if mode == "plain" or card.startswith(("V100", "T4")) else "bf16"
    run = Run(
        shape, config.train_type, mode, batch=config.per_device_train_batch_size, length=config.max_len,
        checkpointing=checkpointing != "False", selective=checkpointing == "selective", precision=precision, gpus=gpus, zero=read_zero(config.ds_file, shape.hidden),
        accumulation=config.gradient_accumulation_steps, lora_dim=config.lora_dim, lora_modules=modules,
        lora_dropout=config.lora_dropout, freeze_names=tuple(module_names(config.freeze_module_name)), pre_seq_len=config.pre_seq_len,
        projection=config.prefix_projection, version=config.resolved_ptuning_version, **more,
    )  # fmt: skip
    run.trained  # noqa: B018  a name that matches nothing is an error now
    return run


def local_card() -> tuple[str, float] | None:
    """Name and bytes of this machine's first GPU, asked of nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        name, mib = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mib) * MIB
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def report(run: Run, card: str, size: float) -> dict:
    """Everything that is printed, in bytes."""
    found = estimate(run)
    fits = found.needed <= size
    return {
        "run": {k: v for k, v in dataclasses.asdict(run).items() if k != "shape"} | {"trained_parameters": sum(run.trained.values())},
        "parts": found.parts, "total": found.total, "needed": found.needed, "host": found.host, "card": {"name": card, "bytes": size},
        "fits": fits, "largest_batch": largest(run, "batch", size), "longest_length": largest(run, "length", size),
        "cheapest_change": None if fits else cheapest_change(run, size),
    }  # fmt: skip


def show(model: str, run: Run, found: dict):
    zero = f"ZeRO-{run.zero.stage}" + (", offload" if run.zero.offload_optimizer else "")
    print(
        f"{model}, {run.train_type}, {run.mode}, {run.precision}, {zero}, {run.gpus} GPU(s), {run.batch} row(s) of {run.length} tokens, "
        f"gradient checkpointing {('selective' if run.selective else 'on') if run.checkpointing else 'off'}; {found['run']['trained_parameters']:,} parameters trained; {shape_source(model)}\n"
    )
    for title, parts, total in (("per GPU", found["parts"], "peak"), ("host RAM, all processes", found["host"], "total")):
        print(f"{title:<28}{'GB':>8}")
        for name, size in (*parts.items(), (total, sum(parts.values()))):
            print(f"  {name:<26}{size / GIB:8.2f}")
    card, size = found["card"]["name"], found["card"]["bytes"] / GIB
    if found["fits"]:
        print(f"\nfits: {found['needed'] / GIB:.1f} GB of the {card}'s {size:.1f}")
    else:
        print(f"\ndoes not fit: {found['needed'] / GIB:.1f} GB, and the {card} has {size:.1f}\ncheapest change that fits: {found['cheapest_change']}")
    for name, value, other in (("batch", found["largest_batch"], f"{run.length} tokens"), ("length", found["longest_length"], f"batch {run.batch}")):
        shown = "none fits" if value == 0 else f"over {LIMIT // 2}" if value >= LIMIT // 2 else value
        print(f"{'largest batch' if name == 'batch' else 'longest row'} at {other}: {shown}")
    if run.ours:
        print(f"(rows packed, {100 * run.label_share:.0f} % of the tokens labelled; the formula's error on published rows: --compare_seeds)")


def estimate_run(config: TrainConfig) -> int:
    """train.py --estimate_memory: for this machine's GPU, else for an A40, and the launcher's number of ranks."""
    card, size = local_card() or ("A40", CARDS["A40"] * MIB)
    try:
        run = make_run(config, gpus=int(os.environ.get("WORLD_SIZE", 1)), card=card)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", 0)) == 0:
        show(config.model_name_or_path, run, report(run, card, size))
    return 0


def print_table(card: str, size: float) -> dict:
    """What each method needs of one GPU at 1560 tokens, batch 1, and the longest row on the card."""
    print(f"| model | method | GPUs | needed at 1560 tokens, GB | with checkpointing | longest row on {card} | with checkpointing |\n|---|---|---|---|---|---|---|")
    rows = []
    for model in PUBLISHED:
        for method, ds_file, gpus in (("lora", "ds_zero2.json", 1), ("ptuning", "ds_zero2.json", 1), ("freeze", "ds_zero2.json", 1),
                                      ("all", "ds_zero3_no_offload.json", 4), ("all", "ds_zero3_offload.json", 4)):  # fmt: skip
            config = TrainConfig(model_name_or_path=model, train_path="-", train_type=method, max_len=1560, per_device_train_batch_size=1, ds_file=ds_file)
            runs = [replace(make_run(config, gpus=gpus), checkpointing=on) for on in (False, True)]
            need = [estimate(run).needed / GIB for run in runs]
            longest = [largest(run, "length", size, step=8) for run in runs]
            title = METHOD_TITLES[method] + (", offload" if runs[0].zero.offload_optimizer else "")
            print(f"| {model} | {title} | {gpus} | {need[0]:.1f} | {need[1]:.1f} | {longest[0] or 'none'} | {longest[1] or 'none'} |")
            rows.append({"model": model, "method": title, "gpus": gpus, "needed_gib": need, "longest": longest})
    return {"card": card, "rows": rows}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.memory", description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help=f"a folder with config.json, or {', '.join(PUBLISHED)}")
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name in FLAGS:
        add_flag(parser, fields[name])
    parser.add_argument("--mode", choices=("ours", "plain"), default="ours", help="this project's loop, or the seeds' (padded rows, full logits) [ours]")
    parser.add_argument("--gpus", type=int, default=1, metavar="INT", help="GPUs in all [1]")
    parser.add_argument("--gpu", choices=tuple(CARDS), default="A40", help="the card [A40]")
    parser.add_argument("--label_share", type=float, default=0.25, metavar="FLOAT", help="share of the tokens that carry loss [0.25]")
    parser.add_argument("--real_tokens", type=int, metavar="INT", help="real tokens of a step's rows on one GPU [batch x max_len]")
    parser.add_argument("--compare_seeds", action="store_true", help="the published rows against the formula")
    parser.add_argument("--fit", action="store_true", help="with --compare_seeds: fit the constants anew")
    parser.add_argument("--table", action="store_true", help="what each method needs, for the published models")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser


def check_flags(parser: argparse.ArgumentParser, args: dict):
    """Leave by `parser.error` where a flag has no effect beside the others."""
    check_given(parser, argparse.Namespace(**args), ESTIMATING | dict.fromkeys(FLAGS, ONE_RUN))
    given = {name: args[name] for name in FLAGS if name in args}
    try:
        config = TrainConfig(model_name_or_path=args["model"] or "-", train_path="-", max_src_len=1, **given)
        refuse_without_effect(config, changed_flags(TrainConfig, given), TRAINING)
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    check_flags(parser, args)
    card, size = args["gpu"], CARDS[args["gpu"]] * MIB
    if args["json"] and not Path(args["json"]).parent.is_dir():
        parser.error(f"--json: no such folder: {Path(args['json']).parent}")
    try:
        if args["fit"] and not args["compare_seeds"]:
            raise ValueError("--fit needs --compare_seeds")
        if args["compare_seeds"]:
            from finetune.memory_formula import Constants
            from finetune.memory_seeds import a40_rows, compare, fit, print_report

            figures = compare(fit(a40_rows()) if args["fit"] else Constants())
            print_report(figures)
        elif args["table"]:
            figures = print_table(card, size)
        else:
            if not args["model"]:
                raise ValueError("--model is required: a folder with config.json or a published name")
            given = {name: args[name] for name in FLAGS if name in args}
            config = TrainConfig(model_name_or_path=args["model"], train_path="-", max_src_len=1, **given)
            run = make_run(
                config, mode=args["mode"], gpus=args["gpus"], card=card, label_share=args["label_share"], real_tokens=args["real_tokens"]
            )
            figures = report(run, card, size)
            show(args["model"], run, figures)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args["json"]:
        write_json(args["json"], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
