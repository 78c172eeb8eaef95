"""peft's adapters: which tensors of a file are read, and an error where some would not be.

peft itself warns of tensors that a file lacks and drops those that it does not know.
"""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from .adapter_folders import conversion
from .files import read_json, shorten
from .folders import reading
from .weights import read_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

PEFT = "base_model.model."
# What savers put before a module's name, some of it more than once: peft's own, TRL's of a model
# with a value head, and that of DeepSpeed's and torch's wrappers.
SAVED_PREFIXES = (PEFT, "base_model.", "pretrained_model.", "module.")
VALUE_HEAD = "v_head."  # TRL's: of a reward, no part of a language model
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Keys of adapter_config.json that peft does not know and that change no number: of the machine
# that saved it, of peft 0.2 and of ms-swift. The layout that they name shows in the tensors.
SAVERS_KEYS = (
    *("runtime_config", "enable_lora", "merge_weights", "swift_type", "model_key_mapping"),
    *("group_size", "lora_dtype", "use_qa_lora", "use_merged_linear"),
    *("lorap_lr_ratio", "lorap_emb_lr", "lr_ratio"),
)
# A layer of GlmForCausalLM, the name that transformers gives to a converted GLM-4.
SPLIT_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
# peft's starts of LoRA that take a part of the base's weights into A and B.
STARTS_IN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PROMPT = "prompt_embeddings"  # peft's name of what its PREFIX_TUNING trains


class AdapterFit(NamedTuple):
    """How an adapter file fits a model: names as peft saves them."""

    state: dict[str, Tensor]  # what the file holds
    missing: list[str]
    unexpected: list[str]
    # (name, shape in the file, shape in the model)
    misshapen: list[tuple[str, list[int], list[int]]]


def adapter_file(folder: Path) -> Path:
    """The weights of an adapter folder. Raises FileNotFoundError."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no adapter weights: wanted {' or '.join(ADAPTER_FILES)}")


def peft_name(name: str) -> str | None:
    """peft's name of a tensor that another saver named so; None for TRL's value head."""
    if name.startswith(VALUE_HEAD):
        return None
    while prefix := next((p for p in SAVED_PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    # ms-swift before 1.5
    name = re.sub(r"\.loramodule_\w+\.(lora_[AB])$", r".\1.weight", name)
    name = re.sub(r"\.loramodule_\w+\.(lora_[AB])", r".\1", name)
    # a whole model's state names the adapter, too
    return PEFT + re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)", r"\1", name)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """{name as peft saves it: tensor} of an adapter folder's weights.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they cannot be read, or two tensors have one name.
    """
    state: dict[str, Tensor] = {}
    for stored, tensor in read_tensors(adapter_file(folder)):
        name = peft_name(stored)
        if name in state:
            raise ValueError(f"{adapter_file(folder)} holds two tensors for {name}")
        if name:
            state[name] = tensor
    return state


def read_adapter_config(folder: Path) -> "PeftConfig":
    """peft's configuration of an adapter folder.

    Raises:
        ValueError: it is none, or of a kind that a ChatGLM here cannot be given.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / "adapter_config.json"
    values = read_json(path)
    kind = values.get("peft_type") or values.get("swift_type")
    values["peft_type"] = kind
    for key in SAVERS_KEYS:
        values.pop(key, None)
    if values.get("megatron_config") is not None:
        # peft would import the module that megatron_core names
        raise ValueError(
            f"{path}: an adapter of Megatron's layers (megatron_config) is not read here"
        )
    if kind is None:
        raise ValueError(f"{path} has no peft_type, such as LORA: it is no adapter's configuration")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path}: peft {peft_version()} knows no peft_type {shorten(kind)}")
    with reading(path):
        config = PeftConfig.from_peft_type(**values)
    if kind == "PREFIX_TUNING":
        raise ValueError(prefix_message(folder))
    if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
        raise ValueError(
            f"{path}: peft_type {kind} cannot be put on a ChatGLM here, wanted LORA "
            "or another kind that changes weights; virtual tokens are trained by "
            "--train_type ptuning"
        )
    config.inference_mode = True
    return config


def prefix_message(folder: Path) -> str:
    """What to do with an adapter of peft's PREFIX_TUNING."""
    return (
        f"{folder} holds a prefix of peft's PREFIX_TUNING, which is P-Tuning v2's here; "
        f"convert it: {conversion(folder)}"
    )


