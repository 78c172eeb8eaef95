"""Sizes of our models by arithmetic on their config.json: every parameter's name and count.

Free of torch. Counts are elements, widths are elements of one token.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.evidence import LARGEST_SIZE, MOST_LAYERS, PANGU_TYPES, is_glm_base
from chatglm.files import read_json, shorten
from chatglm.hub import resolve_folder
from finetune.stages import layer_bounds

# The published config.json's, as far as sizes go (chatglm/configuration.py has them as defaults,
# but needs transformers).
_GLM: dict[str, Any] = {
    "num_layers": 28,
    "vocab_size": 150528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_attention_heads": 32,
    "position_encoding_2d": True,
}
_GLM2: dict[str, Any] = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "tie_word_embeddings": False,
}
_GLM4: dict[str, Any] = _GLM2 | {"num_layers": 40, "padded_vocab_size": 151552}
_GLM_BASE: dict[str, Any] = {
    "model_type": "glm_base",
    "num_layers": 48,
    "vocab_size": 50048,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "max_sequence_length": 1024,
    "output_dropout_prob": 0.1,
}
_PANGU: dict[str, Any] = {
    "model_type": "pangu",
    "num_layers": 32,
    "vocab_size": 40000,
    "hidden_size": 2560,
    "num_heads": 32,
    "max_position_embeddings": 1024,
    "resid_pdrop": 0.1,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "chatglm-6b": _GLM,
    "chatglm2-6b": _GLM2,
    "chatglm3-6b": _GLM2,
    "glm-4-9b": _GLM4,
    "glm-4-9b-chat": _GLM4,
    "glm-4-9b-chat-1m": _GLM4 | {"multi_query_group_num": 4},
    "codegeex4-all-9b": _GLM4,
    "glm-350m-chinese": _GLM_BASE
    | {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "glm-10b-chinese": _GLM_BASE,
    "pangu-350m": _PANGU | {"num_layers": 24, "hidden_size": 1024, "num_heads": 16},
    "pangu-2.6b": _PANGU,
    "pangu-13b": _PANGU
    | {"num_layers": 40, "hidden_size": 5120, "num_heads": 40, "vocab_size": 40064},
}
TABLED = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b")  # one of each shape
GLM_KEYS = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")


class Names(NamedTuple):
    """Names of an architecture's parameters.

    Attributes:
        embedding, layers, final_norm, head: of the model's modules.
        qkv: of a layer's linears that make queries, keys and values: one, or one of each.
        dense, up, down: of a layer's other linears.
        norms: of a layer's.
        tables: of learned positions.
    """

    embedding: str
    layers: str
    final_norm: str
    head: str
    qkv: tuple[str, ...]
    dense: str
    up: str = "mlp.dense_h_to_4h"
    down: str = "mlp.dense_4h_to_h"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    tables: tuple[str, ...] = ()


NAMES = {
    "glm": Names(
        embedding="transformer.word_embeddings",
        layers="transformer.layers",
        final_norm="transformer.final_layernorm",
        head="lm_head",
        qkv=("attention.query_key_value",),
        dense="attention.dense",
    ),
    "glm2": Names(
        embedding="transformer.embedding.word_embeddings",
        layers="transformer.encoder.layers",
        final_norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        qkv=("self_attention.query_key_value",),
        dense="self_attention.dense",
    ),
    "glm_base": Names(
        embedding="glm.word_embeddings",
        layers="glm.transformer.layers",
        final_norm="glm.transformer.final_layernorm",
        head="lm_head",
        qkv=("attention.query_key_value",),
        dense="attention.dense",
        tables=(
            "glm.transformer.position_embeddings",
            "glm.transformer.block_position_embeddings",
        ),
    ),
    "pangu": Names(
        embedding="transformer.wte",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        head="lm_head",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        dense="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        tables=("transformer.wpe", "transformer.wqe"),
    ),
}


class Linear(NamedTuple):
    """A linear module of a layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class ModelShape:
    """The settings of a config that decide sizes.

    Attributes:
        architecture: a key of NAMES.
        positions: rows of each table of learned positions.
        dropout: residuals pass through dropout in training.
        is_first, is_last: of a pipeline's stage, whether it has the embedding, and the final norm
            and output layer; `layers` are then its own.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool
    linear_bias: bool
    positions: int = 0
    dropout: bool = False
    is_first: bool = True
    is_last: bool = True

    @property
    def names(self) -> Names:
        return NAMES[self.architecture]

    @property
    def glm1(self) -> bool:
        """LayerNorm, GELU and biases, as ChatGLM-6B's; else RMSNorm and SwiGLU, as ChatGLM2's."""
        return self.architecture != "glm2"

    @property
    def infills(self) -> bool:
        """The context is bidirectional."""
        return self.architecture in ("glm", "glm_base")

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "head_dim", "kv_heads", "ffn", "vocab"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"config.json: the model's {name} must be a whole number of at least 1, "
                    f"got {value!r}"
                )
            most = MOST_LAYERS if name == "layers" else LARGEST_SIZE
            if value > most:
                raise ValueError(
                    f"config.json: the model's {name} must be at most {most}, got {shorten(value)}"
                )

    @property
    def query(self) -> int:
        """Width of a layer's queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of a layer's keys; the values have the same."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """{name in a layer: Linear} of a layer's linear modules."""
        names = self.names
        up = self.ffn if self.glm1 else 2 * self.ffn  # SwiGLU's two halves
        widths = (
            [self.query, self.kv, self.kv] if len(names.qkv) > 1 else [self.query + 2 * self.kv]
        )
        linears = {}
        for name, width in zip(names.qkv, widths):
            linears[name] = Linear(self.hidden, width, self.qkv_bias)
        return linears | {
            names.dense: Linear(self.query, self.hidden, self.linear_bias),
            names.up: Linear(self.hidden, up, self.linear_bias),
            names.down: Linear(self.ffn, self.hidden, self.linear_bias),
        }

    def norm(self, name: str) -> dict[str, int]:
        """{name: elements} of one norm: LayerNorm's weight and bias, or RMSNorm's weight."""
        parts = ("weight", "bias") if self.glm1 else ("weight",)
        return {f"{name}.{part}": self.hidden for part in parts}

    @cached_property
    def layer_parameters(self) -> dict[str, int]:
        """{name in a layer: elements} of one layer."""
        sizes: dict[str, int] = {}
        for name in self.names.norms:
            sizes |= self.norm(name)
        for name, linear in self.linears.items():
            sizes[f"{name}.weight"] = linear.inputs * linear.outputs
            if linear.bias:
                sizes[f"{name}.bias"] = linear.outputs
        return sizes

    @property
    def head_parameters(self) -> dict[str, int]:
        """{name: elements} of the output layer; a tied weight is the embedding's."""
        name = self.names.head
        is_shared = self.tied and self.is_first
        weight = {} if is_shared else {f"{name}.weight": self.vocab * self.hidden}
        biased = self.linear_bias and not self.glm1
        return weight | ({f"{name}.bias": self.vocab} if biased else {})

    @cached_property
    def parameters(self) -> dict[str, int]:
        """{name: elements} of the whole model."""
        names = self.names
        sizes: dict[str, int] = {}
        if self.is_first:
            sizes[f"{names.embedding}.weight"] = self.vocab * self.hidden
            sizes |= {f"{name}.weight": self.positions * self.hidden for name in names.tables}
        for i in range(self.layers):
            for name, size in self.layer_parameters.items():
                sizes[f"{names.layers}.{i}.{name}"] = size
        if self.is_last:
            sizes |= self.norm(names.final_norm) | self.head_parameters
        return sizes

    def stages(self, count: int) -> list["ModelShape"]:
        """The shapes of a pipeline's stages.

        Raises:
            ValueError: there are too few layers, or train.py makes no stages of such a model.
        """
        if self.architecture not in ("glm", "glm2"):
            raise ValueError(f"--num_stages needs a ChatGLM or GLM-4, got {self.architecture}")
        ends = self.vocab * self.hidden, sum(self.head_parameters.values())
        norm = sum(self.norm("").values())
        bounds = layer_bounds([ends[0], *[self.per_layer] * self.layers, norm, ends[1]], count)
        shapes = []
        for stage, (start, end) in enumerate(zip(bounds, bounds[1:])):
            first, last = stage == 0, stage == count - 1
            layers = end - start - first - 2 * last
            shapes.append(replace(self, layers=layers, is_first=first, is_last=last))
        return shapes

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a parameter belongs to; None outside the layers."""
        before = f"{self.names.layers}."
        if not name.startswith(before):
            return None
        return int(name.removeprefix(before).split(".")[0])

    @cached_property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(self.parameters.values())

    @property
    def per_layer(self) -> int:
        """Parameters of a layer."""
        return sum(self.layer_parameters.values())

    def prefix(self, length: int, projection: bool, version: str) -> dict[str, int]:
        """{name: elements} of P-Tuning's encoder (chatglm/layers.py, its two prompt encoders)."""
        if version == "v1":
            return {"embedding": length * self.hidden}
        kv = 2 * self.layers * self.kv
        if not projection:
            return {"embedding": length * kv}
        width = self.hidden if self.glm1 else kv
        return {
            "embedding": length * width,
            "trans.0.weight": width * self.hidden,
            "trans.0.bias": self.hidden,
            "trans.2.weight": self.hidden * kv,
            "trans.2.bias": kv,
        }

    def lora(self, rank: int, modules: tuple[str, ...]) -> dict[str, int]:
        """{name: elements} of LoRA's pairs, rank x (inputs + outputs) each.

        Args:
            modules: short names of linears; ("all",) for every linear and the output layer.

        Raises:
            ValueError: no module is named, or one that no layer has.
        """
        head = short_name(self.names.head)
        known = (*map(short_name, self.linears), head)
        modules = known if modules == ("all",) else self.split_qkv(modules)
        for name in modules or ("",):
            if name not in known:
                raise ValueError(
                    f"--lora_module_name: {name!r} matches no linear module; "
                    f"this model has {', '.join(sorted(set(known)))}"
                )
        sizes: dict[str, int] = {}
        if head in modules and self.is_last:
            sizes |= {"head.A": rank * self.hidden, "head.B": rank * self.vocab}
        for name, linear in self.linears.items():
            if short_name(name) in modules:
                for i in range(self.layers):
                    sizes[f"layers.{i}.{name}.A"] = rank * linear.inputs
                    sizes[f"layers.{i}.{name}.B"] = rank * linear.outputs
        return sizes

    def split_qkv(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        """Names of modules, as LoRA reads query_key_value where a model has it in three."""
        own = tuple(map(short_name, self.names.qkv))
        named: list[str] = []
        for name in modules:
            named += own if name == "query_key_value" else [name]
        return tuple(named)


def short_name(name: str) -> str:
    """The last part of a module's name: "query_key_value" of "attention.query_key_value"."""
    return name.rsplit(".", 1)[-1]


def read_shape(model: str) -> ModelShape:
    """The shape of a folder with a config.json, else of a published name, in any case of letters,
    else of a hub's name, whose config.json alone is downloaded.

    Raises:
        ValueError: none of these, or the file is not a ChatGLM's.
        OSError: the hub does not give it; as chatglm.hub.resolve_folder.
    """
    path = resolve_folder(model) / "config.json"
    if not path.is_file():
        if model.lower() in PUBLISHED:
            return make_shape(PUBLISHED[model.lower()])
        raise ValueError(
            f"no such folder with a config.json: {model}; "
            f"published names are {', '.join(PUBLISHED)}"
        )
    config = read_json(path, object)
    own = isinstance(config, dict) and architecture_of(config)
    if not own:
        raise ValueError(
            f"{path} is not a ChatGLM's, GLM-10B's or Pangu-alpha's: its model_type must be "
            "'chatglm', 'glm_base' or 'pangu'"
        )
    return make_shape(config)


def shape_source(model: str) -> str:
    """In words, what `read_shape` reads a model's sizes from."""
    path = Path(model)
    if path.name != "config.json":
        path = path / "config.json"
    if path.is_file():
        return f"sizes of {path}"
    return f"sizes of the published {model.lower()}, as there is no folder {model} here"


def make_shape(config: dict) -> ModelShape:
    """The shape of a config; a key that is left out has the published default, as in
    chatglm/configuration.py."""
    architecture = architecture_of(config) or chatglm_architecture(config)
    given = {key: value for key, value in config.items() if value is not None}
    base = DEFAULTS[architecture] | given
    heads = base["num_heads" if architecture == "pangu" else "num_attention_heads"]
    hidden = base["hidden_size"]
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads >= 1):
        raise ValueError(
            "config.json: hidden_size and num_attention_heads must be whole numbers, "
            f"got {hidden!r} and {heads!r}"
        )
    if architecture == "glm2":
        return _glm2_shape(base)
    own = {
        "glm": {"ffn": base.get("inner_hidden_size")},
        "glm_base": {
            "ffn": 4 * hidden,
            "positions": base.get("max_sequence_length", 0) + 1,
            "dropout": bool(base.get("output_dropout_prob")),
        },
        "pangu": {
            "ffn": base.get("intermediate_size") or 4 * hidden,
            "positions": base.get("max_position_embeddings"),
            "dropout": bool(base.get("resid_pdrop")),
        },
    }
    return ModelShape(
        architecture=architecture,
        layers=base["num_layers"],
        hidden=hidden,
        heads=heads,
        head_dim=hidden // heads,
        kv_heads=heads,
        vocab=base["vocab_size"],
        tied=config.get("tie_word_embeddings", True),
        qkv_bias=True,
        linear_bias=True,
        **own[architecture],
    )


