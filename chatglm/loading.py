"""Folders to models and tokenizers: published checkpoints, our own, LoRA adapters and P-Tuning prefixes."""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from .configuration import ChatGLM1Config, ChatGLMConfig
from .families import FAMILIES, contradicts, infer_family
from .modeling_glm import ChatGLM1ForConditionalGeneration
from .modeling_glm2 import ChatGLM2ForConditionalGeneration
from .tokenization import ChatGLMTokenizer

log = logging.getLogger(__name__)

PREFIX = "transformer.prefix_encoder."
# Tensors that say nothing about which model a folder holds: tables, tied copies, P-Tuning's own.
NOT_IDENTITY = ("inv_freq", "lm_head.weight", "prefix_encoder.")


def resolve_mode(path: str | Path, mode: str | None = None) -> str:
    """The family of a folder: as asked, else as found in it, else glm2 with a warning.

    Raises:
        ValueError: `mode` is no family, or the folder's files say that it cannot be that family.
    """
    if mode is None:
        mode = infer_family(path)
        if mode is None:
            log.warning("%s does not tell its family; taking glm2 (say mode=\"glm3\" for ChatGLM3)", path)
            mode = "glm2"
    elif mode not in FAMILIES:
        raise ValueError(f"mode must be one of {', '.join(FAMILIES)}; got {mode!r}")
    elif evidence := contradicts(path, mode):
        raise ValueError(f"mode {mode!r} does not fit {path}: {evidence}")
    return mode


def load_tokenizer(path: str | Path, *, mode: str | None = None) -> ChatGLMTokenizer:
    """The tokenizer of a folder; of the base model, where an adapter folder has none of its own.

    Raises:
        ValueError: `mode` contradicts the folder.
        FileNotFoundError: no tokenizer model there.
    """
    path = check_folder(path)
    mode = resolve_mode(path, mode)
    base = named_base(path)
    if not (path / FAMILIES[mode].tokenizer_file).is_file() and base and Path(base).is_dir():
        path = Path(base)
    return ChatGLMTokenizer.from_pretrained(str(path), family=mode)


