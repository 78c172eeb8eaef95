"""A tuned model ready to answer: the flags that name and load it, and its loading."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatglm.checksums import add_verify_flag
from chatglm.families import FAMILIES
from chatglm.files import read_json, shorten
from chatglm.hub import resolve_folder
from chatglm.raw_prompts import PROMPT_STYLES
from chatglm.runs import check_not_run
from finetune.config import PRECISIONS, parse_bool, parse_positive
from finetune.placing import PlacementFlags, ReplicaSpec, add_placing_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer


@dataclass(frozen=True)
class LoadingFlags:
    """The flags of `add_loading_flags`."""

    base_model: str | None
    mode: str | None
    prompt_style: str | None
    device: str
    precision: str


@dataclass(frozen=True)
class InferenceFlags(LoadingFlags, PlacementFlags):
    """The flags of `add_model_flags`."""

    model_path: str
    quantization_bit: int | None
    keep_quantized: bool
    verify: str
    max_src_len: int | None
    max_new_tokens: int | None
    max_length: int
    batch_size: int
    do_sample: bool | None
    top_p: float
    temperature: float
    seed: int
    predictor: str | None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that answers with a model."""
    parser.add_argument("--model_path", required=True, help="a model, adapter or prefix folder")
    add_loading_flags(parser)
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="load the frozen linear layers in 4 or 8 bits, as in QLoRA training",
    )
    add_packing_flag(parser)
    add_verify_flag(parser, "fast")
    add_length_flags(parser)
    parser.add_argument(
        "--batch_size", type=parse_positive, default=8, help="batch size, in prompts [8]"
    )
    parser.add_argument(
        "--predictor",
        metavar="DIR",
        help="folder of a length predictor: rows of similar predicted length share a batch, "
        "the longest first [the longest prompts first]",
    )
    add_sampling_flags(parser)
    add_placing_flags(parser)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads a model, beside the one that names its folder."""
    parser.add_argument(
        "--base_model", help="base of an adapter or prefix folder (default: the one it names)"
    )
    parser.add_argument(
        "--mode", choices=tuple(FAMILIES), help="model family (default: detected from the folder)"
    )
    parser.add_argument(
        "--prompt_style",
        choices=PROMPT_STYLES,
        help="chat: the family's prompts; raw: the text alone [as it was trained, else chat]",
    )
    parser.add_argument("--device", default="0", help='GPU number, "cpu" or a torch device [0]')
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="dtype of the weights [auto: bf16, else fp16 on GPUs, fp32 on CPU]",
    )


def add_packing_flag(parser: argparse.ArgumentParser) -> None:
    """Whether a published int8 or int4 release stays packed."""
    parser.add_argument(
        "--keep_quantized",
        action="store_true",
        help="leave a published int8 or int4 model packed: less memory, slower [dequantised]",
    )


def add_length_flags(parser: argparse.ArgumentParser) -> None:
    """The limits of a prompt and of an answer, in tokens."""
    parser.add_argument(
        "--max_src_len",
        type=parse_positive,
        help="longest prompt in tokens (default: training's, else 1024)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=parse_positive,
        help="longest answer in tokens (default: max_length less the prompt)",
    )
    parser.add_argument(
        "--max_length",
        type=parse_positive,
        default=2048,
        help="longest prompt and answer in tokens [2048]",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Whether and how answers are sampled."""
    parser.add_argument(
        "--do_sample",
        type=parse_bool,
        nargs="?",
        const=True,
        metavar="True|False",
        help="sample instead of greedy decoding",
    )
    parser.add_argument(
        "--top_p", type=float, default=0.8, help="with --do_sample: nucleus sampling [0.8]"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="with --do_sample: temperature [0.8]"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of sampling [1234]")


class InferenceSetup(NamedTuple):
    """What is known before a model is loaded.

    Attributes:
        folder: of the model, adapter or prefix.
        max_src_len: longest prompt in tokens.
        options: generate()'s.
    """

    folder: Path
    tokenizer: "FamilyTokenizer"
    max_src_len: int
    options: dict[str, Any]


def prepare_inference(flags: InferenceFlags) -> InferenceSetup:
    """The folder's tokenizer, and the options of answers; raises as `load_tokenizer`."""
    from chatglm import load_tokenizer

    check_not_run(flags.model_path, "--model_path")
    folder = resolve_folder(flags.model_path, weights=True)
    tokenizer = load_tokenizer(
        folder,
        mode=flags.mode,
        base=flags.base_model,
        prompt_style=flags.prompt_style,
        verify=flags.verify,
    )
    train_config = folder / "train_config.json"
    max_src_len = flags.max_src_len or trained_length(train_config) or 1024
    options: dict[str, Any] = {}
    if flags.max_new_tokens:
        options["max_new_tokens"] = flags.max_new_tokens
    else:
        options["max_length"] = flags.max_length
    options["do_sample"] = bool(flags.do_sample)
    if flags.do_sample:
        options |= {"top_p": flags.top_p, "temperature": flags.temperature}
    return InferenceSetup(folder, tokenizer, max_src_len, options)


def loading_options(flags: InferenceFlags) -> dict[str, Any]:
    """`load_ready`'s options, without the device."""
    return {
        "mode": flags.mode,
        "base": flags.base_model,
        "precision": flags.precision,
        "quantization_bit": flags.quantization_bit,
        "keep_quantized": flags.keep_quantized,
        "verify": flags.verify,
    }


def load_for_inference(
    flags: InferenceFlags,
) -> tuple["PreTrainedModel", "FamilyTokenizer", int, dict[str, Any]]:
    """(model on the one device of --device, tokenizer, max_src_len, generate()'s options)."""
    setup = prepare_inference(flags)
    model = load_ready(setup.folder, device=flags.device, **loading_options(flags))
    return model, setup.tokenizer, setup.max_src_len, setup.options


def load_replica(path: str | Path, spec: ReplicaSpec, **loading: Any) -> "PreTrainedModel":
    """A placement's model in this process: on one device, or its layers on several.

    Args:
        loading: `load_ready`'s options.
    Raises:
        ValueError: several stages without a device_map; as `load_ready`.
    """
    import torch

    threads = [stage.threads for stage in spec.stages if stage.threads]
    if threads:
        torch.set_num_threads(max(threads))  # one stage computes after the other
    if spec.device_map is None and len(spec.stages) > 1:
        raise ValueError(f"{len(spec.stages)} stages in one process need a device map")
    return load_ready(path, device=spec.stages[0].device, device_map=spec.device_map, **loading)


def trained_length(config: Path) -> int | None:
    """--max_src_len of training, from a checkpoint's train_config.json; None without that file."""
    if not config.is_file():
        return None
    value = read_json(config).get("max_src_len")
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{config}: max_src_len must be a whole number above 0, got {shorten(value)}; "
            "say --max_src_len"
        )
    return value


