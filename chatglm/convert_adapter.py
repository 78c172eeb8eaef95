"""Adapters of other programs as adapters of this one: python -m chatglm.convert_adapter SOURCE
--base BASE --output FOLDER.

Read are files of LoRA tensors alone (ChatGLM-Tuning's and Chatglm_lora_multi-gpu's chatglm-lora.pt,
which needs --lora_alpha), adapter folders of peft 0.2 and of ms-swift, adapters made for
GlmForCausalLM, and prefixes of peft's PREFIX_TUNING. Written is a folder that every command takes.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_folders import TENSOR_SUFFIXES, lora_file, swift_adapter
from .commands import Parser, number, run_command
from .families import CHATGLM_FAMILIES, FAMILIES
from .files import read_json, shorten

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .configuration import ChatGLMConfig
    from .lora_layouts import Update
    from .modeling_head import ChatGLMCausalLM

ENABLED = "enable_lora"  # of adapter_config.json: the parts of a layer that MergedLinear updates
PLAIN_KEYS = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class AdapterSource:
    """What is converted.

    Attributes:
        path: the folder or the file, for errors.
        state: its tensors under peft's names.
        values: adapter_config.json; None where there is none.
    """

    path: Path
    state: "dict[str, Tensor]"
    values: dict[str, Any] | None


def read_source(path: Path) -> AdapterSource:
    """The tensors and the configuration of a file or folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder without an adapter, or tensors that cannot be read.
    """
    from .adapters import ADAPTER_FILES, adapter_file

    folder = path
    if path.is_file():
        if path.suffix not in TENSOR_SUFFIXES:
            raise ValueError(f"{path} is no file of tensors: wanted {', '.join(TENSOR_SUFFIXES)}")
        folder = path.parent if path.name in ADAPTER_FILES else path
    elif not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    else:
        folder = swift_adapter(path) or path
    if (folder / "adapter_config.json").is_file():
        file = path if path.is_file() else adapter_file(folder)
        return AdapterSource(folder, read_named(file), read_json(folder / "adapter_config.json"))
    file = path if path.is_file() else lora_file(folder) or path
    if file.is_dir():
        raise ValueError(f"{path} holds no adapter: no adapter_config.json, no chatglm-lora.pt")
    return AdapterSource(file, read_named(file), None)


def read_named(file: Path) -> "dict[str, Tensor]":
    """The tensors of a file under peft's names; raises ValueError for two of one name."""
    from .adapters import peft_name
    from .weights import read_tensors

    state = {}
    for stored, tensor in read_tensors(file):
        name = peft_name(stored)
        if name in state:
            raise ValueError(f"{file} holds two tensors for {name}")
        if name:
            state[name] = tensor
    return state


def convert_adapter(
    path: Path,
    base: str | Path,
    output: Path,
    *,
    lora_alpha: float | None = None,
    mode: str | None = None,
) -> str:
    """Write the adapter of `path` as one of `base` into the new folder `output`.

    Args:
        lora_alpha: LoRA's alpha, of a source that does not say it.
        mode: the base's family; found in its folder when None.
    Returns:
        What was converted, in words.
    Raises:
        ValueError: the source is none, does not fit the base, or lacks its alpha.
        FileNotFoundError: a folder is not there.
        OSError: the output cannot be written.
    """
    from .adapters import PROMPT
    from .configuration import ChatGLMConfig
    from .folders import check_folder, read_model_config
    from .loading import resolve_mode
    from .saving import held_aside, is_free

    base = check_folder(base, weights=True).resolve()
    if not is_free(output):
        raise ValueError(f"--output {output} is there already: name a new folder")
    source = read_source(path)
    family = resolve_mode(base, mode)
    if family not in CHATGLM_FAMILIES:
        title = FAMILIES[family].title
        raise ValueError(f"--base {base}: adapters are converted for ChatGLM, this is {title}")
    config = ChatGLMConfig.from_dict(read_model_config(base) | {"glm_family": family})
    with held_aside(output) as aside:
        if any(PROMPT in name for name in source.state):
            words = write_prefix(source, base, config, aside)
        else:
            words = write_lora(source, base, config, aside, lora_alpha)
        if output.is_dir():
            output.rmdir()
        aside.rename(output)
    return words


# ---- LoRA


