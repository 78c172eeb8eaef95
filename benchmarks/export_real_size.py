# ruff: noqa: E402
"""Merging and exporting at real size: seconds against a copy of the same bytes, and memory.

    python benchmarks/export_real_size.py [--models chatglm2-6b,glm-4-9b] [--only WORD]

A model of random fp16 weights is made in --work, with a random LoRA of it; then, one after the
other, each output deleted before the next: merge_lora.py, chatglm.export --to glm, and --to gguf
--type q4_0. Seconds are a command's own and those until the disk has everything, against copying
the model's files with fsync, once before each command; CPU seconds say how much of it was not
waiting for the disk or for other programs. Memory is the most anonymous memory that the
command held, above that of a Python which has imported what it imports.

ChatGLM2-6B takes 50 GB of disk at most, GLM-4-9B 60. --tiny makes models of two small layers.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from chatglm.commands import Parser, child_environment, run_command
from chatglm.configuration import ChatGLM2Config
from chatglm.convert_adapter import model_outline
from chatglm.shards import plan_shards, save_shards, write_index

GLM4 = {
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "seq_length": 131072,
    "rope_ratio": 500,
    "layernorm_epsilon": 1.5625e-07,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "glm_family": "glm4",
}
MODELS: dict[str, dict[str, Any]] = {"chatglm2-6b": {"glm_family": "glm2"}, "glm-4-9b": GLM4}
TINY = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 192, "num_attention_heads": 4}
TINY |= {"kv_channels": 32}
SHARD_BYTES = 1_900_000_000  # as the releases have them: 7 files of ChatGLM2-6B
RANK = 8
BLOCK_BYTES = 16 << 20  # of a copy
POLL_S = 0.01
IMPORTS = "import torch, transformers, peft, safetensors.torch, chatglm.loading"


@dataclass(frozen=True)
class Step:
    """A command's figures.

    Attributes:
        seconds, copied_s: until the disk has its output, and the model's files copied.
        cpu_s: of the command's process, user and system.
        memory_gb: the most anonymous memory, above a Python that has imported the same.
    """

    model: str
    command: str
    seconds: float
    copied_s: float
    cpu_s: float
    memory_gb: float
    output_gb: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.copied_s


class RandomTensors:
    """Seeded normal tensors by name, fp16; norms are ones."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = shapes
        self.generator = torch.Generator().manual_seed(0)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if "layernorm" in name:
            return torch.ones(shape, dtype=torch.float16)
        return torch.empty(shape, dtype=torch.float16).normal_(0, 0.02, generator=self.generator)


