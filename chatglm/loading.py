"""Models and tokenizers from folders.

Read are published checkpoints, this toolkit's own, LoRA adapters and P-Tuning prefixes.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .adapters import adapter_file, fit_adapter, load_adapter, peft_name, read_adapter
from .causal import load_causal, set_causal_stops
from .checksums import check_folder_files, checks_folder, is_small, is_top
from .configuration import (
    ChatGLM1Config,
    ChatGLMConfig,
    GLMBaseConfig,
    PanguConfig,
    read_config,
    unclear_family_message,
)
from .evidence import contradicts, infer_family
from .families import FAMILIES, OWN_FAMILIES
from .family_tokenizer import FamilyTokenizer
from .folders import (
    check_folder,
    check_json_files,
    find_base,
    named_base,
    read_model_config,
    reading,
)
from .hub import recover_folder, resolve_folder
from .modeling_glm import ChatGLM1ForConditionalGeneration
from .modeling_glm2 import ChatGLM2ForConditionalGeneration
from .modeling_glm_base import GLMForConditionalGeneration
from .modeling_head import ChatGLMCausalLM
from .modeling_pangu import PanguForCausalLM
from .tokenization import ChatGLMTokenizer
from .tokenization_causal import CausalTokenizer
from .weights import (
    PREFIX,
    StoredPrefix,
    iterate_weights,
    open_safetensors,
    read_bin,
    read_tensors,
    refuse_missing,
    stored_prefix,
    weight_files,
)

__all__ = [
    "PREFIX",
    "adapter_file",
    "base_fingerprint",
    "check_folder",
    "find_base",
    "fit_adapter",
    "iterate_weights",
    "load_adapter",
    "load_model",
    "load_prefix",
    "load_tokenizer",
    "model_class_of",
    "named_base",
    "open_safetensors",
    "peft_name",
    "quantization_options",
    "quiet_transformers",
    "read_adapter",
    "read_bin",
    "read_config",
    "read_tensors",
    "resolve_mode",
    "set_prefix",
    "set_stop_ids",
    "stop_ids",
    "stored_prefix",
    "weight_files",
]

if TYPE_CHECKING:
    from peft import PeftModel

# Tensors that say nothing about which model a folder holds: tables, tied copies, P-Tuning's own.
NOT_IDENTITY = (".attn.bias", ".attn.masked_bias", "inv_freq", "lm_head.weight", "prefix_encoder.")


def resolve_mode(path: str | Path, mode: str | None = None, base: str | Path | None = None) -> str:
    """The family of a folder: `mode`, else what the folder or its base shows.

    Args:
        base: the base model of an adapter or prefix folder; by default the one that it names.
    Raises:
        ValueError: `mode` is no family, the folder's files say that it cannot be that family or
            nothing of its family, or its config.json is of a model of no family.
        FileNotFoundError: there is no such folder.
    """
    path = check_folder(path)
    base = resolve_folder(base) if base else None
    inferred = infer_family(path, base)
    config: dict[str, Any] = {}
    if inferred != "causal" and (path / "config.json").is_file():
        config = read_model_config(path)
    if mode is None:
        mode = inferred
        if mode is None and (path / "adapter_config.json").is_file():
            # if there is none, say so
            mode = infer_family(path, base_of_adapter(path, base, weights=False))
        if mode is None:
            if (ratio := config.get("rope_ratio", 1)) != 1:
                raise ValueError(f"{path}/config.json: {unclear_family_message(ratio)}")
            raise ValueError(
                f"{path} does not tell which of {', '.join(OWN_FAMILIES)} it is: say --mode "
                '(in Python mode="glm3"), or set "glm_family" in its config.json'
            )
    elif mode not in FAMILIES:
        raise ValueError(f"mode must be one of {', '.join(FAMILIES)}; got {mode!r}")
    elif evidence := contradicts(path, mode, base):
        raise ValueError(f"mode {mode!r} does not fit {path}: {evidence}")
    return mode


def base_of_adapter(path: Path, base: str | Path | None, *, weights: bool = True) -> Path:
    """The folder of an adapter's base model: `base`, else the one that it names.

    Raises:
        ValueError: it names none, or that is an adapter itself.
        FileNotFoundError: it is not there.
    """
    folder = find_base(path, base, weights=weights)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: its base model {folder} is an adapter itself; "
            "merge that one first (merge_lora.py)"
        )
    return folder


@checks_folder(is_small)
def load_tokenizer(
    path: str | Path,
    *,
    mode: str | None = None,
    base: str | Path | None = None,
    prompt_style: str | None = None,
) -> FamilyTokenizer:
    """The tokenizer of a folder; of the base model, where an adapter folder has none of its own.

    Args:
        base: the base model of an adapter or prefix folder; by default the one that it names.
        prompt_style: "chat" or "raw" (a text to go on with); None: as the folder was trained.
    Returns:
        a ChatGLMTokenizer, or a CausalTokenizer for the family causal.
    Raises:
        ValueError: `mode` contradicts the folder, or a file of the tokenizer is damaged.
        FileNotFoundError: no tokenizer model there.
    """
    path = check_folder(path)
    mode = resolve_mode(path, mode, base)
    given, base = base, base or named_base(path)
    if not (path / FAMILIES[mode].tokenizer_file).is_file() and base:
        # a published config.json names its model too, which is no base
        is_base = given or (path / "adapter_config.json").is_file()
        source = recover_folder(base, weights=False) if is_base else Path(base)
        path = source if source.is_dir() else path
    style = {"prompt_style": prompt_style} if prompt_style else {}
    if mode == "causal":
        return CausalTokenizer.from_pretrained(str(path), **style)
    return ChatGLMTokenizer.from_pretrained(str(path), family=mode, **style)


@checks_folder()
def load_model(
    path: str | Path,
    *,
    mode: str | None = None,
    dtype: torch.dtype | str | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    ptuning_version: str | None = None,
    attn_implementation: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    base: str | Path | None = None,
    quantization_bit: int | None = None,
    keep_quantized: bool = False,
) -> "PreTrainedModel | PeftModel":
    """A ChatGLM, or another causal model, with its output layer, in eval mode.

    Args:
        path: a folder of weights (safetensors, or .bin read with weights_only), a peft adapter
            folder, or a folder that holds only a P-Tuning prefix; or a hub's name of such a model
            (chatglm.hub).
        mode: a key of FAMILIES; found in the folder when None.
        dtype: of the weights; None keeps the checkpoint's.
        pre_seq_len, prefix_projection, ptuning_version: a new P-Tuning prefix of so many virtual
            tokens; a folder that has a prefix needs none of them, and any that is given must agree
            with it.
        base: the base model of an adapter or prefix folder; by default the one that it names.
        quantization_bit: 4 (nf4, double quantisation) or 8 (int8) bits for the linear layers,
            except the output layer and a prefix's own; computed in `dtype`. Needs bitsandbytes,
            and the fp16 release.
        keep_quantized: leave the weights of a published int8 or int4 folder packed, which are
            dequantised otherwise.
        verify: how files are compared with the folder's checksums.json: fast, full or off.
    Returns:
        the class of `model_class_of`, for the family causal transformers' own class; for an adapter
        folder, that in a PeftModel.
    Raises:
        ValueError: mode, prefix or base contradict the folder, a file is damaged, or the weights
            do not fit.
        FileNotFoundError: no such folder, or no weights in it.
    """
    path = check_folder(path)
    check_json_files(path)
    mode = resolve_mode(path, mode, base)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_bit": quantization_bit,
        "keep_quantized": keep_quantized,
    }
    if (path / "adapter_config.json").is_file():
        model = load_model(base_of_adapter(path, base), mode=mode, **options)
        assert isinstance(model, PreTrainedModel)  # its folder is no adapter's
        return load_adapter(model, path)

    if mode == "causal":
        refuse_prefix(path, pre_seq_len, keep_quantized)
        return load_causal_ready(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization=quantization_options(quantization_bit, dtype),
        )
    stored = stored_prefix(path)
    with reading(path / "config.json"):
        config = ChatGLMConfig.from_dict(read_model_config(path) | {"glm_family": mode})
    if stored or pre_seq_len:
        set_prefix(config, path, stored, pre_seq_len, prefix_projection, ptuning_version)
    weights = path
    if stored and stored["only"]:
        weights = check_folder(find_base(path, base))
        check_folder_files(weights, wanted=is_top)
    is_prefix_new = weights != path or (stored is None and bool(pre_seq_len))
    chatglm = load_whole(weights, config, is_prefix_new, **options)
    if weights != path:
        load_prefix(chatglm, path)
    set_stop_ids(chatglm, path, weights, mode)
    return chatglm.eval()


def refuse_prefix(path: Path, pre_seq_len: int | None, keep_quantized: bool) -> None:
    """Raises ValueError where a causal model is asked for what ChatGLM alone has here."""
    if pre_seq_len:
        raise ValueError(
            f"{path}: P-Tuning's virtual tokens are for ChatGLM; train this model by lora, freeze "
            "or all"
        )
    if keep_quantized:
        raise ValueError(f"{path}: keep_quantized is for ChatGLM's int8 and int4 releases")


def load_causal_ready(folder: Path, **options: Any) -> PreTrainedModel:
    """`load_causal`, and generate() stops where the tokenizer's answers end."""
    with quiet_transformers():
        model = load_causal(folder, **options)
    if (folder / FAMILIES["causal"].tokenizer_file).is_file():
        tokenizer = CausalTokenizer.from_pretrained(str(folder))
        pad = tokenizer.pad_token_id
        set_causal_stops(model, tokenizer.stop_ids, pad if isinstance(pad, int) else None)
    return model


