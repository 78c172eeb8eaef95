"""The sizes of a model's parameters, and which are trained."""

from typing import NamedTuple

from torch import nn

from finetune.distributed import whole_size


class ParameterSize(NamedTuple):
    """A parameter's number of elements."""

    name: str
    size: int
    is_trained: bool


def parameter_sizes(model: nn.Module) -> list[ParameterSize]:
    """The size of each parameter."""
    sizes = []
    for name, parameter in model.named_parameters():
        sizes.append(ParameterSize(name, full_size(parameter), parameter.requires_grad))
    return sizes


def trained_size(sizes: list[ParameterSize]) -> int:
    """Elements of the trainable parameters."""
    return sum(size for _, size, is_trained in sizes if is_trained)


def whole_model_size(sizes: list[ParameterSize]) -> int:
    """Elements of all parameters."""
    return sum(size for _, size, _ in sizes)


def parameter_report(sizes: list[ParameterSize]) -> str:
    """Text of the names, sizes and share of the trainable parameters."""
    trained = trained_size(sizes)
    total = whole_model_size(sizes)
    lines = [f"  {name} {size:,}" for name, size, is_trained in sizes if is_trained]
    if len(lines) > 8:
        lines = [*lines[:4], f"  ... {len(lines) - 8} more ...", *lines[-4:]]
    head = f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.4f} %)"
    return "\n".join([head, *lines])


def full_size(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter before ZeRO-3 partitions it or 4 bits pack it."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed else whole_size(parameter)
