"""Memory and time of a run's rows: bytes a token over all ranks, seconds of a start, how often
rows are tokenised.

    python benchmarks/data_memory.py [--tokens 10000000,50000000] [--ranks 1,2] [--json FILE]
    python benchmarks/data_memory.py --kind conversations
    python benchmarks/data_memory.py --batches

Rows are drawn at random. Each rank loads them as train.py does and lays out the batches of a whole
epoch, without a model. Memory is the proportional set size (Pss of /proc/self/smaps_rollup) above
that of the process before it loads, summed over the ranks: a page that ranks share counts once.
Seconds are those of the slowest rank, from the files to the rows. Exits with 1 where a goal is
missed: every row tokenised once with a cold cache or none and never with a warm one; at most 6
bytes a token, of corpora of 40 million tokens or more, beside which what a process costs anyway is
little; a warm start under 2 s, of 11 million tokens or less.
"""

import argparse
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import write_rows  # noqa: E402

if TYPE_CHECKING:
    from finetune.rows.arrays import Dataset
    from finetune.task import FineTuning

BYTES_A_TOKEN, FROM_TOKENS = 6.0, 40_000_000
WARM_SECONDS, TO_TOKENS = 2.0, 11_000_000
BATCH = 16
PARTS = ["水泵", "油封", "火花塞", "节气门", "滤网", "发动机", "轮胎", "灯泡"]
STATES = ["漏油", "抖动", "异响", "积碳", "松动", "不亮", "过热"]
FLAGS = [
    "--max_len",
    "1024",
    "--max_src_len",
    "512",
    "--lora_dropout",
    "0",
    "--per_device_train_batch_size",
    str(BATCH),
]


# ---- a rank


def proportional_memory() -> int:
    """Bytes; pages that processes share count in part."""
    gc.collect()
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Pss in /proc/self/smaps_rollup: the kernel is older than 4.14")


def count_encodings() -> list[int]:
    """Count the rows that this process tokenises from now on; returns [count], which grows."""
    from finetune.rows.encoding import RowEncoder

    count, encode = [0], RowEncoder.encode

    def counted(*args):
        count[0] += 1
        return encode(*args)

    RowEncoder.encode = counted
    return count


