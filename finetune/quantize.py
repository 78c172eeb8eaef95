"""A ChatGLM2, ChatGLM3 or GLM-4 in 4 bits, by GPTQ or AWQ: python -m finetune.quantize MODEL
--method gptq --calibrate ROWS --output FOLDER.

The folder is GlmForCausalLM's, as chatglm.export --to glm writes it, with the linear layers of its
blocks packed in groups of inputs; embedding and output layer stay as they are. transformers (with
gptqmodel and optimum) and vLLM open it without this project. An adapter is folded into its model
first. The rows of --calibrate, in any format of train.py, show which inputs matter.

GPTQ: Frantar et al. 2022, arXiv 2210.17323. AWQ: Lin et al. 2023, arXiv 2306.00978. Both are
GPTQModel's; see docs/export.md.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.checksums import add_verify_flag, write_checksums
from chatglm.commands import Parser, run_command
from chatglm.families import CHATGLM_FAMILIES, FAMILIES, family_of
from chatglm.files import read_json
from finetune.files import write_json
from finetune.flags import parse_positive

if TYPE_CHECKING:
    from torch import Tensor

    from chatglm.shards import NamedTensors
    from finetune.rows.encoding import RowEncoder

METHODS = ("gptq", "awq")
BITS = 4
GROUPS = (32, 64, 128)
# GlmForCausalLM has the two in one layer; GPTQModel takes them apart and saves them so.
GATE, UP, FUSED = ".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.gate_up_proj."
PER_INPUT = "g_idx"  # a tensor of a layer's inputs, which gate and up share
KEPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class QuantizeFlags:
    """The flags of `python -m finetune.quantize`."""

    model: str
    method: str
    calibrate: str
    output: Path
    base: str | None
    mode: str | None
    group_size: int
    rows: int
    max_len: int
    device: str
    verify: str | None


def quantize(flags: QuantizeFlags) -> str:
    """Write the folder that the flags ask for; what it is, in words.

    Raises:
        ValueError: the model cannot be packed, a row is bad, or the output is there already.
        FileNotFoundError: the model or the rows are not there.
        ImportError: gptqmodel is not installed.
        OSError: the output cannot be written.
    """
    from chatglm import load_tokenizer
    from chatglm.export.folders import export_glm, export_source, written_aside
    from finetune.rows.encoding import RowEncoder

    target = "a GlmForCausalLM"
    source = export_source(flags.model, flags.mode, flags.base, False, flags.verify, target)
    check_groups(source.model, flags.group_size)
    tokenizer = load_tokenizer(source.folder, mode=source.family, base=flags.base)
    rows = calibration_rows(
        flags, RowEncoder(tokenizer, family_of(tokenizer), flags.max_len, flags.max_len // 2)
    )
    require_gptqmodel()

    def write(aside: Path) -> str:
        with tempfile.TemporaryDirectory(dir=aside) as place:
            native, packed = Path(place) / "native", Path(place) / "packed"
            export_glm(flags.model, native, mode=flags.mode, base=flags.base, verify=flags.verify)
            pack_layers(native, packed, rows, flags)
            write_folder(native, packed, aside)
        write_checksums(aside)
        folded = ", its adapter folded in" if source.adapter else ""
        tokens = sum(map(len, rows))
        return (
            f"{FAMILIES[source.family].title} as GlmForCausalLM in {BITS} bits by {flags.method}, "
            f"groups of {flags.group_size}, calibrated on {len(rows)} rows of {tokens} tokens"
            f"{folded}"
        )

    return written_aside(flags.output, write)


def check_groups(folder: Path, group_size: int) -> None:
    """Raises ValueError where a layer's inputs are no multiple of the group."""
    from chatglm.configuration import ChatGLM2Config
    from chatglm.folders import read_model_config

    config = ChatGLM2Config.from_dict(read_model_config(folder))
    inputs = {
        "hidden_size": config.hidden_size,
        "heads x kv_channels": config.num_attention_heads * config.kv_channels,
        "ffn_hidden_size": config.ffn_hidden_size,
    }
    for name, size in inputs.items():
        if size % group_size:
            raise ValueError(f"--group_size {group_size}: {folder} has {name} {size}, no multiple")


def calibration_rows(flags: QuantizeFlags, encoder: "RowEncoder") -> list[list[int]]:
    """The ids of at most --rows rows, as fine-tuning has them.

    Raises:
        ValueError: a bad row, with its file and line.
        FileNotFoundError: no file has the name.
    """
    from finetune.rows.sources import RowReader, parse_sources, read_rows

    reader = RowReader(family=encoder.family.name)
    found: list[list[int]] = []
    for source in parse_sources(flags.calibrate, "--calibrate", weights=False):
        left = flags.rows - len(found)
        if left <= 0:
            break
        rows, _ = read_rows(source, limit=left, reader=reader)
        for row in rows:
            for encoded in encoder.encode(row):
                found.append(encoded.input_ids)
    return found[: flags.rows]


