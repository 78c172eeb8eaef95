"""The cost model of a model that is loaded. Free of torch at import."""

from typing import TYPE_CHECKING

from serving.cost_model.devices import DEVICES
from serving.cost_model.model import CostModel, ModelSizes, Profile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def served_cost_model(model: "PreTrainedModel", profile: Profile) -> CostModel:
    """The cost model of a loaded model on its device."""
    import torch

    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    shape = ModelSizes.from_config(model.config.to_dict(), weight.itemsize)
    return CostModel.of(shape, cost_device(weight.device), profile)


def cost_device(device: "torch.device") -> str:
    """The entry of DEVICES that is most similar to this torch.device.

    The policies soon go by step times that are measured while serving.
    """
    if device.type != "cuda":
        return "CPU"
    import torch

    properties = torch.cuda.get_device_properties(device)
    similar_devices = []
    for name in DEVICES:
        if name.split("-")[0].removeprefix("RTX") in properties.name.replace(" ", ""):
            similar_devices.append(name)

    def memory_gap(name: str) -> float:
        return abs(DEVICES[name].memory_bytes - properties.total_memory)

    return min(similar_devices or ["A100-80G"], key=memory_gap)