DEFAULTS: dict[str, dict[str, Any]] = {
    "glm": _GLM,
    "glm2": _GLM2,
    "glm_base": _GLM_BASE,
    "pangu": _PANGU,
}


def architecture_of(config: dict[str, Any]) -> str | None:
    """The key of NAMES that a config.json's model_type means; None for another model's."""
    if config.get("model_type") in PANGU_TYPES:
        return "pangu"
    if is_glm_base(config):
        return "glm_base"
    return chatglm_architecture(config) if config.get("model_type") == "chatglm" else None


def chatglm_architecture(config: dict[str, Any]) -> str:
    """The key of NAMES of a ChatGLM's config.json."""
    is_first = config.get("glm_family") == "glm" or any(key in config for key in GLM_KEYS)
    return "glm" if is_first else "glm2"


def _glm2_shape(config: dict) -> ModelShape:
    heads = config["num_attention_heads"]
    grouped = config["multi_query_attention"]
    return ModelShape(
        architecture="glm2",
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        head_dim=config["kv_channels"],
        kv_heads=config["multi_query_group_num"] if grouped else heads,
        ffn=config["ffn_hidden_size"],
        vocab=config["padded_vocab_size"],
        tied=config["tie_word_embeddings"],
        qkv_bias=config["add_bias_linear"] or config["add_qkv_bias"],
        linear_bias=config["add_bias_linear"],
    )
