"""Weights laid out once for oneDNN, where a bfloat16 model runs on a CPU.

torch's linear hands oneDNN weights as they are stored, row by row, and oneDNN lays them out anew at
every call, which is about half of what the layers of a decode step of a few rows cost. Here that is
done once, when the model is loaded.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from chatglm.kernels import OutputLayer

PLAIN = (nn.Linear, OutputLayer)  # not their subclasses, which compute something else


class OneDnnLinear(nn.Module):
    """As the nn.Linear that it is made of; its weight is in oneDNN's own layout, no parameter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); without a gradient."""
        return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, "none", [], "")

    @property
    def weight_bytes(self) -> int:
        """Memory of its weight."""
        return self.in_features * self.out_features * self.laid_out.element_size()


def use_onednn_layout(model: nn.Module) -> int:
    """Replace a model's plain bfloat16 linear layers on the CPU, in place.

    The model can only be run from then on: the replaced weights are freed, but for one that
    another module has too, such as an embedding's.

    Returns:
        How many were replaced; 0 where oneDNN has no bfloat16 on this CPU.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    count = 0
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if is_replaced(layer):
                setattr(module, name, OneDnnLinear(layer))
                count += 1
    return count


def is_replaced(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain linear layer in bfloat16 on the CPU."""
    if type(layer) not in PLAIN:
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
