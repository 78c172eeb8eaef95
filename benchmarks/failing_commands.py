"""The commands of README, each with flags that work and its files; and what they work on."""

import gzip
import json
import random
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.forking import run_forked
from benchmarks.rows import write_rows

ROOT = Path(__file__).resolve().parents[1]


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


def prefixed(folder: str, flag: str, *names: str) -> dict[str, str]:
    """The folder itself and files of it."""
    return {folder: flag} | {f"{folder}/{name}": flag for name in names}


def model_files(folder: str, flag: str) -> dict[str, str]:
    weights, pieces = "model.safetensors", "tokenizer.model"
    return prefixed(folder, flag, "config.json", weights, pieces, "tokenizer_config.json")


def adapter_files(folder: str, flag: str) -> dict[str, str]:
    weights = "adapter_model.safetensors"
    return prefixed(folder, flag, "adapter_config.json", weights, "manifest.json")


def predictor_files(folder: str, flag: str) -> dict[str, str]:
    names = ("predictor.json", "kernel.safetensors", "lexical.safetensors")
    return prefixed(folder, flag, *names)


TRAIN = (
    "--model_name_or_path model --train_path rows.json --eval_path eval.json --output_dir out "
    "--max_len 96 --max_src_len 64 --max_steps 2 --per_device_train_batch_size 4 --data_cache cache"
)
STEPS = f"{TRAIN} --save_model_step 1"
LENGTHS = (
    "--task predictor --train_path lengths.jsonl --served_model model --hash_bits 8 --landmarks 20 "
    "--length_limit 256 --output_dir lengths_out"
)
SERVE = (
    "--model model --predictor predictor --device cpu --profile profile.json --log served.jsonl "
    "--port 0 --drain_s 1"
)
SIMULATE = "--requests 20 --seeds 1 --rate 2 --policies fifo,fcfs --traces traces"
ANY = ("*",)
# What may be missing; a folder in a file's place is taken for a missing file.
OPTIONAL = ("missing", "folder")
NO_CONFIG = {"model/tokenizer_config.json": OPTIONAL}
NO_MANIFEST = {"adapter/manifest.json": OPTIONAL}
COMMANDS = [
    Command(
        "train.py",
        "train",
        "train.py",
        f"{TRAIN} --ds_file ds.json --config run.yaml",
        reads={
            **model_files("model", "--model_name_or_path"),
            "rows.json": "--train_path",
            "eval.json": "--eval_path",
            "ds.json": "--ds_file",
            "run.yaml": "--config",
        },
        writes={"out/": "--output_dir"},
        fine={**NO_CONFIG, "run.yaml": ("empty", "null")},
        keeps=("out", "cache"),
    ),
    Command(
        "train.py --resume_from_checkpoint",
        "train",
        "train.py",
        f"{STEPS} --resume_from_checkpoint run/epoch-1-step-1".replace("_dir out", "_dir run"),
        reads=prefixed(
            "run/epoch-1-step-1",
            "--resume_from_checkpoint",
            "manifest.json",
            "adapter_model.safetensors",
            "adapter_config.json",
            "train_config.json",
            "trainer/state/mp_rank_00_model_states.pt",
            "trainer/state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        )
        | prefixed("run", "--output_dir", "run.json", "metrics.jsonl"),
        fine={
            "run": ("missing", "empty"),
            "run/run.json": ANY,
            "run/metrics.jsonl": ANY,
            "run/epoch-1-step-1/train_config.json": OPTIONAL,
        },
        keeps=("run", "cache"),
    ),
    Command(
        "train.py --task predictor",
        "train",
        "train.py",
        LENGTHS,
        reads={"lengths.jsonl": "--train_path"},
        writes={"lengths_out/": "--output_dir"},
        keeps=("lengths_out", ".cache"),
    ),
    Command(
        "merge_lora.py",
        "merge_lora",
        "merge_lora.py",
        "--ori_model_dir model --model_dir adapter --save_dir merged",
        reads=model_files("model", "--ori_model_dir") | adapter_files("adapter", "--model_dir"),
        writes={"merged/": "--save_dir"},
        fine=NO_CONFIG | NO_MANIFEST,
    ),
    Command(
        "finetune.predict",
        "finetune.predict",
        "finetune.predict",
        "--model_path model --file eval.json --output answers.jsonl --max_new_tokens 2",
        reads=model_files("model", "--model_path") | {"eval.json": "--file"},
        writes={"answers.jsonl": "--output"},
        fine=NO_CONFIG,
    ),
    Command(
        "finetune.predict --base_model",
        "finetune.predict",
        "finetune.predict",
        "--model_path adapter --base_model model --prompt 水泵 --max_new_tokens 2",
        reads=adapter_files("adapter", "--model_path")
        | model_files("model", "--base_model")
        | {"adapter/train_config.json": "--model_path"},
        fine=NO_CONFIG
        | NO_MANIFEST
        | {"adapter/train_config.json": OPTIONAL, "model/tokenizer.model": OPTIONAL},
    ),
    Command(
        "finetune.evaluate",
        "finetune.evaluate",
        "finetune.evaluate",
        "--model_path model --test_path eval.json --predictions answers.jsonl --output scores.json "
        "--max_new_tokens 2",
        reads=model_files("model", "--model_path") | {"eval.json": "--test_path"},
        writes={"answers.jsonl": "--predictions", "scores.json": "--output"},
        fine=NO_CONFIG,
        keeps=("answers.jsonl",),
    ),
    Command(
        "finetune.evaluate --predictions",
        "finetune.evaluate",
        "finetune.evaluate",
        "--model_path model --test_path eval.json --predictions predictions.jsonl "
        "--max_new_tokens 2",
        reads={".predictions.jsonl.partial": "--predictions"},
        fine={".predictions.jsonl.partial": ANY},
    ),
    Command(
        "finetune.evaluate --probe",
        "finetune.evaluate",
        "finetune.evaluate",
        "--model_path adapter --base_model model --probe eval.json --output probe_scores.json "
        "--max_new_tokens 2",
        reads={"eval.json": "--probe"},
        writes={"probe_scores.json": "--output"},
    ),
    Command(
        "finetune.memory",
        "finetune.memory",
        "finetune.memory",
        "--model model --ds_file ds.json --json memory.json",
        reads={"model": "--model", "model/config.json": "--model", "ds.json": "--ds_file"},
        writes={"memory.json": "--json"},
    ),
    Command(
        "finetune.report",
        "finetune.report",
        "finetune.report",
        "run seeds/seed-1 --output curves.png",
        reads=prefixed("run", "RUN_DIR", "run.json"),
        writes={"curves.png": "--output"},
    ),
    Command(
        "finetune.seeds",
        "finetune.seeds",
        "finetune.seeds",
        "seeds",
        reads={"seeds": "output_dir"}
        | prefixed(
            "seeds/seed-1",
            "output_dir",
            "run.json",
            "metrics.jsonl",
            "epoch-1-step-2/manifest.json",
        ),
        fine={"seeds/seed-1": ("missing",)},
    ),
    Command(
        "predictor.evaluate",
        "predictor.evaluate",
        "predictor.evaluate",
        "--predictor predictor --data lengths.jsonl --json figures.json --picture figures.png",
        reads=predictor_files("predictor", "--predictor") | {"lengths.jsonl": "--data"},
        writes={"figures.json": "--json", "figures.png": "--picture"},
    ),
    Command(
        "predictor.export",
        "predictor.export",
        "predictor.export",
        "--checkpoint predictor --output exported",
        reads=predictor_files("predictor", "--checkpoint"),
        writes={"exported/": "--output"},
    ),
    Command(
        "predictor.update",
        "predictor.update",
        "predictor.update",
        "--predictor predictor --log log.jsonl --output updated --json report.json",
        reads=predictor_files("predictor", "--predictor")
        | {"log.jsonl": "--log", "predictor/train_config.json": "--predictor"},
        writes={"updated/": "--output", "report.json": "--json"},
        fine={"log.jsonl": ("truncated",), "predictor/train_config.json": ANY},
    ),
    Command(
        "serving.server",
        "serving.server",
        "serving.server",
        SERVE,
        reads=model_files("model", "--model")
        | predictor_files("predictor", "--predictor")
        | {"profile.json": "--profile"},
        writes={"served.jsonl": "--log"},
        fine=NO_CONFIG | {"served.jsonl": ("full_disk",)},
        stop_at="serving ",
    ),
    Command(
        "serving.simulate",
        "serving.simulate",
        "serving.simulate",
        f"{SIMULATE} --workload azure_conv --profile profile.json --device device.json "
        "--predictor predictor --model model --json table.json --plots plots",
        reads={
            "traces": "--traces",
            "traces/AzureLLMInferenceTrace_conv.csv.gz": "--traces",
            "profile.json": "--profile",
            "device.json": "--device",
            "model": "--model",
            "model/config.json": "--model",
            "predictor": "--predictor",
            "predictor/predictor.json": "--predictor",
        },
        writes={"table.json": "--json", "plots/": "--plots"},
    ),
    Command(
        "serving.simulate --workload mooncake",
        "serving.simulate",
        "serving.simulate",
        f"{SIMULATE} --workload mooncake",
        reads={"traces/mooncake_conversation_trace.jsonl.gz": "--traces"},
    ),
    Command(
        "serving.deployment",
        "serving.deployment",
        "serving.deployment",
        "--cluster cluster.json --profile profile.json --model model --json placed.json "
        "--picture placed.png",
        reads={
            "cluster.json": "--cluster",
            "profile.json": "--profile",
            "model": "--model",
            "model/config.json": "--model",
        },
        writes={"placed.json": "--json", "placed.png": "--picture"},
    ),
    Command(
        "serving.deployment --device",
        "serving.deployment",
        "serving.deployment",
        "--device device.json --model model",
        reads={"device.json": "--device"},
    ),
    Command(
        "serving.cost_model predict",
        "serving.cost_model",
        "serving.cost_model",
        "predict --profile profile.json --model model --output-tokens 4",
        reads={"profile.json": "--profile", "model/config.json": "--model"},
    ),
    Command(
        "serving.cost_model evaluate",
        "serving.cost_model",
        "serving.cost_model",
        "evaluate --profile profile.json --rows measured.csv --json errors.json",
        reads={"profile.json": "--profile", "measured.csv": "--rows"},
        writes={"errors.json": "--json"},
        fine={"measured.csv": ("truncated",)},
    ),
    Command(
        "serving.cost_model",
        "serving.cost_model",
        "serving.cost_model",
        "fit --start profile.json --rows measured.csv --device device.json --output fitted.json",
        reads={"profile.json": "--start", "measured.csv": "--rows", "device.json": "--device"},
        writes={"fitted.json": "--output"},
        fine={"measured.csv": ("truncated",)},
    ),
    Command(
        "collect_lengths.py",
        "scripts.collect_lengths",
        "collect_lengths.py",
        "--model_path model --prompts eval.json --output collected.jsonl --max_new_tokens 2",
        reads=model_files("model", "--model_path") | {"eval.json": "--prompts"},
        writes={"collected.jsonl": "--output"},
        fine=NO_CONFIG,
        keeps=("collected.jsonl",),
    ),
    Command(
        "collect_lengths.py --output",
        "scripts.collect_lengths",
        "collect_lengths.py",
        "--model_path model --prompts eval.json --output answered.jsonl --max_new_tokens 2",
        reads={"answered.jsonl": "--output"},
        fine={"answered.jsonl": ("missing", "truncated", "empty")},
    ),
    Command(
        "prepare_small_model.py",
        "scripts.prepare_small_model",
        "prepare_small_model.py",
        "--tokenizer tokenizer --output_dir small --hidden_size 32 --num_layers 1 --heads 2 "
        "--groups 2 --ffn 48",
        reads={
            "tokenizer": "--tokenizer",
            "tokenizer/tokenizer.model": "--tokenizer",
            "tokenizer/tokenizer_config.json": "--tokenizer",
        },
        writes={"small/": "--output_dir"},
        fine={"tokenizer/tokenizer_config.json": OPTIONAL},
    ),
    Command(
        "prepare_tokenizer.py",
        "scripts.prepare_tokenizer",
        "prepare_tokenizer.py",
        "--input rows.json --output_dir pieces --vocab_size 330",
        reads={"rows.json": "--input"},
        writes={"pieces/": "--output_dir"},
    ),
    Command(
        "prepare_sample_data.py",
        "scripts.prepare_sample_data",
        "prepare_sample_data.py",
        "--output_dir sample --train_rows 10 --test_rows 5 --copy_rows 10",
        writes={"sample/": "--output_dir"},
    ),
    Command(
        "profile_engine.py",
        "scripts.profile_engine",
        "profile_engine.py",
        "--model model --output engine.json --rows timings.csv --repetitions 1 --max_batch 2 "
        "--max_tokens 64 --kv_tokens 128 --device cpu",
        reads={"model": "--model"},
        writes={"engine.json": "--output", "timings.csv": "--rows"},
    ),
]


def make_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    parts, states = ("水泵", "油封", "火花塞", "滤网"), ("漏油", "抖动", "异响", "积碳")
    rows = []
    for _ in range(count):
        clauses, triples = [], []
        for _ in range(3):
            part, state = draw.choice(parts), draw.choice(states)
            clauses.append(part + state)
            triples.append(f"{part}_{state}")
        row = {"instruction": "抽取：", "input": "，".join(clauses)}
        rows.append(row | {"output": "\n".join(triples)})
    return rows


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


def make_world(world: Path) -> None:
    """A model, an adapter, a predictor, rows and the other files that COMMANDS name."""
    world.mkdir()

    def do(module: str, flags: str) -> None:
        done = run_forked(module, shlex.split(flags), world)
        if done.code:
            raise ValueError(f"{module} {flags}: exit code {done.code}\n{done.out}\n{done.err}")

    write_rows(world / "rows.json", make_rows(12, 1))
    write_rows(world / "eval.json", make_rows(4, 2))
    write_rows(world / "lengths.jsonl", make_lengths(80))
    write_rows(world / "log.jsonl", make_lengths(130))
    do("scripts.prepare_tokenizer", "--input rows.json --output_dir tokenizer --vocab_size 330")
    do(
        "scripts.prepare_small_model",
        "--tokenizer tokenizer --output_dir model --hidden_size 32 "
        "--num_layers 2 --heads 2 --groups 2 --ffn 48 --length 256",
    )
    shutil.copyfile(ROOT / "ds_configs" / "ds_zero2.json", world / "ds.json")
    (world / "run.yaml").write_text("seed: 7\n")
    do("train", STEPS)
    (world / "out").rename(world / "run")
    shutil.copytree(world / "run" / "epoch-1-step-2", world / "adapter")
    for name in ("seed-1", "seed-2"):
        shutil.copytree(world / "run", world / "seeds" / name)
    do("train", LENGTHS)
    (world / "lengths_out").rename(world / "predictor")
    answer = "--model_path model --max_new_tokens 2"
    do("finetune.evaluate", f"{answer} --test_path eval.json --predictions predictions.jsonl")
    do("scripts.collect_lengths", f"{answer} --prompts eval.json --output answered.jsonl")
    (world / "predictions.jsonl").rename(world / ".predictions.jsonl.partial")
    make_serving_files(world)


def make_serving_files(world: Path) -> None:
    """A profile, a device, a cluster, measurements and traces."""
    shutil.copyfile(
        ROOT / "serving" / "cost_model" / "profiles" / "rtx3090.json", world / "profile.json"
    )
    device = {"name": "card", "memory_bytes": 2**34, "bandwidth_bytes_s": 1e12, "flops_s": 1e14}
    (world / "device.json").write_text(json.dumps(device))
    link = {"bandwidth_bytes_s": 1e10, "latency_s": 1e-5}
    (world / "cluster.json").write_text(json.dumps({"devices": [device] * 2, "link": link}))
    lines = []
    for n in range(1, 5):
        lines += [f"{0.1 * n + 0.02 * m},{n},{16 * m}" for m in range(1, 5)]
    text = "\n".join(["seconds,batch_size,output_tokens", *lines, ""])
    (world / "measured.csv").write_text(text)
    traces = world / "traces"
    traces.mkdir()
    lines = [f"2023-11-16 18:15:{n:02}.680590,{40 + n},{10 + n}" for n in range(40)]
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, ""])
    (traces / "AzureLLMInferenceTrace_conv.csv.gz").write_bytes(gzip.compress(text.encode()))
    rows = [{"timestamp": 500 * n, "input_length": 40, "output_length": 9} for n in range(40)]
    text = "\n".join([*map(json.dumps, rows), ""])
    path = traces / "mooncake_conversation_trace.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
