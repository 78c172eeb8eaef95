"""LoRA's tensors as other programs lay them out, as updates of the linear layers of a ChatGLM here.

Three layouts are known: peft's; MergedLinear's, which updates equal parts of a layer's outputs
(Microsoft's loralib; peft 0.2 with one target module; ms-swift); and that of GlmForCausalLM, whose
queries, keys and values are layers of their own (transformers' conversion of GLM-4).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import PEFT, SPLIT_LAYER

PART = re.compile(r"(.+)\.lora_([AB])(?:\.weight)?")
# What peft 0.2 chose for a single target module: the first and the last third of the outputs.
PEFT_02 = (True, False, True)
SPLIT_NAMES = {
    "qkv_proj": "self_attention.query_key_value",
    "o_proj": "self_attention.dense",
    "gate_up_proj": "mlp.dense_h_to_4h",
    "down_proj": "mlp.dense_4h_to_h",
}
FUSED = SPLIT_NAMES["qkv_proj"]


@dataclass(frozen=True)
class Update:
    """The update scaling * b @ a of a linear layer's weight (out, in).

    Attributes:
        a: (r, in).
        b: (out, r).
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a)


def pair_tensors(source: object, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: its A and B} of tensors under peft's names (`chatglm.adapters.peft_name`).

    Args:
        source: the file or folder, for errors.
    Raises:
        ValueError: there is another tensor, one without its partner, an empty one, or none.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = PART.fullmatch(name.removeprefix(PEFT))
        if match is None:
            raise ValueError(
                f"{source} is not converted: it holds {name} besides LoRA's A and B; "
                "merge it with the program that made it"
            )
        if not tensor.numel():
            raise ValueError(
                f"{source}: {name} is empty, as ZeRO-3 leaves a tensor that is saved without "
                "gathering it: the weights are not in this file"
            )
        if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
            raise ValueError(
                f"{source}: {name} is no matrix of LoRA: {tensor.dtype}, shape {list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds numbers that are not finite")
        parts.setdefault(match[1], {})[match[2]] = tensor.detach()
    if not parts:
        raise ValueError(f"{source} holds no LoRA tensors")
    pairs = {}
    for module, found in parts.items():
        if lacking := {"A", "B"} - found.keys():
            raise ValueError(f"{source} lacks {module}.lora_{lacking.pop()}")
        pairs[module] = (found["A"], found["B"])
    return pairs


def dense_b(module: str, a: Tensor, b: Tensor, outputs: int, enabled: list[bool] | None) -> Tensor:
    """B (outputs, rows of A) of MergedLinear's: its grouped convolution as one product.

    Group g of `rank` rows of A gives the g-th of the parts of the outputs that are enabled.

    Args:
        a: (groups * rank, in).
        b: (enabled outputs, rank), or with a last dimension of 1.
        enabled: which of the equal parts are updated; None: peft 0.2's choice, or all.
    Raises:
        ValueError: the shapes do not fit the parts.
    """
    b = b.flatten(1)
    rank = b.shape[1]
    groups = len(a) // rank
    if enabled is None:
        enabled = [True] * groups if len(b) == outputs else list(PEFT_02)
    part = outputs // len(enabled)
    fits = rank * groups == len(a) and sum(enabled) == groups and part * len(enabled) == outputs
    if not fits or len(b) != part * groups:
        raise ValueError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no LoRA of "
            f"{groups} of {len(enabled)} equal parts of {outputs} outputs"
        )
    whole = b.new_zeros(outputs, len(a))
    places = [place for place, is_on in enumerate(enabled) if is_on]
    for group, place in enumerate(places):
        columns = slice(group * rank, (group + 1) * rank)
        whole[place * part : (place + 1) * part, columns] = b[group * part : (group + 1) * part]
    return whole


def is_merged(a: Tensor, b: Tensor) -> bool:
    """Whether A and B are MergedLinear's."""
    return b.dim() == 3 or b.shape[1] != len(a)


