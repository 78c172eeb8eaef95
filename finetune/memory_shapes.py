"""Sizes of a ChatGLM by arithmetic on its config.json: every parameter's name and count, and what a layer keeps for backward.

Free of torch. Counts are elements, widths are elements of one token.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# The published config.json's, as far as sizes go (chatglm/configuration.py has them as defaults, but needs transformers).
_GLM2 = {"num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128,
         "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
         "add_bias_linear": False, "tie_word_embeddings": False}  # fmt: skip
PUBLISHED = {
    "chatglm-6b": {"num_layers": 28, "vocab_size": 150528, "hidden_size": 4096, "inner_hidden_size": 16384,
                   "num_attention_heads": 32, "position_encoding_2d": True},
    "chatglm2-6b": _GLM2,
    "chatglm3-6b": _GLM2,
}  # fmt: skip
CODES = ("original", "eager", "sdpa", "packed", "packed-cpu")


@dataclass(frozen=True)
class Shape:
    """What of a config decides sizes. `glm1`: ChatGLM-6B's architecture, else ChatGLM2's."""

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

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "head_dim", "kv_heads", "ffn", "vocab"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"config.json: the model's {name} must be a whole number of at least 1, got {value!r}")

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of a layer's keys; the values have the same."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """{name in a layer: (inputs, outputs, has bias)} of a layer's linear modules."""
        attention = "attention" if self.glm1 else "self_attention"
        up = self.ffn if self.glm1 else 2 * self.ffn
        return {
            f"{attention}.query_key_value": (self.hidden, self.query + 2 * self.kv, self.qkv_bias),
            f"{attention}.dense": (self.query, self.hidden, self.linear_bias),
            "mlp.dense_h_to_4h": (self.hidden, up, self.linear_bias),
            "mlp.dense_4h_to_h": (self.ffn, self.hidden, self.linear_bias),
        }

    @cached_property
    def parameters(self) -> dict[str, int]:
        """{name: elements} of the whole model; a tied output layer is not listed."""
        norm = ("weight", "bias") if self.glm1 else ("weight",)
        body = "transformer." if self.glm1 else "transformer.encoder."
        embedding = "transformer.word_embeddings.weight" if self.glm1 else "transformer.embedding.word_embeddings.weight"
        found = {embedding: self.vocab * self.hidden}
        for i in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                found |= {f"{body}layers.{i}.{name}.{part}": self.hidden for part in norm}
            for name, (inputs, outputs, bias) in self.linears.items():
                found[f"{body}layers.{i}.{name}.weight"] = inputs * outputs
                if bias:
                    found[f"{body}layers.{i}.{name}.bias"] = outputs
        found |= {f"{body}final_layernorm.{part}": self.hidden for part in norm}
        head = "lm_head" if self.glm1 else "transformer.output_layer"
        if not self.tied:
            found[f"{head}.weight"] = self.vocab * self.hidden
        if self.linear_bias and not self.glm1:
            found[f"{head}.bias"] = self.vocab
        return found

    def layer_of(self, name: str) -> int | None:
        """The layer that a parameter's name belongs to."""
        return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None

    @cached_property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def per_layer(self) -> int:
        return sum(size for name, size in self.parameters.items() if self.layer_of(name) == 0)

    def prefix(self, length: int, projection: bool, version: str) -> dict[str, int]:
        """{name: elements} of P-Tuning's encoder (chatglm/layers.py, PrefixEncoder and PromptEncoder)."""
        if version == "v1":
            return {"embedding": length * self.hidden}
        kv = 2 * self.layers * self.kv
        if not projection:
            return {"embedding": length * kv}
        width = self.hidden if self.glm1 else kv
        return {
            "embedding": length * width, "trans.0.weight": width * self.hidden, "trans.0.bias": self.hidden,
            "trans.2.weight": self.hidden * kv, "trans.2.bias": kv,
        }  # fmt: skip

    def lora(self, rank: int, modules: tuple[str, ...]) -> dict[str, int]:
        """{name: elements} of LoRA's pairs, rank * (inputs + outputs) each; "all" stands for every linear and the output layer.

        Raises ValueError for a module that no layer has.
        """
        sizes = dict(self.linears)
        heads = {name.rsplit(".", 1)[-1]: name for name in sizes} | {"lm_head" if self.glm1 else "output_layer": "head"}
        if modules == ("all",):
            modules = tuple(heads)
        if lost := [name for name in modules if name not in heads] or (not modules and [""]):
            raise ValueError(f"--lora_module_name: {lost[0]!r} matches no linear module; this model has {', '.join(sorted(heads))}")
        found = {}
        for name in modules:
            if heads[name] == "head":
                found["head.A"], found["head.B"] = rank * self.hidden, rank * self.vocab
                continue
            inputs, outputs, _ = sizes[heads[name]]
            found |= {f"layers.{i}.{name}.A": rank * inputs for i in range(self.layers)}
            found |= {f"layers.{i}.{name}.B": rank * outputs for i in range(self.layers)}
        return found


