"""The published int8 and int4 releases: integers with one scale a row.

A quantised weight [out, in] is `weight`, int8 [out, in] for 8 bits or [out, in / 2] for 4, and
`weight_scale`, [out]; it stands for integer * scale. With 4 bits a byte holds the even column in
its high half and the odd one in its low half. Source: quantization.py of chatglm-6b-int4 (THUDM).

A folder of that kind is loaded into these modules; `dequantize_modules` makes ordinary ones of
them. Kept packed, a weight is widened at each call, which takes a quarter (4 bits) or half of the
memory of fp16, and more time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = (4, 8)
SCALE = "weight_scale"  # ends the names of the scales
# The linear layers of every block.
QUANTIZED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Those of the releases that quantise the embeddings too (chatglm-6b-int4-qe).
QUANTIZED_EMBEDDINGS = ("word_embeddings", "lm_head")


def largest_integer(bits: int) -> int:
    """The integers are -n to n. Raises ValueError for other bits than 4 and 8."""
    if bits not in BITS:
        raise ValueError(f"quantization_bit must be 4 or 8, got {bits!r}")
    return 2 ** (bits - 1) - 1


def quantize_rows(
    weight: Tensor, bits: int, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(int8 [out, in] or, for 4 bits, [out, in / 2]; scale [out]) of a weight [out, in].

    Rounds half to even, in the weight's own precision, by a scale that is rounded to `scale_dtype`
    before (ChatGLM-6B: fp16). Raises ValueError for other bits than 4 and
    8, and for 4 bits of an odd number of columns.
    """
    most = largest_integer(bits)
    if bits == 4 and weight.shape[1] % 2:
        raise ValueError(f"4 bits are packed in pairs: got {weight.shape[1]} columns")
    scale = weight.abs().max(dim=-1).values / most
    scale = scale.to(scale_dtype or weight.dtype)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    # A scale rounded down gives quotients beyond the largest integer.
    integers = torch.round(weight / divisor[:, None]).clamp(-most, most).to(torch.int8)
    return (pack_pairs(integers) if bits == 4 else integers), scale


def pack_pairs(integers: Tensor) -> Tensor:
    """Integers of -8 to 7, int8 [out, in], as int8 [out, in / 2]."""
    even, odd = integers[:, 0::2], integers[:, 1::2]
    return (even << 4) | (odd & 15)


def unpack_pairs(packed: Tensor) -> Tensor:
    """The reverse of `pack_pairs`; the halves are signed."""
    even = packed >> 4
    odd = (packed << 4) >> 4
    return torch.stack([even, odd], dim=-1).flatten(-2)


def dequantize_rows(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that integers and scales stand for, as `dtype`."""
    integers = unpack_pairs(weight) if bits == 4 else weight
    return integers.to(dtype) * scale.to(dtype)[..., None]


def packed_parameters(rows: int, columns: int, bits: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Empty integers and scales for a weight [rows, columns]."""
    width = columns // 2 if bits == 4 else columns
    integers = nn.Parameter(torch.zeros(rows, width, dtype=torch.int8), requires_grad=False)
    return integers, nn.Parameter(torch.zeros(rows), requires_grad=False)


class QuantizedLinear(nn.Module):
    """A linear layer of a packed weight; its bias is not quantised."""

    def __init__(self, linear: nn.Linear, bits: int):
        """In place of `linear`, with its bias and empty integers."""
        super().__init__()
        self.in_features, self.out_features, self.bits = (
            linear.in_features,
            linear.out_features,
            bits,
        )
        self.layer_type = type(linear)
        self.weight, self.weight_scale = packed_parameters(
            linear.out_features, linear.in_features, bits
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize_rows(self.weight, self.weight_scale, self.bits, x.dtype)
        return F.linear(x, weight, self.bias)

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary layer with the weight that this one stands for."""
        with torch.device("meta"):
            linear = self.layer_type(self.in_features, self.out_features, self.bias is not None)
        linear.weight = nn.Parameter(
            dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)
        )
        linear.bias = self.bias
        return linear


class QuantizedEmbedding(nn.Module):
    """Token embeddings as a packed weight, in the type of the scales, one a token."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.weight, self.weight_scale = packed_parameters(num_embeddings, embedding_dim, bits)

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.weight_scale[ids]
        return dequantize_rows(self.weight[ids], scale, self.bits, scale.dtype)

    def dequantized(self, dtype: torch.dtype) -> nn.Embedding:
        """Ordinary embeddings."""
        weight = dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)
        return nn.Embedding.from_pretrained(weight, freeze=False)


def is_quantized(name: str, embeddings: bool) -> bool:
    """Whether a release quantises the module of this name; `embeddings`: those too."""
    part = name.rpartition(".")[2]
    return part in QUANTIZED or (embeddings and part in QUANTIZED_EMBEDDINGS)


def pack_modules(model: nn.Module, bits: int, embeddings: bool = False) -> None:
    """Put empty packed modules in the places of those that a release quantises."""
    largest_integer(bits)
    for name, module in list(model.named_modules()):
        if not is_quantized(name, embeddings):
            continue
        if isinstance(module, nn.Linear):
            packed: nn.Module = QuantizedLinear(module, bits)
        elif isinstance(module, nn.Embedding):
            packed = QuantizedEmbedding(module.num_embeddings, module.embedding_dim, bits)
        else:
            continue
        model.set_submodule(name, packed)


def quantize_modules(model: nn.Module, bits: int, scale_dtype: torch.dtype | None = None) -> None:
    """Pack the linear layers of every block, with the integers and scales of their weights."""
    for name, module in list(model.named_modules()):
        if not (isinstance(module, nn.Linear) and is_quantized(name, embeddings=False)):
            continue
        packed = QuantizedLinear(module, bits)
        weight = module.weight.detach()
        integers, scale = quantize_rows(weight, bits, scale_dtype)
        packed.weight = nn.Parameter(integers, requires_grad=False)
        packed.weight_scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        model.set_submodule(name, packed)


def dequantize_modules(model: nn.Module) -> None:
    """Make ordinary modules of the packed ones, in the type of their scales."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            model.set_submodule(name, module.dequantized(module.weight_scale.dtype))
