"""Which of our models vLLM cannot serve. Free of vLLM."""

from typing import Any

from ..configuration import is_chatglm1
from ..evidence import PANGU_TYPES, is_glm_base

OWN_SERVER = "serve it with python -m serving.server"


def refuse_unservable(config: dict[str, Any], name: str) -> None:
    """Raises ValueError for a model of ours that vLLM's classes would misread, or has none for."""
    if is_glm_base(config) or config.get("model_type") in PANGU_TYPES:
        raise ValueError(
            f"{name} is a GLM-10B or Pangu-alpha, for which vLLM has no class; {OWN_SERVER} "
            "--engine static"
        )
    if is_chatglm1(config):
        raise ValueError(
            f"{name} is a ChatGLM-6B, for which vLLM has no class: its positions have two "
            f"dimensions and its prompt is read in both directions; {OWN_SERVER}"
        )
    if bits := config.get("quantization_bit"):
        raise ValueError(
            f"{name} has int{bits} weights in ChatGLM's own packing, which vLLM does not read: "
            f"python -m chatglm.export {name} --to glm --output FOLDER unpacks them"
        )
    if config.get("pre_seq_len"):
        raise ValueError(f"{name} has a P-Tuning prefix, for which vLLM has no place: {OWN_SERVER}")
