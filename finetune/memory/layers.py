"""What one transformer layer keeps for backward, and works with there: bytes for one token.

This is the one place to change with the models' code. Every part is a function of a Layer;
tests/finetune/memory/test_memory.py compares their sum with what autograd keeps. Free of torch.

In the formulas h, q, kv and f are the widths of the hidden states, of the queries, of the keys (and
of the values) and of the MLP; n is the number of heads, k of the keys that a query is scored
against, and e the bytes of an activation.
"""

from dataclasses import dataclass
from typing import Literal

from finetune.memory.shapes import ModelShape, short_name

Code = Literal["original", "eager", "sdpa", "packed", "packed-cpu"]


@dataclass(frozen=True)
class Layer:
    """A layer and how it is run.

    Attributes:
        code: "original" is the code that the published runs used: attention in plain operations,
            softmax in fp32, GELU spelt out. "eager" and "sdpa" are this project's models with that
            attention backend; "packed" and "packed-cpu" are sdpa in the ragged rows of training.
        keys: key columns that a query is scored against: the row's length and P-Tuning's tokens.
        element: bytes of an activation.
        trained: the layer's own weights are. A frozen linear keeps no input.
        lora: short names of the linears that carry LoRA.
        lora_element: bytes of LoRA's arithmetic.
        mask_element: bytes of an entry of a dropout mask: 1 on GPUs; on CPUs torch multiplies with
            a mask of the input's dtype.
    """

    shape: ModelShape
    code: Code
    keys: int
    element: int
    trained: bool = False
    lora: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_element: int = 2
    lora_dropout: bool = True
    mask_element: int = 1

    @property
    def scored(self) -> bool:
        """Attention is written in plain operations: the matrix of scores is a tensor."""
        return self.code in ("original", "eager")


def kept_bytes_per_token(layer: Layer) -> dict[str, int]:
    """{part: bytes} that autograd keeps of one layer for one token."""
    return {
        "norms": norms_kept(layer),
        "attention": attention_kept(layer),
        "scores": scores_kept(layer),
        "mlp": mlp_kept(layer),
        "inputs": inputs_kept(layer),
        "lora": lora_kept(layer),
        "dropout": dropout_kept(layer),
    }


def dropout_kept(layer: Layer) -> int:
    """Bytes per token of the masks of both residuals' dropout, 2 h, where a model has it."""
    return 2 * layer.mask_element * layer.shape.hidden if layer.shape.dropout else 0


def norms_kept(layer: Layer) -> int:
    """Bytes per token of both norms' inputs: 2 e h; RMSNorm's also 4 of a statistic each.

    The original RMSNorm computes in fp32: 4 h of the input's copy, with a trained weight 4 h of the
    normed row; and it multiplies the half-precision input too, so those e h are kept besides.
    """
    h, e = layer.shape.hidden, layer.element
    if layer.shape.glm1:
        return 2 * e * h
    if layer.code != "original":
        return 2 * (e * h + 4)
    copies = 2 if layer.trained else 1
    return 2 * (4 * h * copies + (e * h if e < 4 else 0))


def attention_kept(layer: Layer) -> int:
    """Bytes per token of what attention keeps, without its scores.

    packed-cpu: e (q + 2 kv): this project's rotation makes one tensor of queries, keys and values;
    the backward pass computes the scores again from views of it (chatglm/kernels.py).
    sdpa, packed: e (2 q + 2 kv) + 4 n: besides that tensor flash attention keeps its output and a
    log-sum a head (Dao et al., FlashAttention, 2022); + e k of ChatGLM-6B's additive mask.
    original, eager: 3 e q + k: rotated queries and keys are new tensors, or scaled and contiguous
    ones, and ChatGLM2's keys and values are copied out to all heads; k bytes of a bool mask. The
    original ChatGLM-6B's values are a view of the qkv product: its 2 e kv stay besides.
    """
    shape, e = layer.shape, layer.element
    rotated = e * (shape.query + 2 * shape.kv)
    if layer.code == "packed-cpu":
        return rotated
    if not layer.scored:
        mask = e * layer.keys if shape.infills else 0
        return rotated + e * shape.query + 4 * shape.heads + mask
    viewed = 2 * shape.kv if layer.code == "original" and shape.infills else 0
    return e * (3 * shape.query + viewed) + layer.keys


def scores_kept(layer: Layer) -> int:
    """Bytes per token of the softmax: n k (4 + e), n k 4 in fp32; 0 where scores are no tensor.

    It is computed in fp32 and copied to the values' dtype; in fp32 the copy is the same tensor.
    """
    if not layer.scored:
        return 0
    copied = layer.element if layer.element < 4 else 0
    return layer.shape.heads * layer.keys * (4 + copied)