def make_model(folder: Path, name: str, data: Path, tiny: bool) -> ChatGLM2Config:
    """Write a folder of random weights with its family's real vocabulary."""
    config = ChatGLM2Config(**MODELS[name] | (TINY if tiny else {}))
    folder.mkdir(parents=True)
    shapes = {}
    for key, tensor in model_outline(config).state_dict().items():
        shapes[key] = list(tensor.shape)
    sizes = {key: 2 * torch.Size(shape).numel() for key, shape in shapes.items()}
    files, written = save_shards(RandomTensors(shapes), plan_shards(sizes, SHARD_BYTES), folder)
    write_index(files, written, folder)
    values = config.to_dict() | {"torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    write_vocabulary(folder, config.glm_family, data)
    return config


def write_vocabulary(folder: Path, family: str | None, data: Path) -> None:
    """The family's tokenizer.model and its configuration. Raises FileNotFoundError."""
    if family == "glm4":
        packed = (data / "relatives-tokenizers" / "glm4" / "tokenizer.model.gz").read_bytes()
        (folder / "tokenizer.model").write_bytes(gzip.decompress(packed))
    else:
        shutil.copyfile(data / "chatglm2-tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"glm_family": family}))


def make_adapter(folder: Path, model: Path, config: ChatGLM2Config) -> None:
    """Write a LoRA of every query_key_value, as peft does."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    rows = config.kv_channels * (config.num_attention_heads + 2 * config.num_key_value_heads)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in range(config.num_layers):
        module = f"base_model.model.transformer.encoder.layers.{layer}.self_attention"
        for part, shape in {"A": (RANK, config.hidden_size), "B": (rows, RANK)}.items():
            tensor = torch.empty(shape).normal_(0, 0.02, generator=generator)
            state[f"{module}.query_key_value.lora_{part}.weight"] = tensor
    save_file(state, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    values |= {"target_modules": ["query_key_value"], "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def copy_seconds(folder: Path, output: Path) -> float:
    """Seconds to copy a folder's files, each with fsync."""
    begin = time.perf_counter()
    output.mkdir()
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as source, open(output / file.name, "wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    return seconds


def anonymous_bytes(process: int) -> int:
    """The anonymous memory of a process now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run_watched(words: Sequence[object]) -> tuple[float, float, int]:
    """(seconds until the disk has what it wrote, CPU seconds, most anonymous bytes) of a Python
    command.

    Raises:
        ValueError: the command failed; its last words.
    """
    begin, spent = time.perf_counter(), children_s()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=child_environment(None),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    most = 0
    while process.poll() is None:
        most = max(most, anonymous_bytes(process.pid))
        time.sleep(POLL_S)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    if process.returncode:
        raise ValueError(f"{words} ended with {process.returncode}: {said[-500:]}")
    cpu_s = children_s() - spent
    os.sync()
    return time.perf_counter() - begin, cpu_s, most


def children_s() -> float:
    """CPU seconds of the processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def idle_bytes() -> int:
    """Anonymous memory of a Python that has imported what the commands import."""
    report = "import pathlib; print(pathlib.Path('/proc/self/status').read_text())"
    done = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}; {report}"],
        cwd=ROOT,
        env=child_environment(None),
        check=True,
        capture_output=True,
        text=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def run_model(name: str, flags: argparse.Namespace, idle: int) -> list[Step]:
    """Make a model, and run every command on it; nothing of it is left."""
    place = flags.work / name
    shutil.rmtree(place, ignore_errors=True)
    model, adapter, output = place / "model", place / "adapter", place / "output"
    try:
        config = make_model(model, name, flags.data, flags.tiny)
        make_adapter(adapter, model, config)
        merge = ["merge_lora.py", "--ori_model_dir", model, "--model_dir", adapter]
        export = ["-m", "chatglm.export", adapter, "--base", model, "--output", output]
        commands = {
            "merge_lora.py": [*merge, "--save_dir", output],
            "--to glm": [*export, "--to", "glm"],
            "--to gguf --type q4_0": [*export, "--to", "gguf", "--type", "q4_0"],
        }
        steps = []
        for command, words in commands.items():
            if flags.only not in command:
                continue
            os.sync()
            copied_s = copy_seconds(model, place / "copy")
            seconds, cpu_s, most = run_watched(words)
            memory_gb, output_gb = max(most - idle, 0) / 1e9, bytes_of(output) / 1e9
            steps.append(Step(name, command, seconds, copied_s, cpu_s, memory_gb, output_gb))
            print(line_of(steps[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        return steps
    finally:
        shutil.rmtree(place, ignore_errors=True)


def bytes_of(path: Path) -> int:
    """Of a file, or of the files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum([file.stat().st_size for file in path.rglob("*") if file.is_file()])


def line_of(step: Step) -> str:
    """A row of the table."""
    return (
        f"| {step.model} | `{step.command}` | {step.seconds:.1f} | {step.copied_s:.1f} "
        f"| {step.ratio:.1f} | {step.cpu_s:.1f} | {step.memory_gb:.2f} | {step.output_gb:.2f} |"
    )


def build_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="export_real_size.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help="comma between them [all]")
    add("--only", default="", help="the commands that hold this word [all]")
    add("--work", type=Path, default=Path("export-real-size"), help="folder to work in")
    add("--data", type=Path, default=ROOT.parent / "shared/data", help="of the vocabularies")
    add("--tiny", action="store_true", help="models of two small layers")
    add("--json", type=Path, help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = parser.parse_args(argv)
    flags.work = flags.work.absolute()
    for name in flags.models.split(","):
        if name not in MODELS:
            parser.error(f"--models: no model {name!r}; there are {', '.join(MODELS)}")

    def work() -> None:
        idle = idle_bytes()
        steps = []
        for name in flags.models.split(","):
            steps += run_model(name, flags, idle)
        print("| model | command | s | a copy, s | ratio | CPU s | memory, GB | output, GB |")
        print("|---|---|---|---|---|---|---|---|")
        for step in steps:
            print(line_of(step))
        if flags.json:
            flags.json.write_text(json.dumps([asdict(step) for step in steps], indent=2))

    return run_command("export_real_size", work)


if __name__ == "__main__":
    sys.exit(main())
