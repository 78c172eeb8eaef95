"""The fine-tuning methods: what is trainable, and what of it is saved.

A method is a frozen dataclass of its knobs, with the attributes of `Method`. Free of torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

LAYER = re.compile(r"\b(layers?|h)\.(\d+)\.")  # in a parameter's name


class TrainableModel(Protocol):
    """What the methods use of a model, a torch.nn.Module."""

    def named_parameters(self) -> Iterator[tuple[str, Any]]: ...

    def named_modules(self) -> Iterator[tuple[str, Any]]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...


class Method(Protocol):
    """A fine-tuning method.

    Attributes:
        saves: what an exported checkpoint holds, "adapter", "prefix" or "model".
    """

    saves: ClassVar[str]

    def model_options(self) -> dict[str, Any]:
        """Options of load_model."""

    def make_trainable(self, model: TrainableModel) -> Any:
        """Set which parameters require a gradient; returns the model to train."""


class ConfigOfMethod(Protocol):
    """A configuration: `train_type` and the fields of the method of that name."""

    @property
    def train_type(self) -> str: ...


def module_names(text: str) -> list[str]:
    """The names in a comma list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def quantization(bits: int | None) -> dict[str, Any]:
    """The option of load_model for --quantization_bit."""
    return {"quantization_bit": bits} if bits else {}


@dataclass(frozen=True)
class Freeze:
    """Train only the parameters whose names contain one of the given parts.

    With `freeze_ratio`, all but the first int(freeze_ratio * layers) layers.
    """

    freeze_module_name: str
    freeze_ratio: float = 0.0
    saves: ClassVar[str] = "model"

    def model_options(self) -> dict[str, Any]:
        return {}

    def make_trainable(self, model: TrainableModel) -> Any:
        """Raises ValueError, with the parameters' names, when a part matches no parameter."""
        names = [name for name, _ in model.named_parameters()]
        if self.freeze_ratio:
            frozen = first_layers(names, self.freeze_ratio)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(layer_number(name) not in frozen)
            return model
        parts = module_names(self.freeze_module_name)
        text = "\n".join(names)
        unmatched = [part for part in parts if part not in text]
        if unmatched or not parts:
            wanted = ", ".join(map(repr, unmatched)) or "an empty list"
            raise ValueError(
                f"--freeze_module_name: {wanted} matches no parameter; "
                f"this model has {summarise_names(names)}"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(map(name.__contains__, parts)))
        return model


def layer_number(name: str) -> int | None:
    """The number of the layer that a parameter belongs to; None for one outside of the layers."""
    match = LAYER.search(name)
    return int(match.group(2)) if match else None


def first_layers(names: list[str], ratio: float) -> set[int | None]:
    """The numbers of the first int(ratio * layers) layers of a model's parameters.

    Raises:
        ValueError: that is none of its layers.
    """
    layers = len({layer_number(name) for name in names} - {None})
    frozen = int(ratio * layers)
    if not frozen:
        raise ValueError(f"--freeze_ratio {ratio:g} of {layers} layers is no whole layer")
    return set(range(frozen))


def summarise_names(names: list[str]) -> str:
    """The names of parameters, those of the layers as "layers.0. to layers.27."."""
    stack = ""
    numbers = []
    others = []
    for name in names:
        match = LAYER.search(name)
        if match:
            stack = stack or match.group(1)
            numbers.append(int(match.group(2)))
        else:
            others.append(name)
    text = ", ".join(sorted(others))
    if not numbers:
        return text
    return f"{stack}.{min(numbers)}. to {stack}.{max(numbers)}. and {text}"