def write_lora(
    source: AdapterSource, base: Path, config: "ChatGLMConfig", folder: Path, alpha: float | None
) -> str:
    """Write peft's files of a LoRA adapter; returns what they hold. Raises ValueError."""
    linear = linear_layers(model_outline(config))
    updates = read_updates(source, config, linear, alpha)
    check_updates(source.path, base, updates, linear)
    options = save_lora(source, updates, linear, str(base), folder)
    return f"LoRA of {len(updates)} layers, rank {options['r']}, alpha {options['lora_alpha']}"


def save_lora(
    source: AdapterSource,
    updates: "dict[str, Update]",
    linear: dict[str, tuple[int, int]],
    base: str,
    folder: Path,
) -> dict[str, Any]:
    """Write peft's files of updates into `folder`; returns its LoraConfig's fields of them.

    Args:
        source: says the dropout.
        linear: {layer: (outputs, inputs)} of every linear layer of the model.
        base: the model's folder, by which the adapter names it.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from .adapters import ADAPTER_FILES, PEFT
    from .lora_layouts import lora_options

    options: dict[str, Any] = lora_options(updates, linear)
    LoraConfig(
        **options,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        lora_dropout=float((source.values or {}).get("lora_dropout") or 0.0),
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {}
    for module, update in updates.items():
        tensors[f"{PEFT}{module}.lora_A.weight"] = update.a.contiguous()
        tensors[f"{PEFT}{module}.lora_B.weight"] = update.b.contiguous()
    save_file(tensors, folder / ADAPTER_FILES[0], {"format": "pt"})
    return options


def model_outline(config: "ChatGLMConfig") -> "ChatGLMCausalLM":
    """The model of a configuration on the meta device, without memory for its weights."""
    import torch

    from .loading import model_class_of

    with torch.device("meta"):
        return model_class_of(config)(config)


def linear_layers(model: "nn.Module") -> dict[str, tuple[int, int]]:
    """{name: (outputs, inputs)} of a model's linear layers."""
    from torch import nn

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = (module.out_features, module.in_features)
    return layers


def read_updates(
    source: AdapterSource,
    config: "ChatGLMConfig",
    linear: dict[str, tuple[int, int]],
    lora_alpha: float | None,
) -> "dict[str, Update]":
    """The updates of the base's layers that a source holds. Raises ValueError."""
    from .adapters import SPLIT_LAYER
    from .lora_layouts import as_updates, fuse_split, pair_tensors

    pairs = pair_tensors(source.path, source.state)
    settings = Scaling.of(source, lora_alpha)
    outputs = {name: size[0] for name, size in linear.items()}
    updates = as_updates(pairs, outputs, settings, settings.enabled)
    if not any(SPLIT_LAYER.fullmatch(module) for module in updates):
        return updates
    if config.glm_family == "glm":
        raise ValueError(
            f"{source.path} was made for GlmForCausalLM, whose layers ChatGLM-6B does not have; "
            "its base is a ChatGLM2, ChatGLM3 or GLM-4"
        )
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return fuse_split(source.path, updates, sizes)


@dataclass(frozen=True)
class Scaling:
    """What LoRA multiplies B A by: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Attributes:
        alphas: of modules whose alpha is another, as peft's alpha_pattern.
        rank: that every module has; None where nothing says it, or modules differ.
        enabled: parts of a layer that MergedLinear updates; None where nothing says them.
    """

    alpha: float
    alphas: dict[str, float]
    rank: int | None
    use_rslora: bool
    enabled: list[bool] | None

    @classmethod
    def of(cls, source: AdapterSource, lora_alpha: float | None) -> "Scaling":
        """What a source and --lora_alpha say. Raises ValueError where neither or both do."""
        from .adapters import refuse_changed_base

        if source.values is None:
            if lora_alpha is None:
                raise ValueError(
                    f"{source.path} does not say its alpha: give --lora_alpha, the lora_alpha of "
                    "its training (ChatGLM-Tuning and Chatglm_lora_multi-gpu: 32)"
                )
            return cls(lora_alpha, {}, None, False, None)
        file = source.path / "adapter_config.json"
        values = source.values
        kind = values.get("peft_type") or values.get("swift_type")
        if kind != "LORA":
            raise ValueError(f"{file}: wanted peft_type LORA, got {shorten(kind)}")
        refuse_changed_base(source.path, values.get("init_lora_weights"))
        for key in PLAIN_KEYS:
            if values.get(key):
                raise ValueError(f"{file}: {key} is not converted; merge it where it was made")
        alpha = checked_setting(file, "lora_alpha", values.get("lora_alpha"), (int, float))
        if lora_alpha not in (None, alpha):
            raise ValueError(f"--lora_alpha {lora_alpha:g} contradicts {file}: {alpha:g}")
        alphas = checked_setting(file, "alpha_pattern", values.get("alpha_pattern") or {}, (dict,))
        for name, own in alphas.items():
            checked_setting(file, f"alpha_pattern of {name}", own, (int, float))
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"{file}: alpha_pattern {name!r} is no pattern: {error}") from None
        rank = None if values.get("rank_pattern") else values.get("r")
        enabled = values.get(ENABLED)
        if enabled is not None:
            checked_setting(file, ENABLED, enabled, (list,))
            if not enabled or not all(isinstance(is_on, bool) for is_on in enabled):
                raise ValueError(f"{file}: {ENABLED} must be true or false, got {enabled}")
        return cls(alpha, alphas, rank, bool(values.get("use_rslora")), enabled)

    def __call__(self, module: str, rank: int) -> float:
        """The factor of a module's update of this rank; raises ValueError for another rank."""
        from peft.utils.other import get_pattern_key

        if self.rank not in (None, rank):
            raise ValueError(f"adapter_config.json says r {self.rank}, {module} has rank {rank}")
        key = get_pattern_key(list(self.alphas), module)
        return self.alphas.get(key, self.alpha) / (rank**0.5 if self.use_rslora else rank)


