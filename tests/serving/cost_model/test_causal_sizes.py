"""Sizes of GLM, Llama and Qwen by arithmetic, against transformers' own models."""

import pytest

from serving.cost_model.causal_sizes import causal_shape
from serving.cost_model.devices import GIB, Cluster, Device
from serving.cost_model.model import DATASHEET, ModelSizes
from serving.deployment.deployers import DEPLOYERS
from serving.deployment.placement import Need
from tests.causal_folders import KINDS, random_causal_model

BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_parameters_are_a_real_models(kind, biased):
    model = random_causal_model(kind, vocab_size=96, **(BIASES.get(kind, {}) if biased else {}))
    config = model.config.to_dict()
    assert causal_shape(config).total == model.num_parameters()
    sizes = ModelSizes.from_config(config, 4)
    in_layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert sizes.layer_bytes == in_layer
    assert sizes.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert sizes.kv_bytes_per_token == 4 * 2 * 2 * 2 * 16  # bytes, K and V, layers, heads, width


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_map_names_every_module(kind):
    model = random_causal_model(kind, vocab_size=96)
    sizes = ModelSizes.from_config(model.config.to_dict(), 4)
    device = Device("d", GIB, 1e12, 1e14, reserved_bytes=0)
    placement = DEPLOYERS["even"].place(sizes, Cluster.uniform(device, 2), Need(16), DATASHEET)
    names = placement.to_device_map()
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert any(name.startswith(f"{module}.") for module in names), name
    first, last = names["model.embed_tokens"], names["lm_head"]
    assert (first == last) == (kind == "qwen2")  # which is tied here


def test_a_width_that_is_missing():
    config = {"model_type": "llama", "hidden_size": 8}
    with pytest.raises(ValueError, match="num_hidden_layers must be a whole number"):
        ModelSizes.from_config(config)
