"""Configurations of our model classes.

One `model_type`, "chatglm", stands for two architectures; their keys tell which one it is.

The field names are the originals', so every published config.json loads here and what is saved
here loads elsewhere.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .evidence import LARGEST_SIZE, MOST_LAYERS, PANGU_TYPES, infer_family, is_glm_base
from .files import read_json
from .folders import reading, refuse_unknown_type
from .remote_code import guard_code

PTUNING_VERSIONS = ("v1", "v2")
SHARED_LAYOUT = ("glm2", "glm3", "glm4")  # families whose weights and config.json are alike


@strict
class ChatGLMConfig(PreTrainedConfig):
    """What both architectures share; `from_dict` and `from_pretrained` return the right subclass.

    `pre_seq_len` P switches P-Tuning on: `ptuning_version` "v2" puts P key/value vectors in front
    of every layer, through an MLP if `prefix_projection`; "v1" puts P vectors in front of the
    first input embedding.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    auto_map: ClassVar[dict[str, Any]] = {}  # TRL reads it where config.json has none
    saved_architecture: ClassVar[str] = "ChatGLMModel"

    glm_family: str | None = None  # a key of FAMILIES; the originals have no such key
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    ptuning_version: str | None = None
    prefix_dropout: float = 0.1  # fixed in the originals; acts on v2's prefix in training only
    initializer_range: float = 0.02
    use_cache: bool = True
    quantization_bit: int | None = None  # of the weights in the files: 4, 8, or None (also 0)
    quantization_embeddings: bool | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ChatGLMConfig":
        if cls is ChatGLMConfig:
            cls = config_class_of(config_dict)
        config_dict = {k: v for k, v in config_dict.items() if k != "num_key_value_heads"}
        asked = {"glm_family": family} if (family := kwargs.pop("glm_family", None)) else {}
        try:
            return super().from_dict(config_dict | asked, **kwargs)
        except StrictDataclassError as error:  # no ValueError, and of several lines
            raise ValueError(f"config.json: {' '.join(str(error).split())}") from None

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the number of key heads, which peft reads here."""
        return super().to_dict() | {"num_key_value_heads": self.num_key_value_heads}

    def to_diff_dict(self) -> dict[str, Any]:
        """The saved form: all fields of the architecture; other readers have other defaults."""
        full = self.to_dict()
        names = set(type(self).__annotations__) | set(ChatGLMConfig.__annotations__)
        fields = {name: full[name] for name in names if full.get(name) is not None}
        # Other readers (vLLM, llama.cpp) know the family by this one architecture name.
        saved = super().to_diff_dict() | fields | {"architectures": [self.saved_architecture]}
        saved.pop("num_key_value_heads", None)
        for name in ("quantization_bit", "quantization_embeddings"):
            if not full.get(name):
                saved.pop(name, None)
        return saved

    def check_sizes(self, *names: str) -> None:
        """Raises ValueError where a field cannot be a weight's dimension or a number of layers."""
        for name in names:
            most = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {getattr(self, name)}")

    def validate_quantization(self) -> None:
        """Raises ValueError for another quantization_bit than 4 and 8; 0 means none."""
        self.quantization_bit = self.quantization_bit or None
        if self.quantization_bit not in (None, 4, 8):
            raise ValueError(f"quantization_bit must be 4 or 8, got {self.quantization_bit}")

    def validate_prefix(self) -> None:
        """Raises ValueError for a P-Tuning field out of its range."""
        if self.pre_seq_len is not None and not 1 <= self.pre_seq_len <= LARGEST_SIZE:
            raise ValueError(
                f"pre_seq_len must be at least 1 and at most {LARGEST_SIZE}, got {self.pre_seq_len}"
            )
        if self.ptuning_version not in (None, *PTUNING_VERSIONS):
            raise ValueError(
                f"ptuning_version must be one of {PTUNING_VERSIONS}, got {self.ptuning_version!r}"
            )

    def check_multiple(self, name: str, of: str) -> None:
        """Raises ValueError where a setting is no multiple of another."""
        value, divisor = getattr(self, name), getattr(self, of)
        if value % divisor:
            raise ValueError(f"{name} ({value}) must be a multiple of {of} ({divisor})")

    def check_fixed(self, who: str, **wanted: Any) -> None:
        """Raises ValueError where a setting is not what `who` (of the releases) has."""
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)} is not supported: {who} {value}")

    @property
    def head_dim(self) -> int:
        """Width of a head, where the architecture has no field for it."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values: as many as of queries, where they are not grouped."""
        return self.num_attention_heads

    @property
    def prefix_version(self) -> str | None:
        """ "v1", "v2" or None.

        A prefix checkpoint that names no version is v2: the originals know nothing else.
        """
        return (self.ptuning_version or "v2") if self.pre_seq_len else None