def read_shape(model: str) -> Shape:
    """Of a folder with a config.json, else of a published name, in any case of letters.

    Raises:
        ValueError: neither, or the file is not a ChatGLM's.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        if model.lower() in PUBLISHED:
            return make_shape(PUBLISHED[model.lower()])
        raise ValueError(f"no such folder with a config.json: {model}; published names are {', '.join(PUBLISHED)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "chatglm":
        raise ValueError(f"{path} is not a ChatGLM's: its model_type must be 'chatglm'")
    return make_shape(config)


def shape_source(model: str) -> str:
    """In words, what `read_shape` reads a model's sizes from."""
    path = Path(model)
    path = path if path.name == "config.json" else path / "config.json"
    return f"sizes of {path}" if path.is_file() else f"sizes of the published {model.lower()}, as there is no folder {model} here"


def make_shape(config: dict) -> Shape:
    """A key that is left out has the published default, as in chatglm/configuration.py."""
    glm1 = config.get("glm_family") == "glm" or any(k in config for k in ("position_encoding_2d", "inner_hidden_size", "max_sequence_length"))
    base = PUBLISHED["chatglm-6b" if glm1 else "chatglm2-6b"] | {k: v for k, v in config.items() if v is not None}
    heads, hidden = base["num_attention_heads"], base["hidden_size"]
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads >= 1):
        raise ValueError(f"config.json: hidden_size and num_attention_heads must be whole numbers, got {hidden!r} and {heads!r}")
    common = {"glm1": glm1, "layers": base["num_layers"], "hidden": hidden, "heads": heads}
    if glm1:
        return Shape(
            **common, head_dim=hidden // heads, kv_heads=heads, ffn=base["inner_hidden_size"],
            vocab=base["vocab_size"], tied=config.get("tie_word_embeddings", True), qkv_bias=True, linear_bias=True,
        )  # fmt: skip
    return Shape(
        **common, head_dim=base["kv_channels"], kv_heads=base["multi_query_group_num"] if base["multi_query_attention"] else heads,
        ffn=base["ffn_hidden_size"], vocab=base["padded_vocab_size"], tied=base["tie_word_embeddings"],
        qkv_bias=base["add_bias_linear"] or base["add_qkv_bias"], linear_bias=base["add_bias_linear"],
    )  # fmt: skip