def load_whole(
    weights: Path,
    config: ChatGLMConfig,
    is_prefix_new: bool,
    *,
    dtype: torch.dtype | str | None,
    attn_implementation: str,
    device_map: str | dict[str, Any] | None,
    quantization_bit: int | None,
    keep_quantized: bool,
) -> ChatGLMCausalLM:
    """The model of a folder of weights; the options are `load_model`'s.

    Args:
        is_prefix_new: the weights may lack the prefix that the configuration names.
    Raises:
        ValueError: a tensor is missing, or ChatGLM-6B is asked for flash attention.
    """
    config.name_or_path = str(weights)
    if "flash" in attn_implementation and isinstance(config, ChatGLM1Config):
        raise ValueError(
            "ChatGLM-6B's bidirectional context has no flash kernel; "
            'use attn_implementation="sdpa"'
        )
    # transformers would report a new prefix as missing; what is really missing is an error below.
    with quiet_transformers():
        model, info = model_class_of(config).from_pretrained(
            str(weights),
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            device_map=device_map,
            output_loading_info=True,
            keep_quantized=keep_quantized,
            **quantization_options(quantization_bit, dtype),
        )
    # That the config names a prefix is not enough.
    missing = sorted(info["missing_keys"])
    if is_prefix_new:
        missing = [name for name in missing if "prefix_encoder." not in name]
    refuse_missing(weights, missing)
    return model