def lay_out_epoch(task: "FineTuning") -> None:
    """Lay out this rank's batches of an epoch."""
    from finetune.distributed import rank, world_size
    from finetune.rows.batches import step_rows

    size = BATCH * world_size()
    steps = -(-len(task.data) // size)
    for step in range(steps):
        data, order, place = task.rows_of_step(0, step, steps, size)
        (rows,) = step_rows(
            order,
            place,
            data.row_lengths,
            micro=BATCH,
            accumulation=1,
            rank=rank(),
            world=world_size(),
        )
        task.collate(data, rows)


def run_rank(words: list[str]) -> None:
    """Load rows, lay out an epoch, print what it took."""
    import torch.distributed as dist

    from finetune.config import parse_config
    from finetune.distributed import wait_for_all
    from finetune.task import FineTuning

    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    task = FineTuning(parse_config(words))
    tokenised = count_encodings()
    task.layout  # noqa: B018 - made here, as it is no part of the rows
    wait_for_all()
    before, started = proportional_memory(), time.perf_counter()
    task.load_rows()
    seconds = time.perf_counter() - started
    lay_out_epoch(task)
    wait_for_all()
    memory = proportional_memory() - before
    wait_for_all()  # all have measured before one lets go
    figures = {
        "rows": len(task.data),
        "tokens": int(task.data.row_lengths.sum()),
        "bytes": memory,
        "seconds": seconds,
        "tokenised": tokenised[0],
    }
    print(json.dumps(figures))


def run_ranks(count: int, words: list[str]) -> dict:
    """The figures of the ranks of one start, summed up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = []
    for number in range(count):
        ranks.append(
            subprocess.Popen(
                [sys.executable, __file__, "--rank", *words],
                stdout=subprocess.PIPE,
                text=True,
                env=env | {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            )
        )
    printed = [rank.communicate()[0] for rank in ranks]
    found = []
    for rank, text in zip(ranks, printed):
        if rank.returncode:
            sys.exit("a rank failed")
        found.append(json.loads(text.splitlines()[-1]))
    return together(count, found)


def together(count: int, found: list[dict]) -> dict:
    """A line of the table, from the figures of each rank."""
    first = found[0]
    return {
        "ranks": count,
        "tokens": first["tokens"],
        "bytes_a_token": sum(rank["bytes"] for rank in found) / first["tokens"],
        "seconds": max(rank["seconds"] for rank in found),
        "times_tokenised": sum(rank["tokenised"] for rank in found) / first["rows"],
    }


# ---- the corpus


def make_row(draw: random.Random, kind: str) -> dict:
    def sentence() -> str:
        clauses = []
        for _ in range(draw.randint(4, 40)):
            clauses.append(draw.choice(PARTS) + draw.choice(STATES))
        return "，".join(clauses)

    if kind == "rows":
        return {
            "instruction": f"抽取{draw.randint(0, 10**6)}：",
            "input": sentence(),
            "output": sentence(),
        }
    speakers = ("user", "assistant") * draw.randint(2, 3)
    return {"messages": [{"role": role, "content": sentence()} for role in speakers]}


def prepare_model(folder: Path) -> Path:
    """A tiny ChatGLM2 whose tokenizer knows the corpus."""
    from scripts.prepare_small_model import make_model
    from scripts.prepare_tokenizer import main as make_tokenizer

    rows = (make_row(random.Random(seed), "rows") for seed in range(200))
    write_rows(folder / "sample.jsonl", rows)
    arguments = [
        "--input",
        str(folder / "sample.jsonl"),
        "--output_dir",
        str(folder / "tokenizer"),
        "--vocab_size",
        "420",
    ]
    if make_tokenizer(arguments):
        sys.exit("the tokenizer could not be made")
    return make_model(
        "glm2",
        folder / "tokenizer",
        folder / "model",
        hidden_size=64,
        num_layers=1,
        heads=4,
        ffn=64,
    )


def make_corpus(path: Path, model: Path, tokens: int, kind: str) -> Path:
    """JSON lines of about so many tokens."""
    from chatglm import load_tokenizer
    from chatglm.families import FAMILIES
    from finetune.rows.encoding import encode_rows
    from finetune.rows.formats import parse_row

    draw = random.Random(1)
    sample = [parse_row(make_row(draw, kind), "sample") for _ in range(300)]
    data = encode_rows(
        sample, load_tokenizer(str(model)), FAMILIES["glm2"], max_len=1024, max_src_len=512
    )
    count = max(1, round(tokens / data.row_lengths.mean()))
    return write_rows(path, (make_row(draw, kind) for _ in range(count)))


# ---- the table


def flags_of(folder: Path, model: Path, corpus: Path) -> list[str]:
    return [
        "--model_name_or_path",
        str(model),
        "--train_path",
        str(corpus),
        "--output_dir",
        str(folder / "out"),
        *FLAGS,
    ]


def measure(folder: Path, model: Path, tokens: int, ranks: list[int], kind: str) -> list[dict]:
    """Cold, warm and without a cache, for each number of ranks."""
    corpus = make_corpus(folder / f"{tokens}.jsonl", model, tokens, kind)
    words, found = flags_of(folder, model, corpus), []
    for count in ranks:
        cache = folder / f"cache-{tokens}-{count}"
        for state, where in (("cold", cache), ("warm", cache), ("off", "")):
            found.append({"cache": state} | run_ranks(count, [*words, "--data_cache", str(where)]))
            print_line(found[-1])
    return found


def timed_data() -> dict[str, "Dataset"]:
    """128 random rows of 60 to 400 tokens with one answer, 128 of 630 with several."""
    import numpy as np

    from chatglm.conversations import IGNORED
    from finetune.rows.arrays import EncodedRow, dataset_of

    draw = np.random.default_rng(0)
    begin = [7] * 30
    plain = []
    for length in draw.integers(60, 400, 128).tolist():
        ids = begin + draw.integers(8, 60_000, length).tolist()
        plain.append(("", EncodedRow(ids, length // 2, False)))
    talks = []
    for _ in range(128):
        ids = begin + draw.integers(8, 60_000, 600).tolist()
        labels = np.array(ids)
        labels[:90] = IGNORED
        places = np.arange(len(ids) - 90)
        labels[90:][places // 50 % 2 == 0] = IGNORED
        talks.append(("", EncodedRow(ids, 140, False, labels.tolist())))
    return {"single answers": dataset_of(plain), "several answers": dataset_of(talks)}


def batch_times(repetitions: int = 7) -> dict[str, float]:
    """{rows and layout: ms that 16 rows take to be laid out, the best of some repetitions}."""
    from finetune.rows.batches import collate

    layouts: dict[str, dict[str, Any]] = {
        "ragged": {},
        "ragged, shared beginning": {"share": True, "multiple": 64},
        "padded": {"ragged": False},
    }
    found = {}
    for kind, rows in timed_data().items():
        for layout, options in layouts.items():
            times = []
            for _ in range(repetitions):
                started = time.perf_counter()
                for first in range(0, 128, BATCH):
                    collate(rows, list(range(first, first + BATCH)), **options)
                times.append((time.perf_counter() - started) / (128 / BATCH) * 1000)
            found[f"{kind}, {layout}"] = min(times)
    return found


def print_line(row: dict) -> None:
    print(
        f"{row['ranks']:5} {row['cache']:>5} {row['tokens']:>12,} {row['bytes_a_token']:>14.2f} "
        f"{row['seconds']:>9.2f} {row['times_tokenised']:>10.2f}",
        flush=True,
    )


def missed(row: dict) -> list[str]:
    """The goals that a line of the table does not reach."""
    goals = []
    warm = row["cache"] == "warm"
    if row["tokens"] >= FROM_TOKENS and row["bytes_a_token"] > BYTES_A_TOKEN:
        goals.append(f"more than {BYTES_A_TOKEN:g} bytes a token")
    if warm and row["tokens"] <= TO_TOKENS and row["seconds"] > WARM_SECONDS:
        goals.append(f"a warm start takes more than {WARM_SECONDS:g} s")
    if row["times_tokenised"] != (0 if warm else 1):
        goals.append(f"rows are tokenised {row['times_tokenised']:g} times")
    place = f"{row['ranks']} rank(s), cache {row['cache']}, {row['tokens']:,} tokens"
    return [f"{place}: {goal}" for goal in goals]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        default="10000000,50000000",
        help="comma list: tokens of each corpus [10000000,50000000]",
    )
    parser.add_argument("--ranks", default="1,2", help="comma list [1,2]")
    parser.add_argument(
        "--kind",
        choices=("rows", "conversations"),
        default="rows",
        help="conversations: labels of several answers [rows]",
    )
    parser.add_argument("--json", metavar="FILE", help="where the figures also go")
    parser.add_argument(
        "--batches", action="store_true", help="time the laying out of batches instead"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.batches:
        for name, ms in batch_times().items():
            print(f"{ms:8.3f} ms  {name}")
        return 0
    ranks = list(map(int, args.ranks.split(",")))
    found: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = prepare_model(folder)
        print("ranks cache       tokens  bytes a token   seconds  tokenised", flush=True)
        for tokens in map(int, args.tokens.split(",")):
            found += measure(folder, model, tokens, ranks, args.kind)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    goals = []
    for row in found:
        goals += missed(row)
    print("\n".join(goals) or "every goal is reached")
    return 1 if goals else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(sys.argv[2:])
    else:
        sys.exit(main())