@strict
class ChatGLM1Config(ChatGLMConfig):
    """ChatGLM-6B: 2-D rotary positions, bidirectional context, LayerNorm, tied output layer."""

    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    bos_token_id: int | None = 150004  # <sop>
    eos_token_id: int | list[int] | None = 150005  # <eop>
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    # "rounds": chat() counts [Round n] from 1, as the training prompt does
    chat_prompt: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_sizes(
            "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size"
        )
        # The first release's config names neither; in every vocabulary both have a fixed distance
        # from <sop>.
        if self.bos_token_id is None:
            raise ValueError("bos_token_id must be the id of <sop>, got null")
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if not self.position_encoding_2d:
            raise ValueError(
                "position_encoding_2d=false is not supported: no ChatGLM-6B release uses it"
            )
        self.glm_family = self.glm_family or "glm"
        self.validate_prefix()
        self.validate_quantization()
        super().__post_init__(**kwargs)


@strict
class ChatGLM2Config(ChatGLMConfig):
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, their long variants (`rope_ratio`) included."""

    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 8192
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    original_rope: bool = True
    rope_ratio: float | int = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_structure()
        self.check_sizes(
            "num_layers",
            "padded_vocab_size",
            "hidden_size",
            "ffn_hidden_size",
            "kv_channels",
            "num_attention_heads",
            "multi_query_group_num",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                "multi_query_group_num "
                f"({self.num_key_value_heads})"
            )
        self.glm_family = self.glm_family or self.find_family(kwargs)
        if self.glm_family not in (None, *SHARED_LAYOUT):
            raise ValueError(
                f"glm_family must be one of {', '.join(SHARED_LAYOUT)} for these weights, "
                f"got {self.glm_family!r}"
            )
        if not 0 < self.rope_ratio < float("inf"):
            raise ValueError(f"rope_ratio must be above 0, got {self.rope_ratio}")
        if self.glm_family is None and self.rope_ratio != 1:
            raise ValueError(unclear_family_message(self.rope_ratio))
        self.validate_prefix()
        self.validate_quantization()
        super().__post_init__(**kwargs)

    def check_structure(self) -> None:
        """Raises ValueError for a structure that no release has."""
        self.check_fixed(
            "every release has",
            rmsnorm=True,
            post_layer_norm=True,
            original_rope=True,
            apply_residual_connection_post_layernorm=False,
        )

    def find_family(self, kwargs: dict[str, Any]) -> str | None:
        """The family that the files beside this configuration show, as `load_model` infers it."""
        config = {
            "rope_ratio": self.rope_ratio,
            "padded_vocab_size": self.padded_vocab_size,
            "_name_or_path": kwargs.get("_name_or_path"),
        }
        # Without a folder no file counts, least of all those in the working directory.
        folder = kwargs.get("name_or_path") or os.devnull
        family = infer_family(str(folder), config=config)
        return family if family in SHARED_LAYOUT else None

    @property
    def num_key_value_heads(self) -> int:
        return (
            self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads
        )


@strict
class PanguConfig(ChatGLMConfig):
    """Pangu-alpha (arXiv 2104.12369): learned positions, a query layer on top, tied output layer.

    The query layer counts in `num_layers`. Names are those of sunzeyeah/RLHF's releases.
    """

    model_type = "pangu"
    saved_architecture: ClassVar[str] = "GPTPanguForCausalLM"
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}

    vocab_size: int = 40000
    max_position_embeddings: int = 1024
    hidden_size: int = 2560
    intermediate_size: int | None = None  # None: four times hidden_size
    num_layers: int = 32
    num_heads: int = 32
    activation_function: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    scale_attn_weights: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 9
    pad_token_id: int | None = 6
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.check_sizes(
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        self.check_multiple("hidden_size", "num_heads")
        self.check_fixed(
            "every Pangu-alpha has", activation_function="gelu", scale_attn_weights=True
        )
        self.glm_family = "pangu"
        self.validate_prefix()
        self.validate_quantization()
        super().__post_init__(**kwargs)


@strict
class GLMBaseConfig(ChatGLMConfig):
    """GLM-350M and GLM-10B (arXiv 2103.10360): two learned positions, tied output layer.

    `model_type` in the releases is "glm", which is another model's in transformers.

    `pad_token_id` is the id of <|endoftext|>, the first of the tokens after the vocabulary.
    """

    model_type = "glm_base"
    saved_architecture: ClassVar[str] = "GLMForConditionalGeneration"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 50048
    hidden_size: int = 4096
    num_layers: int = 48
    num_attention_heads: int = 64
    max_sequence_length: int = 1024
    embedding_dropout_prob: float = 0.1
    attention_dropout_prob: float = 0.1
    output_dropout_prob: float = 0.1
    attention_scale: float | int = 1.0
    layernorm_epsilon: float = 1e-5
    block_position_encoding: bool = True
    relative_encoding: bool = False
    pad_token_id: int | None = 50000
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_sizes(
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "max_sequence_length",
        )
        self.check_multiple("hidden_size", "num_attention_heads")
        self.check_fixed(
            "GLM-350M-chinese and GLM-10B-chinese have",
            block_position_encoding=True,
            relative_encoding=False,
        )
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.vocab_size - 9:
            raise ValueError(
                "pad_token_id must be the id of <|endoftext|>, which 9 more tokens follow in "
                f"vocab_size {self.vocab_size}, got {self.pad_token_id}"
            )
        self.glm_family = "glm_base"
        self.validate_prefix()
        self.validate_quantization()
        super().__post_init__(**kwargs)


def unclear_family_message(ratio: float) -> str:
    """The message where nothing tells how to read `rope_ratio`."""
    return (
        f"rope_ratio {ratio} divides positions in ChatGLM2 and multiplies the base in ChatGLM3 and "
        'GLM-4, and nothing tells which of them this is: say mode="glm2", "glm3" or "glm4", or set '
        '"glm_family" in config.json'
    )


def is_chatglm1(config_dict: dict[str, Any]) -> bool:
    """Whether the keys are ChatGLM-6B's; any other "chatglm" has ChatGLM2's architecture."""
    keys = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")
    return config_dict.get("glm_family") == "glm" or any(key in config_dict for key in keys)


def config_class_of(config_dict: dict[str, Any]) -> type[ChatGLMConfig]:
    """The configuration of the architecture that a config.json's values describe."""
    if config_dict.get("model_type") in PANGU_TYPES or config_dict.get("glm_family") == "pangu":
        return PanguConfig
    if is_glm_base(config_dict) or config_dict.get("glm_family") == "glm_base":
        return GLMBaseConfig
    return ChatGLM1Config if is_chatglm1(config_dict) else ChatGLM2Config


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoConfig.register(PanguConfig.model_type, PanguConfig, exist_ok=True)
AutoConfig.register(GLMBaseConfig.model_type, GLMBaseConfig, exist_ok=True)
guard_code()


def read_config(path: str | Path) -> PreTrainedConfig:
    """The transformers configuration of a model, ours or another; code beside it is never run.

    Raises:
        ValueError: it cannot be read, or its model_type is not known.
    """
    refuse_unknown_type(path)
    file = Path(path, "config.json")
    if file.is_file() and is_glm_base(values := read_json(file)):
        with reading(path):
            return GLMBaseConfig.from_dict(values)
    with reading(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