def load_ready(
    path: str | Path,
    *,
    mode: str | None = None,
    base: str | None = None,
    device: str = "0",
    device_map: dict[str, int | str] | None = None,
    precision: str = "auto",
    quantization_bit: int | None = None,
    keep_quantized: bool = False,
    verify: str | None = None,
) -> "PreTrainedModel":
    """A model on its device, ready for inference.

    The arguments are the values of the flags of `add_model_flags`. On a CPU the precision "auto" is
    fp32.

    Args:
        device_map: {module: device}, in place of `device`, for a model on several.
    """
    from chatglm import load_model
    from finetune.distributed import DTYPES, resolve_precision

    device = pick_device(device)
    places = set(map(str, device_map.values())) if device_map else {device}
    if precision == "auto" and places == {"cpu"}:
        dtype = DTYPES["fp32"]
    else:
        dtype = DTYPES[resolve_precision(precision)]
    if quantization_bit or device_map:
        # Quantised weights cannot be moved, so they are loaded onto the device.
        return load_model(
            path,
            mode=mode,
            dtype=dtype,
            base=base,
            quantization_bit=quantization_bit,
            keep_quantized=keep_quantized and not quantization_bit,
            device_map=device_map or {"": device},
            verify=verify,
        ).eval()
    model = load_model(
        path, mode=mode, dtype=dtype, base=base, keep_quantized=keep_quantized, verify=verify
    )
    return model.to(device).eval()


def pick_device(name: str) -> str:
    """The torch device of --device; a GPU number means the CPU on a machine without GPUs.

    Raises ValueError where there is no such device.
    """
    import torch

    if name.isdigit():
        count = torch.cuda.device_count()
        if count and int(name) >= count:
            raise ValueError(f"--device: there is no GPU {name} here, only 0 to {count - 1}")
        return f"cuda:{name}" if count else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device: there is no {name!r} here") from None
    return name
