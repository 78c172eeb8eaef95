"""Sizes of a ChatGLM by arithmetic on its config.json: every parameter's name and count.

Free of torch. Counts are elements, widths are elements of one token.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from chatglm.files import read_json
from chatglm.hub import resolve_folder
from finetune.stages import layer_bounds

# The published config.json's, as far as sizes go (chatglm/configuration.py has them as defaults,
# but needs transformers).
_GLM = {
    "num_layers": 28,
    "vocab_size": 150528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_attention_heads": 32,
    "position_encoding_2d": True,
}
_GLM2 = {
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
_GLM4 = _GLM2 | {"num_layers": 40, "padded_vocab_size": 151552}
PUBLISHED = {
    "chatglm-6b": _GLM,
    "chatglm2-6b": _GLM2,
    "chatglm3-6b": _GLM2,
    "glm-4-9b": _GLM4,
    "glm-4-9b-chat": _GLM4,
    "glm-4-9b-chat-1m": _GLM4 | {"multi_query_group_num": 4},
    "codegeex4-all-9b": _GLM4,
}
TABLED = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b")  # one of each shape
GLM_KEYS = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")
NORMS = ("input_layernorm", "post_attention_layernorm")


class Linear(NamedTuple):
    """A linear module of a layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class ModelShape:
    """The settings of a config that decide sizes.

    Attributes:
        glm1: ChatGLM-6B's architecture, else ChatGLM2's.
        is_first, is_last: of a pipeline's stage, whether it has the embedding, and the final norm
            and output layer; `layers` are then its own.
    """

    glm1: bool
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
    is_first: bool = True
    is_last: bool = True

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "head_dim", "kv_heads", "ffn", "vocab"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(
                    f"config.json: the model's {name} must be a whole number of at least 1, "
                    f"got {value!r}"
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
        attention = "attention" if self.glm1 else "self_attention"
        up = self.ffn if self.glm1 else 2 * self.ffn  # SwiGLU's two halves
        return {
            f"{attention}.query_key_value": Linear(
                self.hidden, self.query + 2 * self.kv, self.qkv_bias
            ),
            f"{attention}.dense": Linear(self.query, self.hidden, self.linear_bias),
            "mlp.dense_h_to_4h": Linear(self.hidden, up, self.linear_bias),
            "mlp.dense_4h_to_h": Linear(self.ffn, self.hidden, self.linear_bias),
        }

    def norm(self, name: str) -> dict[str, int]:
        """{name: elements} of one norm: LayerNorm's weight and bias, or RMSNorm's weight."""
        parts = ("weight", "bias") if self.glm1 else ("weight",)
        return {f"{name}.{part}": self.hidden for part in parts}

    @cached_property
    def layer_parameters(self) -> dict[str, int]:
        """{name in a layer: elements} of one layer."""
        sizes: dict[str, int] = {}
        for name in NORMS:
            sizes |= self.norm(name)
        for name, linear in self.linears.items():
            sizes[f"{name}.weight"] = linear.inputs * linear.outputs
            if linear.bias:
                sizes[f"{name}.bias"] = linear.outputs
        return sizes

    @property
    def head_parameters(self) -> dict[str, int]:
        """{name: elements} of the output layer; a tied weight is the embedding's."""
        name = "lm_head" if self.glm1 else "transformer.output_layer"
        is_shared = self.tied and self.is_first
        weight = {} if is_shared else {f"{name}.weight": self.vocab * self.hidden}
        biased = self.linear_bias and not self.glm1
        return weight | ({f"{name}.bias": self.vocab} if biased else {})

    @cached_property
    def parameters(self) -> dict[str, int]:
        """{name: elements} of the whole model."""
        body = "transformer" if self.glm1 else "transformer.encoder"
        embedding = "transformer" if self.glm1 else "transformer.embedding"
        sizes: dict[str, int] = {}
        if self.is_first:
            sizes[f"{embedding}.word_embeddings.weight"] = self.vocab * self.hidden
        for i in range(self.layers):
            for name, size in self.layer_parameters.items():
                sizes[f"{body}.layers.{i}.{name}"] = size
        if self.is_last:
            sizes |= self.norm(f"{body}.final_layernorm") | self.head_parameters
        return sizes

    def stages(self, count: int) -> list["ModelShape"]:
        """The shapes of a pipeline's stages; raises ValueError where there are too few layers."""
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
        if "layers." not in name:
            return None
        return int(name.split("layers.")[1].split(".")[0])

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
        linears = {short_name(name): linear for name, linear in self.linears.items()}
        head = "lm_head" if self.glm1 else "output_layer"
        known = (*linears, head)
        if modules == ("all",):
            modules = known
        for name in modules or ("",):
            if name not in known:
                raise ValueError(
                    f"--lora_module_name: {name!r} matches no linear module; "
                    f"this model has {', '.join(sorted(known))}"
                )
        sizes: dict[str, int] = {}
        for name in modules:
            if name == head and not self.is_last:
                continue
            if name == head:
                sizes |= {"head.A": rank * self.hidden, "head.B": rank * self.vocab}
                continue
            for i in range(self.layers):
                sizes[f"layers.{i}.{name}.A"] = rank * linears[name].inputs
                sizes[f"layers.{i}.{name}.B"] = rank * linears[name].outputs
        return sizes


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
    if not isinstance(config, dict) or config.get("model_type") != "chatglm":
        raise ValueError(f"{path} is not a ChatGLM's: its model_type must be 'chatglm'")
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
    glm1 = config.get("glm_family") == "glm" or any(key in config for key in GLM_KEYS)
    given = {key: value for key, value in config.items() if value is not None}
    base = PUBLISHED["chatglm-6b" if glm1 else "chatglm2-6b"] | given
    heads = base["num_attention_heads"]
    hidden = base["hidden_size"]
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads >= 1):
        raise ValueError(
            "config.json: hidden_size and num_attention_heads must be whole numbers, "
            f"got {hidden!r} and {heads!r}"
        )
    if glm1:
        return _glm_shape(base, tied=config.get("tie_word_embeddings", True))
    return _glm2_shape(base)


def _glm_shape(config: dict, tied: bool) -> ModelShape:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return ModelShape(
        glm1=True,
        layers=config["num_layers"],
        hidden=hidden,
        heads=heads,
        head_dim=hidden // heads,
        kv_heads=heads,
        ffn=config["inner_hidden_size"],
        vocab=config["vocab_size"],
        tied=tied,
        qkv_bias=True,
        linear_bias=True,
    )


def _glm2_shape(config: dict) -> ModelShape:
    heads = config["num_attention_heads"]
    grouped = config["multi_query_attention"]
    return ModelShape(
        glm1=False,
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
