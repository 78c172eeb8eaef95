"""A model over several GPUs of one machine, by the functions of THUDM's utils.py."""

import os
from typing import Any

import torch

from .families import CHATGLM_FAMILIES
from .folders import check_folder, find_base, read_model_config

# Modules beside the layers that stay on the first GPU, for ChatGLM-6B and for the others.
ENDS = {
    "glm": (
        "transformer.word_embeddings",
        "transformer.final_layernorm",
        "transformer.prefix_encoder",
        "lm_head",
    ),
    "glm2": (
        "transformer.embedding",
        "transformer.encoder.final_layernorm",
        "transformer.prefix_encoder",
        "transformer.output_layer",
    ),
}
LAYERS = {"glm": "transformer.layers", "glm2": "transformer.encoder.layers"}


def auto_configure_device_map(
    num_gpus: int, *, num_layers: int = 28, family: str = "glm2"
) -> dict[str, int]:
    """{module: GPU}: layers in equal parts; the ends, which count as two layers, on GPU 0.

    Source: utils.py of ChatGLM-6B and ChatGLM2-6B. accelerate takes it, as a `device_map` too.

    Args:
        family: a key of FAMILIES; glm2, glm3 and glm4 have the same modules.
    Raises:
        ValueError: there is no GPU, or fewer layers than GPUs; the family is no ChatGLM.
    """
    if family not in CHATGLM_FAMILIES:
        raise ValueError(
            f"only {', '.join(CHATGLM_FAMILIES)} are spread so, got {family}: "
            'load_model(device_map="auto") spreads others'
        )
    if not 1 <= num_gpus <= num_layers:
        raise ValueError(f"num_gpus must be 1 to {num_layers} (layers), got {num_gpus}")
    kind = "glm" if family == "glm" else "glm2"
    device_map = dict.fromkeys(ENDS[kind], 0)
    per_gpu = (num_layers + 2) / num_gpus
    used, gpu = 2, 0
    for layer in range(num_layers):
        if used >= per_gpu:
            gpu, used = min(gpu + 1, num_gpus - 1), 0
        device_map[f"{LAYERS[kind]}.{layer}"] = gpu
        used += 1
    return device_map


def load_model_on_gpus(
    checkpoint_path: str | os.PathLike[str],
    num_gpus: int = 2,
    device_map: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A model in fp16 over `num_gpus` GPUs, in eval mode.

    Args:
        device_map: {module: GPU or "cpu"}; by default `auto_configure_device_map`'s.
        options: `load_model`'s; `trust_remote_code` has no effect, no code of a folder is run.
    Raises:
        ValueError, FileNotFoundError: as `load_model`; there are fewer GPUs.
    """
    from .loading import load_model, resolve_mode

    options.pop("trust_remote_code", None)
    options.setdefault("dtype", torch.float16)
    folder = check_folder(os.fspath(checkpoint_path), weights=True)
    if device_map is None:
        if num_gpus > torch.cuda.device_count():
            raise ValueError(f"num_gpus={num_gpus}, but {torch.cuda.device_count()} are there")
        whole = folder
        if (folder / "adapter_config.json").is_file():
            whole = find_base(folder, options.get("base"))
        layers = read_model_config(whole).get("num_layers", 28)
        family = resolve_mode(folder, options.get("mode"))
        device_map = auto_configure_device_map(num_gpus, num_layers=layers, family=family)
    return load_model(folder, device_map=device_map, **options)