def load_model(
    path: str | Path,
    *,
    mode: str | None = None,
    dtype: torch.dtype | str | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    ptuning_version: str | None = None,
    attn_implementation: str = "sdpa",
    device_map=None,
    base: str | Path | None = None,
    quantization_bit: int | None = None,
):
    """A ChatGLM with its output layer, in eval mode.

    Args:
        path: a folder of weights (safetensors, or .bin read with weights_only), a peft adapter folder, or a folder
            that holds only a P-Tuning prefix.
        mode: "glm", "glm2" or "glm3"; found in the folder when None.
        dtype: of the weights; None keeps the checkpoint's.
        pre_seq_len, prefix_projection, ptuning_version: a new P-Tuning prefix of so many virtual tokens; a folder that
            has a prefix needs none of them, and any that is given must agree with it.
        base: the base model of an adapter or prefix folder; by default the one that it names.
        quantization_bit: 4 (nf4, double quantisation) or 8 (int8) bits for the linear layers but the output layer and a prefix's
            own; computed in `dtype`. Needs bitsandbytes.
    Returns:
        ChatGLM1ForConditionalGeneration or ChatGLM2ForConditionalGeneration; for an adapter folder, that in a PeftModel.
    Raises:
        ValueError: mode, prefix or base contradict the folder, or the weights lack tensors.
        FileNotFoundError: no such folder, or no weights in it.
    """
    path = check_folder(path)
    mode = resolve_mode(path, mode)
    options = {"mode": mode, "dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    options["quantization_bit"] = quantization_bit
    if (path / "adapter_config.json").is_file():
        from peft import PeftModel

        model = load_model(find_base(path, base), **options)
        try:
            return PeftModel.from_pretrained(model, str(path)).eval()
        except (RuntimeError, SafetensorError) as error:  # other shapes, a torn file
            raise ValueError(f"{path} cannot be put on {model.name_or_path}: {' '.join(str(error).split())[:300]}") from None

    stored = stored_prefix(path)
    config = ChatGLMConfig.from_pretrained(str(path))
    if stored or pre_seq_len:
        set_prefix(config, path, stored, pre_seq_len, prefix_projection, ptuning_version)
    weights = path
    if stored and stored["only"]:
        weights = check_folder(find_base(path, base))
    config.glm_family = mode
    config.name_or_path = str(weights)
    if "flash" in attn_implementation and isinstance(config, ChatGLM1Config):
        raise ValueError("ChatGLM-6B's bidirectional context has no flash kernel; use attn_implementation=\"sdpa\"")
    model_class = ChatGLM1ForConditionalGeneration if isinstance(config, ChatGLM1Config) else ChatGLM2ForConditionalGeneration
    with quiet_transformers():  # it would report a new prefix as missing; what is really missing is an error below
        model, info = model_class.from_pretrained(
            str(weights), config=config, dtype=dtype or "auto", attn_implementation=attn_implementation,
            device_map=device_map, output_loading_info=True, **quantization(quantization_bit, dtype),
        )  # fmt: skip
    # A prefix may be missing where it is new or comes from `path`; a config that names one is not enough.
    prefix_elsewhere = weights != path or (stored is None and pre_seq_len)
    lost = sorted(k for k in info["missing_keys"] if not (prefix_elsewhere and k.startswith(PREFIX)))
    if lost:
        raise ValueError(f"{weights}: the weights lack {len(lost)} tensors, the first is {lost[0]}")
    if weights != path:
        load_prefix(model, path)
    set_stop_ids(model, path, weights, mode)
    return model.eval()


def quantization(bits: int | None, dtype) -> dict:
    """from_pretrained's options for frozen weights in 4 or 8 bits (QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339).

    Raises:
        ValueError: bits is neither, or bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    if bits not in (4, 8):
        raise ValueError(f"quantization_bit must be 4 or 8; got {bits}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f'quantization_bit needs bitsandbytes: pip install -e ".[qlora]" ({error})') from None
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says at every product that int8 rounds by way of fp16
    compute = dtype if isinstance(dtype, torch.dtype) else torch.float32 if not torch.cuda.is_available() else torch.bfloat16
    return {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["lm_head", "output_layer", "prefix_encoder"],
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute,
    )}  # fmt: skip


@contextmanager
def quiet_transformers():
    """No progress bars and no loading report from transformers inside."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def download_hint(name: str) -> str:
    """How to get a model that a hub's name, such as THUDM/chatglm2-6b, stands for; nothing for other names."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        return ""
    return f"; to get it from a hub: `hf download {name} --local-dir {name.split('/')[1]}`, then give that folder"


def check_folder(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such model folder: {path}{download_hint(str(path))}")
    return path


def named_base(path: Path) -> str | None:
    """The base model that an adapter or prefix folder names."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (path / file).is_file() and (name := json.loads((path / file).read_text(encoding="utf-8")).get(key)):
            return name
    return None


def find_base(path: Path, base: str | Path | None) -> Path:
    found = base or named_base(path)
    if not found:
        raise ValueError(f"{path} holds an adapter or a prefix and names no base model; give base=FOLDER")
    if not Path(found).is_dir():
        raise FileNotFoundError(f"{path}: its base model {found} is not there; give base=FOLDER")
    return Path(found)


def weight_files(path: str | Path) -> list[Path]:
    """The files of a checkpoint: safetensors if there are any, else .bin; shards as their index lists them."""
    path = Path(path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if lost := [n for n in names if not (path / n).is_file()]:
                raise FileNotFoundError(f"{path}: {index.name} names {lost[0]}, which is not there")
            return [path / n for n in names]
    raise FileNotFoundError(f"{path}: no model.safetensors and no pytorch_model.bin, whole or in shards")


def iterate_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a folder's weights, read lazily where the format allows; nothing is unpickled but tensors."""
    for file in weight_files(path):
        yield from read_tensors(file)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one .safetensors or .bin file; raises ValueError where it is torn or holds anything else."""
    if file.suffix == ".safetensors":
        with open_safetensors(file) as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())
    else:
        yield from read_bin(file).items()


@contextmanager
def open_safetensors(file: Path):
    """safetensors' safe_open, its errors a ValueError that names folder and file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file.parent}: its weights cannot be read ({file.name}: {error})") from None


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped into memory where its format (zip, since torch 1.6) allows.

    Raises:
        ValueError: there is anything but tensors in it; whatever else it is stays pickled.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's message advises to switch the protection off; its last line says what was found
        lines = str(error).splitlines() or [""]
        found = next((line for line in lines if "WeightsUnpickler" in line), lines[0])
        raise ValueError(f"{file} is not read: a .bin may hold tensors and nothing else ({found[:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not read: it is no flat table of names and tensors")
    return state


def base_fingerprint(path: str | Path) -> str:
    """sha256 over names, shapes and 16 values of every weight: the same for fp32, fp16 and resharded copies of a model."""
    digest = hashlib.sha256()
    samples = {}
    for name, tensor in iterate_weights(path):
        if not any(part in name for part in NOT_IDENTITY):
            flat = tensor.flatten()
            # By way of fp16, as a half-precision copy went: rounding 32 bits to bfloat16 at once may end elsewhere.
            values = flat[:: max(1, flat.numel() // 16)][:16].half().to(torch.bfloat16).float()
            samples[name] = (tuple(tensor.shape), values.numpy().tobytes())
    for name in sorted(samples):
        digest.update(f"{name}{samples[name][0]}".encode() + samples[name][1])
    return digest.hexdigest()


def stored_prefix(path: Path) -> dict | None:
    """What P-Tuning prefix a folder's weights hold: {"length", "width", "mlp", "only"}, or None.

    `only`: nothing but the prefix is there (the official P-Tuning checkpoints, and ours).
    """
    shapes, others = {}, 0
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        else:
            found = {name: list(tensor.shape) for name, tensor in read_bin(file).items()}
        others += sum("prefix_encoder." not in name for name in found)
        shapes |= {name.split("prefix_encoder.")[1]: shape for name, shape in found.items() if "prefix_encoder." in name}
    if "embedding.weight" not in shapes:
        return None
    length, width = shapes["embedding.weight"]
    return {"length": length, "width": width, "mlp": "trans.0.weight" in shapes, "only": not others}


def set_prefix(config, path, stored, pre_seq_len, prefix_projection, ptuning_version):
    """Settle the config's prefix between what the caller asks, what the config says and what the weights hold."""
    asked = pre_seq_len or config.pre_seq_len
    if stored and asked and asked != stored["length"]:
        source = f"pre_seq_len={pre_seq_len}" if pre_seq_len else f"its config.json says pre_seq_len {config.pre_seq_len}"
        raise ValueError(f"{path} holds a prefix of {stored['length']} virtual tokens, but {source}")
    if stored:
        version = config.ptuning_version or "v2"
        if ptuning_version not in (None, version):
            raise ValueError(f"{path} holds a P-Tuning {version} prefix, but ptuning_version={ptuning_version!r}")
        if prefix_projection and not stored["mlp"]:
            raise ValueError(f"{path} holds a prefix without an MLP, but prefix_projection=True")
        config.pre_seq_len, config.prefix_projection, config.ptuning_version = stored["length"], stored["mlp"], version
    else:
        config.pre_seq_len, config.prefix_projection = pre_seq_len, prefix_projection
        config.ptuning_version = ptuning_version or "v2"
        if config.ptuning_version == "v1":
            config.prefix_projection = False
    config.validate_prefix()


def load_prefix(model, path: Path):
    """Put the prefix of a prefix-only folder into a model built for it."""
    state = {name.split("prefix_encoder.")[1]: tensor for name, tensor in iterate_weights(path)}
    encoder = model.transformer.prefix_encoder
    partitioned = []
    for name, parameter in encoder.named_parameters():
        wanted = getattr(parameter, "ds_shape", parameter.shape)
        if name not in state or state[name].shape != wanted:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"{path}: prefix_encoder.{name} must be {list(wanted)}, found {found}")
        partitioned += [parameter] if hasattr(parameter, "ds_id") else []
    if partitioned:  # by ZeRO-3, while the model was built
        from deepspeed import zero

        with zero.GatheredParameters(partitioned, modifier_rank=0):
            encoder.load_state_dict(state)
    else:
        encoder.load_state_dict(state)


def set_stop_ids(model, path: Path, base: Path, mode: str):
    """Make generate() stop where the family stops; the real ids are the tokenizer's, in `path` or else in `base`."""
    for folder in (path, base):
        if (folder / FAMILIES[mode].tokenizer_file).is_file():
            tokenizer = load_tokenizer(folder, mode=mode)
            model.generation_config.eos_token_id = stop_ids(tokenizer)
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            return


def stop_ids(tokenizer) -> list[int]:
    """Ids that end an answer in the tokenizer's family."""
    return [tokenizer.get_command(token) for token in FAMILIES[tokenizer.family].stop_tokens]
