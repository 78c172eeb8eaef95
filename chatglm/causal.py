"""Other causal language models than ChatGLM: transformers' GLM, Llama, Qwen2 and Qwen3.

Their classes and weights are transformers' own; here they are loaded with the checks that ChatGLM's
folders get, and their loss is computed without whole logits.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration import read_config
from .evidence import CAUSAL_TYPES
from .files import read_json, shorten
from .folders import check_json_files, code_note, reading, without_marks
from .kernels import OutputLayer
from .weights import check_fit, refuse_missing, stored_shapes, weight_files

# peft reads this old name of transformers' classes.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def causal_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a causal model's folder.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: its model_type is none of CAUSAL_TYPES, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model folder")
    values = read_json(path)
    if (kind := values.get("model_type")) not in CAUSAL_TYPES:
        raise ValueError(
            f'{path}: mode causal wants a "model_type" of {", ".join(CAUSAL_TYPES)}; '
            f"got {shorten(kind)}{code_note(values)}"
        )
    return read_config(folder)


def load_causal(
    folder: Path,
    *,
    dtype: torch.dtype | str | None,
    attn_implementation: str,
    device_map: str | dict[str, Any] | None,
    quantization: dict[str, Any],
) -> PreTrainedModel:
    """The model of a folder, in eval mode, by transformers' own class.

    Args:
        dtype: of the weights; None keeps the checkpoint's.
        quantization: from_pretrained's options for bitsandbytes; empty for none.
    Raises:
        ValueError: a file is damaged, or weights are missing or of another shape.
        FileNotFoundError: no config.json or no weights.
    """
    config = causal_config(folder)
    check_json_files(folder)
    check_causal_weights(folder, config)
    with reading(folder), without_marks(folder) as readable:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(readable),
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attn_implementation,
            device_map=device_map,
            output_loading_info=True,
            trust_remote_code=False,
            **quantization,
        )
    model, info = loaded
    refuse_missing(folder, sorted(info["missing_keys"]))
    model.name_or_path = model.config.name_or_path = str(folder)
    give_loss(model)
    return model.eval()


def check_causal_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError or FileNotFoundError where a folder's weights are not the model's."""
    weight_files(folder)
    if getattr(config, "quantization_config", None) is None:
        with reading(folder / "config.json"):
            model = model_on_meta(config)
        check_fit(folder, model, stored_shapes(folder))


def empty_causal(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device, without memory for its weights."""
    return model_on_meta(causal_config(folder)).eval()


def model_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory; by its class, as from_config would partition it in a ZeRO-3 run."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return model_class(config)


def give_loss(model: PreTrainedModel) -> None:
    """Make the output layer one that computes the loss in pieces (chatglm.kernels.OutputLayer)."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = OutputLayer  # a Linear with another forward, of the same parameters


def set_causal_stops(model: PreTrainedModel, stop_ids: list[int], pad_id: int | None) -> None:
    """Make generate() stop at the tokenizer's ends of an answer."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    model.generation_config.eos_token_id = stop_ids
    model.generation_config.pad_token_id = pad_id
