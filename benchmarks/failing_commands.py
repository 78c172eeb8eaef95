"""The commands of README, each with flags that work and its files; and what they work on."""

import json
import random
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.forking import run_forked

JSON_ROWS = ("folder", "empty", "denied")


@dataclass(frozen=True)
class Command:
    """A command line that works in the folder of `make_world`.

    Attributes:
        name: as in README. module: whose `main` it is. prog: how its error begins.
        reads: {path of a file or folder: its flag}. writes: the same; a folder ends in "/".
        fine: {path: kinds of fault that do no harm}.
        keeps: parts of paths that a failed run may leave or change.
    """

    name: str
    module: str
    prog: str
    flags: str
    reads: dict[str, str] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    fine: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keeps: tuple[str, ...] = (".cache",)
    stop_at: str = ""

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.flags)


def model_files(folder: str, flag: str) -> dict[str, str]:
    names = ("", "/config.json", "/model.safetensors", "/tokenizer.model", "/tokenizer_config.json")
    return {f"{folder}{name}": flag for name in names}


def adapter_files(folder: str, flag: str) -> dict[str, str]:
    names = ("", "/adapter_config.json", "/adapter_model.safetensors", "/manifest.json")
    return {f"{folder}{name}": flag for name in names}


def predictor_files(folder: str, flag: str) -> dict[str, str]:
    names = ("", "/predictor.json", "/kernel.safetensors", "/lexical.safetensors")
    return {f"{folder}{name}": flag for name in names}


TRAIN = (
    "--model_name_or_path model --train_path rows.json --eval_path eval.json --output_dir out "
    "--max_len 96 --max_src_len 64 --max_steps 2 --per_device_train_batch_size 4 --data_cache cache"
)
COMMANDS = [
    Command(
        "train.py", "train", "train.py", f"{TRAIN} --ds_file ds.json --config run.yaml",
        reads={**model_files("model", "--model_name_or_path"), "rows.json": "--train_path",
               "eval.json": "--eval_path", "ds.json": "--ds_file", "run.yaml": "--config"},
        writes={"out": "--output_dir"},
        keeps=("out/", "out", "cache", "taken", "disk"),
    ),
]  # fmt: skip


def make_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    parts, states = ("水泵", "油封", "火花塞", "滤网"), ("漏油", "抖动", "异响", "积碳")
    facts = [[(draw.choice(parts), draw.choice(states)) for _ in range(3)] for _ in range(count)]
    return [
        {
            "instruction": "抽取：",
            "input": "，".join(part + state for part, state in row),
            "output": "\n".join(f"{part}_{state}" for part, state in row),
        }
        for row in facts
    ]


def make_lengths(count: int) -> list[dict]:
    draw = random.Random(3)
    kinds = {"name": 4, "list": 12, "explain": 40, "essay": 120}
    rows = []
    for i in range(count):
        kind = draw.choice(list(kinds))
        tokens = round(kinds[kind] * draw.uniform(0.7, 1.4))
        words = draw.choices(("river", "lamp", "train", "winter", "garden"), k=4)
        row = {"prompt": f"{kind} {' '.join(words)} {i}", "output_tokens": tokens}
        rows.append(row | {"finished": True, "served_model": "model"})
    return rows


def write_lines(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_world(world: Path):
    """A model, an adapter, a predictor, rows and the other files that COMMANDS name."""
    world.mkdir()

    def do(module: str, flags: str):
        done = run_forked(module, shlex.split(flags), world)
        if done.code:
            raise ValueError(f"{module} {flags}: exit code {done.code}\n{done.out}\n{done.err}")

    write_lines(world / "rows.json", make_rows(12, 1))
    write_lines(world / "eval.json", make_rows(4, 2))
    write_lines(world / "lengths.jsonl", make_lengths(80))
    write_lines(world / "log.jsonl", make_lengths(80))
    do("scripts.prepare_tokenizer", "--input rows.json --output_dir tokenizer --vocab_size 330")
    do("scripts.prepare_small_model", "--tokenizer tokenizer --output_dir model --hidden_size 32 "
       "--num_layers 2 --heads 2 --groups 2 --ffn 48 --length 256")  # fmt: skip
    shutil.copyfile(Path(__file__).parents[1] / "ds_configs" / "ds_zero2.json", world / "ds.json")
    (world / "run.yaml").write_text("seed: 7\n")
    do("train", TRAIN)
    (world / "out").rename(world / "run")
    (adapter,) = (world / "run").glob("epoch-*")
    shutil.copytree(adapter, world / "adapter")
    do("train", "--task predictor --train_path lengths.jsonl --served_model model --hash_bits 8 "
       "--landmarks 20 --length_limit 256 --output_dir predictor")  # fmt: skip