def mlp_kept(layer: Layer) -> int:
    """Bytes per token of the activation function's operands: a number of tensors of e f.

    ChatGLM-6B: F.gelu keeps its input, 1. The original spells GELU out,
    0.5 x (1 + tanh(0.797 x (1 + 0.0447 x x))): the operands of its products and tanh's result are
    7, under torch.jit.script too. ChatGLM2: the first product is 2; the original keeps silu's
    result besides, 3.
    """
    original = layer.code == "original"
    if layer.shape.glm1:
        tensors = 7 if original else 1
    else:
        tensors = 3 if original else 2
    return layer.element * layer.shape.ffn * tensors


def input_is_kept(layer: Layer, linear: str) -> bool:
    """Whether attention keeps a linear's input already.

    Flash attention keeps its output, which the dense layer reads; in ragged rows the layer reads a
    copy, for the sequences are joined. Where queries, keys and values are made apart, of one input,
    it counts with the queries.
    """
    names = layer.shape.names
    return linear in names.qkv[1:] or (layer.code == "sdpa" and linear == names.dense)


def inputs_kept(layer: Layer) -> int:
    """Bytes per token of the inputs of trained linears: the sum of e x inputs; 0 of frozen ones."""
    if not layer.trained:
        return 0
    return sum(
        layer.element * linear.inputs
        for name, linear in layer.shape.linears.items()
        if not input_is_kept(layer, name)
    )


def lora_kept(layer: Layer) -> int:
    """Bytes per token of LoRA (Hu et al., 2021), B A dropout(x): of each linear that carries it the
    dropped input and its mask, and the product with A."""
    kept = 0
    for name, linear in layer.shape.linears.items():
        if short_name(name) in layer.lora:
            kept += lora_input_kept(layer, name, linear.inputs)
            kept += layer.lora_element * layer.lora_rank
    return kept


def lora_input_kept(layer: Layer, linear: str, inputs: int) -> int:
    """Bytes per token of one LoRA pair's input: (element + mask) x inputs; without dropout the
    input alone, 0 where it is kept already."""
    if layer.lora_dropout:
        return (layer.lora_element + layer.mask_element) * inputs
    return 0 if input_is_kept(layer, linear) else layer.lora_element * inputs


def keys_side_kept(layer: Layer) -> float:
    """Bytes per token of what is kept at every position, in a layer whose other outputs are
    computed at few: the first norm, queries, keys and values, and the input of their product."""
    shape, e = layer.shape, layer.element
    kept = norms_kept(layer) / 2 + e * (shape.query + 2 * shape.kv)
    if layer.trained:
        return kept + e * shape.hidden
    made = [short_name(name) for name in shape.names.qkv if short_name(name) in layer.lora]
    for _ in made:
        mask = layer.mask_element if layer.lora_dropout else 0
        kept += (layer.lora_element + mask) * shape.hidden + layer.lora_element * layer.lora_rank
    return kept


def products_kept(layer: Layer) -> int:
    """Bytes per token of one layer's matrix products and attention: what selective checkpointing
    keeps. e q + 4 n of attention, e x outputs of each linear, and LoRA's two products."""
    shape = layer.shape
    kept = layer.element * shape.query + 4 * shape.heads
    for name, linear in shape.linears.items():
        kept += layer.element * linear.outputs
        if short_name(name) in layer.lora:
            kept += layer.lora_element * (layer.lora_rank + linear.outputs)
    return kept


def working_bytes_per_token(layer: Layer) -> int:
    """Gradients alive at once inside one layer's backward pass: the larger of its two halves'."""
    return max(attention_work(layer), mlp_work(layer))


def attention_work(layer: Layer) -> int:
    """Bytes per token of attention's gradients: n k (8 + e) of the scores, in fp32 before and after
    the softmax and in the values' dtype; without scores 4 e q of queries, keys, values, output."""
    shape, e = layer.shape, layer.element
    return shape.heads * layer.keys * (8 + e) if layer.scored else e * 4 * shape.query


def mlp_work(layer: Layer) -> int:
    """Bytes per token of the MLP's gradients: 3 e f of ChatGLM-6B, 5 e f of the original ChatGLM2.

    This project's SwiGLU: e (4 f + h): the incoming gradient, both outgoing ones and a product;
    besides, the gradient that goes past the MLP.
    """
    shape, e = layer.shape, layer.element
    if shape.glm1:
        return e * 3 * shape.ffn
    if layer.code == "original":
        return e * 5 * shape.ffn
    return e * (4 * shape.ffn + shape.hidden)