def require_gptqmodel() -> None:
    """Raises ImportError, with what to install."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise ImportError("quantizing wants the package gptqmodel: pip install -e '.[gptq]'")


def pack_layers(native: Path, packed: Path, rows: list[list[int]], flags: QuantizeFlags) -> None:
    """Let GPTQModel pack the layers of an exported folder into the folder `packed`."""
    if (os.cpu_count() or 1) < 3:
        # It starts a thread for every second core, and wants two.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.looper import loop_processor

    # It would make a folder `logs` where the command runs.
    loop_processor._PROJECT_LOG_DIR = packed.with_name("logs")
    options: dict[str, Any] = {"bits": BITS, "group_size": flags.group_size}
    if flags.method == "awq":
        options |= {"method": "awq", "format": "gemm"}
    config = QuantizeConfig(
        **options, device=flags.device, offload_to_disk_path=str(packed.with_name("offload"))
    )
    model = GPTQModel.load(str(native), config)
    # AWQ's own kernels, which it would test here, want CUDA; the files are the same.
    backend = BACKEND.AWQ_TORCH if flags.method == "awq" else BACKEND.AUTO
    examples = []
    for ids in rows:
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    model.quantize(examples, batch_size=1, backend=backend, calibration_data_min_length=1)
    model.save(str(packed))


class FusedTensors:
    """The tensors of a folder of GPTQModel under GlmForCausalLM's names."""

    def __init__(self, stored: "NamedTensors"):
        self.stored = stored

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        if FUSED not in name:
            return self.stored[name]
        gate, up = self.stored[name.replace(FUSED, GATE)], self.stored[name.replace(FUSED, UP)]
        if not name.endswith(PER_INPUT):
            return torch.cat([gate, up], dim=-1)  # outputs are the last dimension of each
        if not torch.equal(gate, up):
            raise ValueError(f"{name}: gate and up have their inputs in groups of their own")
        return gate


def fused_names(names: list[str]) -> list[str]:
    """GlmForCausalLM's names of the tensors that GPTQModel saves."""
    return [name.replace(GATE, FUSED) for name in names if UP not in name]


def write_folder(native: Path, packed: Path, output: Path) -> None:
    """Write the packed weights in GlmForCausalLM's layout, with the exported folder's files."""
    from chatglm.shards import SHARD_BYTES, BaseWeights, plan_shards, save_shards, write_index

    weights = BaseWeights(packed)
    tensors = FusedTensors(weights)
    names = fused_names(list(weights.files))
    sizes = {name: tensors[name].nbytes for name in names}
    files, total = save_shards(tensors, plan_shards(sizes, SHARD_BYTES), output)
    write_index(files, total, output)
    found = read_json(packed / "config.json")
    settings = found["quantization_config"]
    settings.get("meta", {}).pop("offload_to_disk_path", None)  # a temporary folder
    config = read_json(native / "config.json")
    config |= {"torch_dtype": found["dtype"], "quantization_config": settings}
    write_json(output / "config.json", config)
    for name in KEPT_FILES:
        if (native / name).is_file():
            shutil.copyfile(native / name, output / name)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="finetune.quantize", description=__doc__)
    add = parser.add_argument
    add("model", help="a model's or an adapter's folder, or a hub's name")
    add("--method", required=True, choices=METHODS, help="how the weights are packed")
    add("--calibrate", required=True, help="rows in any format of train.py: files, folders")
    add("--output", type=Path, required=True, help="the folder to write")
    add("--base", help="the model of an adapter's folder (default: the one that it names)")
    add("--mode", choices=CHATGLM_FAMILIES, help="family (default: found in the folder)")
    add("--group_size", type=int, choices=GROUPS, default=128, help="inputs of one scale [128]")
    add("--rows", type=parse_positive, default=256, help="rows to calibrate on, at most [256]")
    add("--max_len", type=parse_positive, default=2048, help="tokens of a row, at most [2048]")
    add("--device", default="cpu", help='"cpu" or a torch device ["cpu"]')
    add_verify_flag(parser, "fast")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = QuantizeFlags(**vars(build_parser().parse_args(argv)))
    return run_command("finetune.quantize", lambda: print(f"{flags.output}: {quantize(flags)}"))


if __name__ == "__main__":
    sys.exit(main())