def saved_bytes_per_token(
    shape: Shape, code: str, *, keys: int, element: int, trained: bool, lora: tuple[str, ...] = (), lora_rank: int = 0,
    lora_element: int = 2, lora_dropout: bool = True, mask_element: int = 1,
) -> dict[str, float]:
    """Bytes that autograd keeps of one layer for one token, tensor by tensor. This is the one place to change with the models' code.

    Args:
        code: "original" = the code the seeds ran (attention in plain operations, softmax in fp32, GELU spelt out); "eager" and
            "sdpa" = this project's models with that attention backend; "packed" and "packed-cpu" = sdpa in the ragged rows of training.
        keys: key columns a query is scored against (the row's length, P-Tuning's included).
        element: bytes of an activation. trained: the layer's own weights are; a frozen linear keeps no input.
        lora: names of the layer's linears that carry LoRA; `lora_element` bytes of its arithmetic; `mask_element` bytes of a
            dropout mask's entry (1 on GPUs; on CPUs torch multiplies with a mask of the input's dtype).
    """
    h, q, kv, ffn, e = shape.hidden, shape.query, shape.kv, shape.ffn, element
    kept: dict[str, float] = {}
    own = 1 if trained else 0
    # Norms. LayerNorm and this project's RMSNorm keep their input, besides statistics. The original RMSNorm's arithmetic is fp32: the
    # input's copy, and with a trained weight the normed row; it multiplies the half-precision input too, so that is kept besides.
    norm = e * h
    if not shape.glm1:
        norm = 4 * h * (1 + own) + (e * h if e < 4 else 0) if code == "original" else e * h + 4
    kept["norms"] = 2 * norm
    # Attention. This project's rotation makes one tensor of queries, keys and values and needs nothing to go back.
    if code == "packed-cpu":
        kept["attention"] = e * (q + 2 * kv)  # the backward pass computes the scores again, from views of that tensor
    elif code in ("sdpa", "packed"):
        # Flash keeps views of that tensor, its output and a log-sum a head.
        mask = e * keys if shape.glm1 else 0  # ChatGLM-6B's visibility as an additive matrix
        kept["attention"] = e * (q + 2 * kv) + e * q + 4 * shape.heads + mask
    else:
        # Rotated queries and keys are new tensors, or scaled and contiguous ones; ChatGLM2's keys and values are copied out to all heads.
        view = 2 * kv if code == "original" and shape.glm1 else 0  # v is a view of the qkv product: q and k stay with it
        kept["attention"] = e * (3 * q + view) + keys  # a bool mask row
        # softmax in fp32 and its copy in the values' dtype; in fp32 the copy is the same tensor
        kept["scores"] = shape.heads * keys * (4 + e if e < 4 else 4)
    if shape.glm1:
        # The original spells GELU out, 0.5 x (1 + tanh(0.797 x (1 + 0.0447 x x))): the operands of its products and tanh's
        # result are 7 tensors of the MLP's width, under torch.jit.script too. F.gelu keeps its input alone.
        kept["mlp"] = e * ffn * (7 if code == "original" else 1)
    else:
        # The first product; the original keeps silu's result besides.
        kept["mlp"] = e * ffn * (3 if code == "original" else 2)
    for name, (inputs, _, _) in shape.linears.items():
        short = name.rsplit(".", 1)[-1]
        # Attention's output is kept already; in ragged rows the next layer reads a copy, for the sequences are joined.
        there = code == "sdpa" and short == "dense"
        if trained and not there:
            kept["inputs"] = kept.get("inputs", 0) + e * inputs
        if short in lora:
            dropped = (lora_element + mask_element) * inputs if lora_dropout else 0 if there else lora_element * inputs
            kept["lora"] = kept.get("lora", 0) + dropped + lora_element * lora_rank
    return kept


def working_bytes_per_token(shape: Shape, code: str, *, keys: int, element: int) -> float:
    """Gradients alive at once inside one layer's backward pass, for one token: the largest of attention's and the MLP's."""
    e = element
    # gradients of the weights after and before the cast, and of the scores
    attention = shape.heads * keys * (8 + e) if code in ("original", "eager") else e * 4 * shape.query
    if code == "original" or shape.glm1:
        return max(attention, e * (3 if shape.glm1 else 5) * shape.ffn)
    # SwiGLU's: the incoming gradient, both outgoing ones and a product; besides, the gradient that goes past the MLP.
    return max(attention, e * (4 * shape.ffn + shape.hidden))


def product_bytes_per_token(shape: Shape, *, element: int, lora: tuple[str, ...] = (), lora_rank: int = 0, lora_element: int = 2) -> float:
    """Bytes of one layer's matrix products and attention for one token: what selective checkpointing keeps."""
    total = element * shape.query + 4 * shape.heads
    for name, (_, outputs, _) in shape.linears.items():
        total += element * outputs
        if name.rsplit(".", 1)[-1] in lora:
            total += lora_element * (lora_rank + outputs)
    return total