def as_updates(
    pairs: dict[str, tuple[Tensor, Tensor]],
    outputs: dict[str, int],
    scaling: Callable[[str, int], float],
    enabled: list[bool] | None,
) -> dict[str, Update]:
    """The updates of the layers that `pairs` names.

    Args:
        outputs: of each layer of the base.
        scaling: of a module's update by its name and the rank of its file.
        enabled: as `dense_b` takes it.
    Raises:
        ValueError: a MergedLinear's layer is not in the base, or does not fit it.
    """
    updates = {}
    for module, (a, b) in pairs.items():
        factor = scaling(module, b.shape[1])
        if is_merged(a, b):
            if module not in outputs:
                raise ValueError(f"{module} is no linear layer of the base model")
            b = dense_b(module, a, b, outputs[module], enabled)
        updates[module] = Update(a, b, factor)
    return updates


def fuse(parts: dict[str, Update], sizes: dict[str, int]) -> Update:
    """The update of a fused layer, whose outputs are those of the layers of `sizes` in that order.

    [s1 B1 A1; s2 B2 A2] = s1 diag(B1, s2 / s1 B2) [A1; A2]: the ranks add up. A layer without an
    update stays as it is.

    Args:
        parts: update of each layer that has one.
        sizes: {layer: number of its outputs}.
    Raises:
        ValueError: an update has another number of outputs.
    """
    first = next(iter(parts.values()))
    a = torch.cat([update.a for update in parts.values()])
    b = first.b.new_zeros(sum(sizes.values()), len(a))
    columns: dict[str, slice] = {}
    column = 0
    for name, update in parts.items():
        columns[name] = slice(column, column + update.rank)
        column += update.rank
    row = 0
    for name, size in sizes.items():
        part = parts.get(name)
        if part is not None:
            if len(part.b) != size:
                raise ValueError(f"{name} has {len(part.b)} outputs, the base has {size}")
            b[row : row + size, columns[name]] = part.b * (part.scaling / first.scaling)
        row += size
    return Update(a, b, first.scaling)


def fuse_split(
    source: object, updates: dict[str, Update], sizes: dict[str, int]
) -> dict[str, Update]:
    """GlmForCausalLM's updates as those of the same model in the layout of ChatGLM2 to GLM-4.

    Its conversion (convert_glm_weights_to_hf.py of transformers) renames layers and cuts
    query_key_value into q_proj, k_proj and v_proj; no row moves within them.

    Args:
        source: the file or folder, for errors.
        sizes: outputs of q_proj, k_proj and v_proj, in that order.
    Raises:
        ValueError: a layer is none of GlmForCausalLM's, or has other outputs.
    """
    fused: dict[str, Update] = {}
    split: dict[str, dict[str, Update]] = {}
    for module, update in updates.items():
        match = SPLIT_LAYER.fullmatch(module)
        if match is None or match[2] not in SPLIT_NAMES.keys() | sizes.keys():
            raise ValueError(
                f"{source}: {module} is no layer of GlmForCausalLM, and an adapter of another "
                "model, such as a Llama made of a ChatGLM, does not fit a ChatGLM"
            )
        layer = f"transformer.encoder.layers.{match[1]}."
        if match[2] in sizes:
            split.setdefault(layer, {})[match[2]] = update
        else:
            fused[layer + SPLIT_NAMES[match[2]]] = update
    for layer, parts in split.items():
        fused[layer + FUSED] = fuse(parts, sizes)
    return fused


def lora_options(
    updates: dict[str, Update], linear: dict[str, tuple[int, int]]
) -> dict[str, object]:
    """Fields of peft's LoraConfig that give exactly these updates.

    Args:
        linear: {layer: (outputs, inputs)} of every linear layer of the base.
    """
    ranks = {module: update.rank for module, update in updates.items()}
    first = next(iter(updates.values()))
    r, alpha = first.rank, tidy(first.scaling * first.rank)
    other_ranks, other_alphas = {}, {}
    for module, update in updates.items():
        if update.rank != r:
            other_ranks[module] = update.rank
        if (own := tidy(update.scaling * update.rank)) != alpha:
            other_alphas[module] = own
    return {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": target_names(set(ranks), set(linear)),
        "rank_pattern": other_ranks,
        "alpha_pattern": other_alphas,
    }


def tidy(value: float) -> float:
    """A whole number as one, without what rounding left of scaling * rank."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-9) else value


def target_names(chosen: set[str], linear: set[str]) -> list[str]:
    """peft's target_modules: short names where they mean these layers alone, else whole names."""
    names = set()
    for module in chosen:
        short = module.rsplit(".", 1)[-1]
        alike = {name for name in linear if name.rsplit(".", 1)[-1] == short}
        names.add(short if alike <= chosen else module)
    return sorted(names)
