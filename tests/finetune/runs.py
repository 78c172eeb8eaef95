"""What the tests of training share: rows that need no sample data, methods, and the launchers."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from tests.warm import warm_python

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["水泵", "油封", "火花塞", "节气门", "滤网", "发动机", "轮胎", "灯泡"]
STATES = ["漏油", "抖动", "异响", "积碳", "松动", "不亮", "过热"]
METHODS = {
    "lora": ["--train_type", "lora", "--lora_dropout", "0"],
    "freeze": ["--train_type", "freeze", "--freeze_module_name", "layers.1."],
    "ptuning-v1": ["--train_type", "ptuning", "--prefix_projection", "False", "--pre_seq_len", "4"],
    "ptuning-v2": [
        "--train_type",
        "ptuning",
        "--ptuning_version",
        "v2",
        "--prefix_projection",
        "False",
        "--pre_seq_len",
        "4",
        "--prefix_dropout",
        "0",
    ],
    "ptuning-v2-mlp": ["--train_type", "ptuning", "--pre_seq_len", "4", "--prefix_dropout", "0"],
    "all": ["--train_type", "all"],
}
TWO_RANKS = [  # what is run on 2 ranks: launcher, family, method, ZeRO file
    ("deepspeed", "glm2", "lora", "ds_zero2.json"),
    ("deepspeed", "glm2", "all", "ds_zero3_no_offload.json"),
    ("deepspeed", "glm3", "ptuning-v2", "ds_zero3_offload.json"),
    ("deepspeed", "glm", "freeze", "ds_zero2_offload.json"),
    ("torchrun", "glm", "lora", "ds_zero3_no_offload.json"),
]
# The loss falls at every step, soon by less than this in three.
STOPS = [
    "--num_train_epochs",
    6,
    "--eval_step",
    1,
    "--early_stopping_patience",
    3,
    "--early_stopping_min_delta",
    "0.5",
]


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of unlike lengths: 1 to 4 triples."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        facts = [(draw.choice(PARTS), draw.choice(STATES)) for _ in range(draw.randint(1, 4))]
        rows.append(
            {
                "instruction": "抽取三元组：",
                "input": "，".join(a + b for a, b in facts) + "。",
                "output": "\n".join(f"{a}_性能故障_{b}" for a, b in facts),
            }
        )
    return rows


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def rows_of(data) -> list[tuple[str, list[int], int, list[int] | None]]:
    """(place, ids, how many are masked, labels of its own) of every row of a Dataset."""
    labels = [data.labels(row) for row in range(len(data))]
    return [
        (
            data.place(row),
            data.ids(row).tolist(),
            data.n_masked(row),
            None if own is None else own.tolist(),
        )
        for row, own in enumerate(labels)
    ]


def child_env(**extra) -> dict[str, str]:
    """A command line's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return (
        os.environ
        | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        | extra
    )


def command(
    *words, ok: bool | None = True, timeout: float = 300, warm: bool = True, **options
) -> subprocess.CompletedProcess:
    """Run python with `words`. `ok`: must succeed, must fail, or None for either.

    `warm`: as a fork of a process with the libraries (tests.warm).
    """
    done = subprocess.run(
        [warm_python() if warm else sys.executable, *map(str, words)],
        cwd=options.pop("cwd", ROOT),
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
    if ok is not None:
        assert (done.returncode == 0) == ok, (
            f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    launcher: str, script: str, *words, ranks: int = 2, **options
) -> subprocess.CompletedProcess:
    """A script on several ranks, under "deepspeed" or "torchrun"; `options` are command's."""
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", ranks],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", ranks],
    }
    return command(*start[launcher], "--master_port", free_port(), script, *words, **options)


def metrics(output_dir: Path, key: str = "train_loss") -> list[float]:
    """One number of every step, as metrics.jsonl has it."""
    lines = [
        json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [line[key] for line in lines if key in line]


def fill_disk(folder: Path):
    """Write a file `filler` until the disk of `folder` is full."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