@dataclass(frozen=True)
class PTuning:
    """Train virtual tokens only.

    v2: keys and values of every layer; v1: vectors before the first embedding.
    """

    pre_seq_len: int
    prefix_projection: bool
    resolved_ptuning_version: str
    prefix_dropout: float
    quantization_bit: int | None = None
    saves: ClassVar[str] = "prefix"

    def model_options(self) -> dict[str, Any]:
        return quantization(self.quantization_bit) | {
            "pre_seq_len": self.pre_seq_len,
            "prefix_projection": self.prefix_projection and self.resolved_ptuning_version == "v2",
            "ptuning_version": self.resolved_ptuning_version,
        }

    def make_trainable(self, model: TrainableModel) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prefix_encoder" in name)
        model.config.prefix_dropout = self.prefix_dropout
        if self.resolved_ptuning_version == "v2":
            model.transformer.prefix_encoder.dropout.p = self.prefix_dropout
        return model


SPLIT_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Lora:
    """LoRA (arXiv 2106.09685) by peft, and its variants (docs/methods.md).

    W + alpha / r * B A, with B zero at the start, or with the A and B of `adapter`, a folder whose
    configuration then counts in place of the fields (finetune.start_adapter).
    """

    lora_dim: int
    lora_alpha: int
    lora_dropout: float
    lora_module_name: str
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    adapter: str | None = None
    quantization_bit: int | None = None
    saves: ClassVar[str] = "adapter"

    def model_options(self) -> dict[str, Any]:
        return quantization(self.quantization_bit)

    def make_trainable(self, model: TrainableModel) -> Any:
        """Raises ValueError naming the linear modules when a name matches none."""
        from peft import LoraConfig, get_peft_model
        from torch import nn

        from finetune.lora import continue_adapter, remember_start

        if self.adapter:
            return continue_adapter(model, self.adapter, self.lora_dropout)
        linear: set[str] = set()
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                linear.add(path.rsplit(".", 1)[-1])
        is_default = self.init_lora_weights == "default"
        generates = hasattr(model, "prepare_inputs_for_generation")
        start: Any = True if is_default else self.init_lora_weights  # peft lists its names
        config = LoraConfig(
            r=self.lora_dim,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules(sorted(linear)),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=start,
            bias="none",
            task_type="CAUSAL_LM" if generates else "FEATURE_EXTRACTION",
            inference_mode=False,
        )
        base: Any = model  # of peft's types
        adapted = get_peft_model(base, config)
        if self.init_lora_weights.startswith(("pissa", "olora")):
            remember_start(adapted)
        return adapted

    def target_modules(self, linear: list[str]) -> list[str] | str:
        """peft's target_modules, of a model whose linear modules have the names `linear`."""
        wanted = module_names(self.lora_module_name)
        if "query_key_value" in wanted and "query_key_value" not in linear:
            # The same layer in three, as GLM, Llama and Qwen have it.
            place = wanted.index("query_key_value")
            wanted[place : place + 1] = [name for name in SPLIT_QKV if name in linear]
        if wanted == ["all-linear"]:
            return "all-linear"  # peft's word for all but the output layer
        for name in wanted or [""]:
            if name not in linear:
                raise ValueError(
                    f"--lora_module_name: {name!r} matches no linear module; "
                    f"this model has {', '.join(linear)}"
                )
        return wanted


@dataclass(frozen=True)
class FullParameters:
    """Train all parameters; large models need ZeRO-3 for it."""

    saves: ClassVar[str] = "model"

    def model_options(self) -> dict[str, Any]:
        return {}

    def make_trainable(self, model: TrainableModel) -> Any:
        return model.requires_grad_(True)


def make_method(config: ConfigOfMethod) -> Method:
    """The method of `config.train_type`, with the configuration's fields of the same names."""
    method = METHODS[config.train_type]
    values = {}
    for f in fields(method):
        if hasattr(config, f.name):  # a task without the flag has the method's default
            values[f.name] = getattr(config, f.name)
    return method(**values)


METHODS: dict[str, type[Any]] = {
    "freeze": Freeze,
    "ptuning": PTuning,
    "lora": Lora,
    "all": FullParameters,
}