def model_class_of(config: ChatGLMConfig) -> type[ChatGLMCausalLM]:
    """The class of the model with its output layer."""
    if isinstance(config, ChatGLM1Config):
        return ChatGLM1ForConditionalGeneration
    if isinstance(config, PanguConfig):
        return PanguForCausalLM
    if isinstance(config, GLMBaseConfig):
        return GLMForConditionalGeneration
    return ChatGLM2ForConditionalGeneration


def quantization_options(bits: int | None, dtype: torch.dtype | str | None) -> dict[str, Any]:
    """from_pretrained's options for frozen weights in 4 or 8 bits.

    Sources: QLoRA, arXiv 2305.14314 (4); LLM.int8(), arXiv 2208.07339 (8).

    Raises:
        ValueError: bits is neither, or bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    if bits not in (4, 8):
        raise ValueError(f"quantization_bit must be 4 or 8; got {bits}")
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    # It warns at every product that int8 rounds by way of fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if isinstance(dtype, torch.dtype):
        compute = dtype
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            llm_int8_skip_modules=["lm_head", "output_layer", "prefix_encoder"],
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    }


def require_bitsandbytes() -> None:
    """Raises ValueError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'quantization_bit needs bitsandbytes: pip install -e ".[qlora]" ({error})'
        ) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bars and no loading report."""
    level = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def base_fingerprint(path: str | Path) -> str:
    """sha256 over names, shapes and 16 values of every weight.

    The same for fp32, fp16 and resharded copies of a model.
    """
    digest = hashlib.sha256()
    samples = {}
    for name, tensor in iterate_weights(path):
        if not any(part in name for part in NOT_IDENTITY):
            flat = tensor.flatten()
            step = max(1, flat.numel() // 16)
            # To bfloat16 by way of fp16, as a half-precision copy was rounded: rounding fp32 to
            # bfloat16 at once may give another value.
            values = flat[::step][:16].half().to(torch.bfloat16).float()
            samples[name] = (tuple(tensor.shape), values.numpy().tobytes())
    for name in sorted(samples):
        shape, content = samples[name]
        digest.update(f"{name}{shape}".encode() + content)
    return digest.hexdigest()


def set_prefix(
    config: ChatGLMConfig,
    path: str | Path,
    stored: StoredPrefix | None,
    pre_seq_len: int | None,
    prefix_projection: bool,
    ptuning_version: str | None,
) -> None:
    """Set the config's prefix fields from the caller's arguments, the config and the weights.

    Args:
        stored: `stored_prefix` of the folder.
    Raises:
        ValueError: they contradict each other.
    """
    asked = pre_seq_len or config.pre_seq_len
    if stored and asked and asked != stored["length"]:
        source = f"pre_seq_len={pre_seq_len}"
        if not pre_seq_len:
            source = f"its config.json says pre_seq_len {config.pre_seq_len}"
        raise ValueError(
            f"{path} holds a prefix of {stored['length']} virtual tokens, but {source}"
        )
    if stored is None:
        config.pre_seq_len = pre_seq_len
        config.ptuning_version = ptuning_version or "v2"
        config.prefix_projection = prefix_projection and config.ptuning_version != "v1"
    else:
        version = config.ptuning_version or "v2"
        if ptuning_version not in (None, version):
            raise ValueError(
                f"{path} holds a P-Tuning {version} prefix, but ptuning_version={ptuning_version!r}"
            )
        if prefix_projection and not stored["mlp"]:
            raise ValueError(f"{path} holds a prefix without an MLP, but prefix_projection=True")
        config.pre_seq_len = stored["length"]
        config.prefix_projection = stored["mlp"]
        config.ptuning_version = version
    config.validate_prefix()


def load_prefix(model: ChatGLMCausalLM, path: Path) -> None:
    """Put the prefix of a prefix-only folder into a model built for it."""
    state = {name.split("prefix_encoder.")[1]: tensor for name, tensor in iterate_weights(path)}
    encoder = model.transformer.prefix_encoder
    if encoder is None:
        raise ValueError(f"{path} holds a prefix, but the model was built without one")
    partitioned = []
    for name, parameter in encoder.named_parameters():
        wanted = getattr(parameter, "ds_shape", parameter.shape)
        if name not in state or state[name].shape != wanted:
            found = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"{path}: prefix_encoder.{name} must be {list(wanted)}, found {found}")
        if hasattr(parameter, "ds_id"):
            partitioned.append(parameter)
    if partitioned:  # by ZeRO-3, while the model was built
        from deepspeed import zero

        with zero.GatheredParameters(partitioned, modifier_rank=0):
            encoder.load_state_dict(state)
    else:
        encoder.load_state_dict(state)


def set_stop_ids(model: ChatGLMCausalLM, path: Path, base: Path, mode: str) -> None:
    """Make generate() stop at the family's stop tokens.

    Their ids come from the tokenizer in `path`, or else in `base`.
    """
    for folder in (path, base):
        if (folder / FAMILIES[mode].tokenizer_file).is_file():
            tokenizer = load_tokenizer(folder, mode=mode)
            model.generation_config.eos_token_id = stop_ids(tokenizer)
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            return


def check_vocabulary(model: "PreTrainedModel | PeftModel", tokenizer: FamilyTokenizer) -> None:
    """Raises ValueError where a tokenizer writes ids that a ChatGLM or relative does not know."""
    rows, family = model.config.get_text_config().vocab_size, tokenizer.family
    if family not in OWN_FAMILIES:
        return  # other models' tokenizers may have tokens that no text becomes
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{model.name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{rows}: they belong to different models"
        )
    begins = {"glm": "<sop>", "glm_base": "<|startofpiece|>"}.get(family)
    body = getattr(model, "transformer", None)
    if begins and body is not None:
        own, known = tokenizer.convert_tokens_to_ids(begins), body.marks.sop
        if own != known:
            raise ValueError(
                f"{model.name_or_path}: its tokenizer's {begins} is {own}, by config.json it is "
                f"{known}: they belong to different models"
            )


def stop_ids(tokenizer: FamilyTokenizer) -> list[int]:
    """Ids that end an answer in the tokenizer's family."""
    return tokenizer.stop_ids
