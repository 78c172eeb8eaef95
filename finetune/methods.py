"""The fine-tuning methods: what is trainable, and what of it is saved.

A method is a frozen dataclass of its knobs with three things to say:
  `model_options()`        what load_model needs to know,
  `prepare(model)`         switch gradients on and off; returns the model to train,
  `saves`                  "adapter" | "prefix" | "model": what an exported checkpoint holds.
"""

import re
from dataclasses import dataclass, fields
from typing import ClassVar


def module_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def quantization(bits: int | None) -> dict:
    """load_model's option for --quantization_bit."""
    return {"quantization_bit": bits} if bits else {}


@dataclass(frozen=True)
class Freeze:
    """Train only the parameters whose names contain one of the given parts."""

    freeze_module_name: str
    saves: ClassVar[str] = "model"

    def model_options(self) -> dict:
        return {}

    def prepare(self, model: Module) -> Module:
        """Raises ValueError naming the layers when a part matches no parameter."""
        parts = module_names(self.freeze_module_name)
        names = [name for name, _ in model.named_parameters()]
        lost = [part for part in parts if not any(part in name for name in names)]
        if lost or not parts:
            found = [re.search(r"\b(layers?)\.(\d+)\.", name) for name in names]
            blocks = sorted({int(m.group(2)) for m in found if m})
            stack = next((m.group(1) for m in found if m), "")
            others = sorted(name for name, m in zip(names, found) if not m)
            raise ValueError(
                f"--freeze_module_name: {', '.join(map(repr, lost)) or 'an empty list'} matches no parameter; this model has "
                + (f"{stack}.{blocks[0]}. to {stack}.{blocks[-1]}. and " if blocks else "")
                + ", ".join(others)
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        return model


@dataclass(frozen=True)
class PTuning:
    """Train virtual tokens only: v2 = keys and values of every layer, v1 = vectors before the first embedding."""

    pre_seq_len: int
    prefix_projection: bool
    resolved_ptuning_version: str
    prefix_dropout: float
    quantization_bit: int | None = None
    saves: ClassVar[str] = "prefix"

    def model_options(self) -> dict:
        return quantization(self.quantization_bit) | {
            "pre_seq_len": self.pre_seq_len,
            "prefix_projection": self.prefix_projection and self.resolved_ptuning_version == "v2",
            "ptuning_version": self.resolved_ptuning_version,
        }

    def prepare(self, model: Module) -> Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("prefix_encoder" in name)
        model.config.prefix_dropout = self.prefix_dropout
        if self.resolved_ptuning_version == "v2":
            model.transformer.prefix_encoder.dropout.p = self.prefix_dropout
        return model


@dataclass(frozen=True)
class Lora:
    """LoRA (arXiv 2106.09685) through peft: W + alpha / r * B A, B zero at the start; and its variants (docs/methods.md)."""

    lora_dim: int
    lora_alpha: int
    lora_dropout: float
    lora_module_name: str
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    quantization_bit: int | None = None
    saves: ClassVar[str] = "adapter"

    def model_options(self) -> dict:
        return quantization(self.quantization_bit)

    def prepare(self, model: Module) -> Module:
        """Raises ValueError naming the linear modules when a name matches none."""
        from peft import LoraConfig, get_peft_model
        from torch import nn

        from finetune.lora import remember_start

        linear = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, m in model.named_modules()
                if isinstance(m, nn.Linear)
            }
        )
        wanted = module_names(self.lora_module_name)
        if wanted == ["all-linear"]:
            wanted = "all-linear"  # peft's word for all but the output layer
        elif lost := [name for name in wanted if name not in linear] or (not wanted and [""]):
            raise ValueError(
                f"--lora_module_name: {lost[0]!r} matches no linear module; this model has {', '.join(linear)}"
            )
        model = get_peft_model(
            model,
            LoraConfig(
                r=self.lora_dim,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules=wanted,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                init_lora_weights=True
                if self.init_lora_weights == "default"
                else self.init_lora_weights,
                bias="none",
                task_type="CAUSAL_LM"
                if hasattr(model, "prepare_inputs_for_generation")
                else "FEATURE_EXTRACTION",
                inference_mode=False,
            ),
        )
        if self.init_lora_weights.startswith(("pissa", "olora")):
            remember_start(model)
        return model


@dataclass(frozen=True)
class FullParameters:
    """Train everything; ZeRO-3 is the way to make it fit."""

    saves: ClassVar[str] = "model"

    def model_options(self) -> dict:
        return {}

    def prepare(self, model: Module) -> Module:
        return model.requires_grad_(True)


def make_method(config: MethodFlags) -> Method:
    """The method of `config.train_type`, its knobs taken from the fields of the same names."""
    method = METHODS[config.train_type]
    return method(**{name: getattr(config, name) for name in (f.name for f in fields(method))})


METHODS = {"freeze": Freeze, "ptuning": PTuning, "lora": Lora, "all": FullParameters}
