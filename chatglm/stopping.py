"""When a generation ends beside its stop ids."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class PositionsEnd(StoppingCriteria):
    """Ends a generation at the last position. transformers' own criterion would replace its own."""

    def __init__(self, most: int):
        self.most = most

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        done = input_ids.shape[1] >= self.most
        return torch.full((len(input_ids),), done, device=input_ids.device)