def checked_setting(file: Path, name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """`value`, of one of these types. Raises ValueError where it is of another."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{file}: {name} must be {wanted}, got {shorten(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{file}: {name} must be a number, got {value}")
    return value


def check_updates(
    source: Path, base: Path, updates: "dict[str, Update]", linear: dict[str, tuple[int, int]]
) -> None:
    """Raises ValueError for an update of no layer of the base, or of another shape."""
    for module, update in updates.items():
        found = (len(update.b), update.a.shape[-1])
        if module not in linear:
            raise ValueError(f"{source} does not fit {base}: it has no linear layer {module}")
        if found != linear[module]:
            raise ValueError(
                f"{source} does not fit {base}: {module} is {list(linear[module])} there, "
                f"its LoRA is of {list(found)}"
            )


# ---- a prefix


def write_prefix(source: AdapterSource, base: Path, config: "ChatGLMConfig", folder: Path) -> str:
    """Write the folder of a P-Tuning v2 prefix; returns what it holds.

    peft saves what its encoder gives, one row per virtual token: for every layer its key, then its
    value, head by head (PeftModel.get_prompt), which is the order of ChatGLM's P-Tuning v2 too.

    Raises:
        ValueError: it is another kind's, or of other sizes than the base.
    """
    from safetensors.torch import save_file

    from .weights import PREFIX

    kind = (source.values or {}).get("peft_type")
    if kind not in (None, "PREFIX_TUNING"):
        raise ValueError(
            f"{source.path}: virtual tokens of {shorten(kind)} cannot be put on a ChatGLM here; "
            "wanted PREFIX_TUNING"
        )
    tensor = next(iter(source.state.values())).detach()
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    if len(source.state) != 1 or tensor.dim() != 2 or tensor.shape[1] != width:
        raise ValueError(
            f"{source.path} does not fit {base}: wanted one tensor of (virtual tokens, {width}), "
            f"got {list(tensor.shape)}; peft's token_dim must be that of the keys"
        )
    config.pre_seq_len = len(tensor)
    config.ptuning_version, config.prefix_projection = "v2", False
    config.validate_prefix()
    config.save_pretrained(str(folder))
    path = folder / "config.json"
    values = read_json(path) | {"_name_or_path": str(base)}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    name = f"{PREFIX}embedding.weight"
    save_file({name: tensor.contiguous()}, folder / "model.safetensors", {"format": "pt"})
    return f"a P-Tuning v2 prefix of {len(tensor)} virtual tokens"


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="chatglm.convert_adapter", description=__doc__)
    parser.add_argument("source", type=Path, help="the file or folder of the adapter")
    parser.add_argument("--base", required=True, help="its base model: a folder or a hub's name")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--lora_alpha",
        type=number(above=True),
        help="LoRA's alpha, where the source does not say it",
    )
    parser.add_argument(
        "--mode", choices=CHATGLM_FAMILIES, help="family (default: found in the base folder)"
    )
    args = parser.parse_args(argv)

    def work() -> None:
        words = convert_adapter(
            args.source, args.base, args.output, lora_alpha=args.lora_alpha, mode=args.mode
        )
        print(f"{args.output}: {words}, of {args.base}")

    return run_command(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
