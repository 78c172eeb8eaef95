"""vLLM's ChatGLM, with ChatGLM2's rule for long contexts."""

import math
from typing import Any

from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.chatglm import ChatGLMForCausalLM


class VllmChatGLM(ChatGLMForCausalLM):
    """vLLM's class, which reads every `rope_ratio` as ChatGLM3's and GLM-4's larger base.

    ChatGLM2-32k's divides positions.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        ratio = float(getattr(config, "rope_ratio", 1))
        if config.glm_family != "glm2" or ratio == 1:
            return
        parameters = {"rope_type": "linear", "factor": ratio, "rope_theta": 10000}
        for layer in self.transformer.encoder.layers:
            if hasattr(layer, "self_attention"):  # not one of another stage of a pipeline
                layer.self_attention.rotary_emb = get_rope(
                    layer.self_attention.head_dim,
                    max_position=math.ceil(config.seq_length / ratio),
                    is_neox_style=not config.original_rope,
                    rope_parameters=parameters | {"partial_rotary_factor": 0.5},
                )
