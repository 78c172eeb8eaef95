"""Families x methods x ZeRO configurations x ranks, each trained for a few real steps.

    python benchmarks/method_matrix.py [--json FILE] [--families glm2] [--methods lora,all]
        [--precision bf16]

Checks that the loss falls, and that 2 ranks give the losses of 1 rank at the same global batch
(dropout 0). Under ZeRO-3 every weight is partitioned.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import read_lines  # noqa: E402

METHODS = {
    "lora": ["--train_type", "lora", "--lora_dropout", "0"],
    "freeze": ["--train_type", "freeze", "--freeze_module_name", "layers.1."],
    "ptuning-v1": ["--train_type", "ptuning", "--ptuning_version", "v1", "--pre_seq_len", "8"],
    "ptuning-v2": [
        "--train_type",
        "ptuning",
        "--ptuning_version",
        "v2",
        "--prefix_projection",
        "False",
        "--pre_seq_len",
        "8",
        "--prefix_dropout",
        "0",
    ],
    "ptuning-v2-mlp": [
        "--train_type",
        "ptuning",
        "--prefix_projection",
        "True",
        "--pre_seq_len",
        "8",
        "--prefix_dropout",
        "0",
    ],
    "all": ["--train_type", "all"],
}
RATES = {
    "lora": "1e-2",
    "freeze": "5e-3",
    "ptuning-v1": "1e-1",
    "ptuning-v2": "1e-1",
    "ptuning-v2-mlp": "1e-2",
    "all": "3e-3",
}
ZERO = ("ds_zero2.json", "ds_zero3_no_offload.json", "ds_zero3_offload.json")
GLOBAL_BATCH, STEPS = 8, 8


def make_models(folder: Path, families: list[str]) -> None:
    """Write tiny models of the families, tokenizers made from the sample data, and the ZeRO files.

    ZeRO-3 leaves weights below 100,000 elements whole; a tiny model has no others, so the
    threshold is 0 here.
    """
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    for name in ZERO:
        ds = json.loads((ROOT / "ds_configs" / name).read_text())
        if ds["zero_optimization"]["stage"] == 3:
            ds["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / name).write_text(json.dumps(ds))
    for family in families:
        tokenizer = folder / f"tokenizer-{family}"
        flags = ["--input", str(ROOT / "data" / "spo_train.json"), "--output_dir", str(tokenizer)]
        code = make_tokenizer([*flags, "--vocab_size", "800", "--family", family])
        assert code == 0
        make_model(
            family, tokenizer, folder / family, hidden_size=64, num_layers=2, heads=4, ffn=128
        )


def worker(folder: Path, cases: list[list[str]], precision: str) -> None:
    """Train every case in this process (one of the ranks) and let rank 0 write the losses."""
    from finetune.config import parse_config
    from finetune.distributed import rank, world_size
    from finetune.engine import train

    for family, method, zero in cases:
        world = int(os.environ.get("WORLD_SIZE", 1))
        out = folder / f"out-{family}-{method}-{zero.removesuffix('.json')}-{world}"
        flags = [
            *("--model_name_or_path", str(folder / family), "--mode", family),
            *("--train_path", str(ROOT / "data" / "spo_train.json"), "--output_dir", str(out)),
            *("--dataset_length", str(GLOBAL_BATCH * 2), "--num_train_epochs", str(STEPS // 2)),
            *("--max_len", "160", "--max_src_len", "120", "--show_loss_step", "1000"),
            *("--per_device_train_batch_size", str(GLOBAL_BATCH // world)),
            *("--learning_rate", RATES[method], "--warmup_ratio", "0"),
            *("--ds_file", str(folder / zero), "--precision", precision),
            *("--save_total_limit", "1"),
        ]
        train(parse_config(flags + METHODS[method]))
        if rank() == 0:
            losses = [line["train_loss"] for line in read_lines(out / "metrics.jsonl")]
            (folder / f"{out.name}.json").write_text(
                json.dumps({"losses": losses, "world": world_size()})
            )


def launch(folder: Path, world: int, cases: list, precision: str) -> None:
    """Run the worker on `world` ranks, through DeepSpeed's launcher for more than one."""
    (folder / "cases.json").write_text(json.dumps(cases))
    script = [str(Path(__file__).resolve()), "--worker", str(folder), "--precision", precision]
    starter = (
        [sys.executable]
        if world == 1
        else [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_accelerators",
            str(world),
            "--master_port",
            "29520",
        ]
    )
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(starter + script, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{world} rank(s) failed:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default="glm,glm2,glm3")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--zero", default=",".join(ZERO))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def losses_of(folder: Path, family: str, method: str, file: str, ranks: int) -> list[float]:
    """The losses that rank 0 of a case wrote."""
    name = f"out-{family}-{method}-{file.removesuffix('.json')}-{ranks}.json"
    return json.loads((folder / name).read_text())["losses"]


def compare(folder: Path, case: list[str], precision: str) -> dict:
    """A line of the table: the losses of 1 rank against those of 2."""
    family, method, file = case
    one = losses_of(folder, family, method, file, 1)
    two = losses_of(folder, family, method, file, 2)
    apart = max(abs(a - b) / a for a, b in zip(one, two))
    falls = one[-1] < one[0] and two[-1] < two[0]
    return {
        "family": family,
        "method": method,
        "ds_file": file,
        "first_loss": one[0],
        "last_loss": one[-1],
        "max_relative_difference_2_ranks": apart,
        "ok": falls and apart < (1e-4 if precision == "fp32" else 0.05),
    }


def print_table(rows: list[dict]) -> None:
    print(
        "| family | method | DeepSpeed file | first loss | last loss "
        "| 1 against 2 ranks, largest relative difference | |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['family']} | {r['method']} | {r['ds_file']} "
            f"| {r['first_loss']:.4f} | {r['last_loss']:.4f} | "
            f"{r['max_relative_difference_2_ranks']:.1e} | {'ok' if r['ok'] else 'FAILED'} |"
        )


def main() -> int:
    args = build_parser().parse_args()
    if args.worker:
        folder = Path(args.worker)
        worker(folder, json.loads((folder / "cases.json").read_text()), args.precision)
        return 0
    families = args.families.split(",")
    methods = args.methods.split(",")
    zero = args.zero.split(",")
    cases = list(map(list, itertools.product(families, methods, zero)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, families)
        for world in (1, 2):
            launch(folder, world, cases, args.precision)
        rows = [compare(folder, case, args.precision) for case in cases]
    print(f"precision {args.precision}, global batch {GLOBAL_BATCH}, {STEPS} steps\n")
    print_table(rows)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"precision": args.precision, "rows": rows}, indent=2) + "\n"
        )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
