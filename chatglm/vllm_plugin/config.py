"""vLLM's configuration of a ChatGLM, with the family and the ends of its answers.

vLLM takes the ids that end an answer from generation_config.json, else from config.json. A ChatGLM3
release has no such file, and its config.json lists one of three.
"""

from typing import Any

from vllm.transformers_utils import config as vllm_config
from vllm.transformers_utils.configs.chatglm import ChatGLMConfig

from ..configuration import unclear_family_message
from ..evidence import infer_family
from ..hub import resolve_folder
from ..tokenization_base import ChatGLMTokenizer
from .servable import refuse_unservable


class ChatGLMVllmConfig(ChatGLMConfig):
    """vLLM's ChatGLMConfig, with the `glm_family` and its tokenizer's `eos_token_id`.

    Raises ValueError as `refuse_unservable`, and where nothing tells how to read `rope_ratio`.
    """

    def __init__(self, **kwargs: Any):  # else transformers makes one, of a dataclass
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        name = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "the model")
        refuse_unservable(config_dict, name)
        folder = resolve_folder(name)
        family = config_dict.get("glm_family") or infer_family(folder)
        found: dict[str, Any] = {"glm_family": family}
        if family is not None:
            tokenizer = ChatGLMTokenizer.from_pretrained(folder, family=family)
            found["eos_token_id"] = tokenizer.stop_ids
        elif (ratio := config_dict.get("rope_ratio", 1)) != 1:
            raise ValueError(f"{name}: {unclear_family_message(ratio)}")
        return super().from_dict(config_dict | found, **kwargs)


vllm_config._CONFIG_REGISTRY["chatglm"] = ChatGLMVllmConfig
