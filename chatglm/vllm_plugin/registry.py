"""`VllmChatGLM` in vLLM's registry, in place of its own class. Imports no model."""

from vllm.model_executor.models.registry import ModelRegistry

for _name in ("ChatGLMModel", "ChatGLMForConditionalGeneration"):
    ModelRegistry.register_model(_name, "chatglm.vllm_plugin.model:VllmChatGLM")