def refuse_layout(folder: Path, state: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors that belong to a ChatGLM, but in another layout.

    Args:
        state: `read_adapter` of the folder.
    """
    pairs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if PROMPT in name:
            raise ValueError(prefix_message(folder))
        if SPLIT_LAYER.match(name.removeprefix(PEFT)):
            raise ValueError(
                f"{folder} was made for GlmForCausalLM, whose layers have other names, such as "
                f"{name}; convert it: {conversion(folder)}"
            )
        if ".lora_A" in name:
            pairs[name.replace(".lora_A", ".lora_B")] = tensor
    for name, a in pairs.items():
        b = state.get(name)
        if b is not None and (b.dim() == 3 or (b.dim() == 2 and b.shape[1] != a.shape[0])):
            raise ValueError(
                f"{folder} holds LoRA of parts of a layer (MergedLinear, as peft 0.2 made it for "
                f"one target module), such as {name}; convert it: {conversion(folder)}"
            )


def refuse_changed_base(folder: Path, start: object) -> None:
    """Raises ValueError for LoRA relative to a base that its start changed.

    PeftModel repeats the start on the base where it loads such an adapter; nothing else does.

    Args:
        start: init_lora_weights of adapter_config.json.
    """
    if isinstance(start, str) and start.startswith(STARTS_IN_BASE):
        raise ValueError(
            f"{folder / 'adapter_config.json'}: init_lora_weights {start}: training changed its "
            "base, and the original one does not fit it; save it as a plain adapter where it was "
            "made (peft's save_pretrained: path_initial_model_for_weight_conversion, "
            "LLaMA-Factory: pissa_convert)"
        )


def peft_version() -> str:
    import peft

    return peft.__version__


def fit_adapter(model: nn.Module, state: dict[str, Tensor]) -> AdapterFit:
    """How the tensors of `read_adapter` fit a PeftModel with a new adapter of their kind."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    # A file may hold weights of the base too, such as a trained embedding.
    known = wanted.keys() | model.state_dict().keys()
    missing, misshapen = [], []
    for name, tensor in wanted.items():
        if name not in state:
            missing.append(name)
        elif state[name].shape != tensor.shape:
            misshapen.append((name, list(state[name].shape), list(tensor.shape)))
    unexpected = [name for name in state if name not in known]
    return AdapterFit(state, missing, unexpected, misshapen)


def load_adapter(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """The model in a PeftModel with the adapter of `folder`, in eval mode.

    Raises:
        FileNotFoundError: no adapter weights there.
        ValueError: a file is damaged, tensors are missing or would not be read, or the model is
            partly on disk.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    folder = Path(folder)
    config, state = read_adapter_config(folder), read_adapter(folder)
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    if getattr(model.config, "model_type", None) == "chatglm":
        refuse_layout(folder, state)
    name = str(model.name_or_path)
    remedy = f"does its adapter belong to {name}?"
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if "disk" in places:
        raise ValueError(
            f"{folder}: an adapter cannot be put on a base that is partly on disk; "
            "merge it (merge_lora.py)"
        )
    if "cpu" in places and len(places) > 1:
        # peft spreads base and adapter over the devices again, and reads the file itself.
        with reading(folder, remedy), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            spread = PeftModel.from_pretrained(model, str(folder), config=config)
        check_names(folder, name, fit_adapter(spread, state))
        return spread.eval()
    with reading(folder, remedy):
        adapted = peft_class(model, config)
    fit = fit_adapter(adapted, state)
    check_names(folder, name, fit)
    with reading(adapter_file(folder)):
        try:
            set_peft_model_state_dict(adapted, state)
        except RuntimeError:  # shapes; some kinds of adapter change their own to the file's
            check_shapes(folder, name, fit)
            raise
    return adapted.eval()


def check_names(folder: Path, base: str, fit: AdapterFit) -> None:
    """Raises ValueError where tensors are missing, or would not be read."""
    file = adapter_file(folder)
    if fit.missing:
        count = len(fit.missing) + len(fit.state) - len(fit.unexpected)
        hint = ""
        if fit.unexpected:
            hint = f"; {file.name} names it otherwise, such as {fit.unexpected[0]}"
        raise ValueError(
            f"{len(fit.missing)} of the {count} tensors that {folder / 'adapter_config.json'} asks "
            f"for are not in {file.name}, the first is {fit.missing[0]}{hint}"
        )
    if fit.unexpected:
        raise ValueError(
            f"{file}: {len(fit.unexpected)} of its {len(fit.state)} tensors have no place "
            f"in {base} by adapter_config.json, the first is {fit.unexpected[0]}"
        )


def check_shapes(folder: Path, base: str, fit: AdapterFit) -> None:
    """Raises ValueError for the first tensor of another shape than the model's."""
    for name, found, wanted in fit.misshapen:
        raise ValueError(
            f"{adapter_file(folder)} does not fit {base}: {name} has shape {found}, wanted {wanted}"
        ) from None
