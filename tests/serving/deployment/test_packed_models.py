"""Several models on partly used devices: the rule, and the search against every assignment."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cost_model.devices import GIB, Device
from serving.cost_model.model import ModelSizes
from serving.deployment.command import main
from serving.deployment.packing import ModelToPack, PackedModel, pack_models
from serving.deployment.placement import Infeasible, Need


def model_of(units: int, layers: int = 1) -> ModelToPack:
    """A model of so many MiB in all, without KV."""
    size = units * 2**20 // layers
    sizes = ModelSizes(layers, 8, 8, 0, 0, size, 0, 0, 1)
    return ModelToPack(f"m{units}", sizes, Need(0))


def device_of(units: int) -> Device:
    return Device(f"d{units}", units * 2**20, 1e12, 1e14, reserved_bytes=0)


def check(packed: list[PackedModel], models, devices) -> None:
    """Every layer is placed once, and no device holds more than it has."""
    used = [0] * len(devices)
    assert [each.model for each in packed] == list(models)
    for each in packed:
        assert sum(layers for _, layers in each.stages) == each.model.sizes.layers
        for d, size in each.bytes_on.items():
            used[d] += size
    assert all(size <= device.usable_bytes for size, device in zip(used, devices))


sizes_of = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(sizes_of, st.lists(st.integers(1, 16), min_size=1, max_size=4))
def test_it_packs_whatever_can_be_packed(units, rooms):
    models, devices = list(map(model_of, units)), list(map(device_of, rooms))
    possible = False
    for places in product(range(len(rooms)), repeat=len(units)):
        loads = [0] * len(rooms)
        for place, size in zip(places, units):
            loads[place] += size
        possible = possible or all(load <= room for load, room in zip(loads, rooms))
    if possible:
        check(pack_models(models, devices), models, devices)
    else:
        with pytest.raises(Infeasible, match="there is none"):
            pack_models(models, devices)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(4, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 16), min_size=2, max_size=4),
)
def test_models_of_several_layers_may_be_split(units, rooms):
    models = [model_of(4 * size, layers=4) for size in units]
    devices = [device_of(4 * room) for room in rooms]
    try:
        check(pack_models(models, devices), models, devices)
    except Infeasible:
        # Layers are a quarter of a model: what does not fit loses less than a layer a device.
        lost = max(units) * len(rooms) * len(units)
        assert sum(units) * 4 > sum(rooms) * 4 - lost


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=6))
def test_equal_devices_are_used_within_the_rules_bound(units):
    models, devices = list(map(model_of, units)), [device_of(10)] * len(units)
    packed = pack_models(models, devices)
    used = len({d for each in packed for d in each.bytes_on})
    fewest = next(n for n in range(1, len(units) + 1) if fits(units, n))
    assert used <= 11 / 9 * fewest + 6 / 9


def fits(units: list[int], bins: int) -> bool:
    for places in product(range(bins), repeat=len(units)):
        loads = [0] * bins
        for place, size in zip(places, units):
            loads[place] += size
        if max(loads) <= 10:
            return True
    return False


def test_the_fullest_device_that_holds_it():
    packed = pack_models([model_of(5)], [device_of(20), device_of(6), device_of(9)])
    assert packed[0].stages == ((1, 1),)


def test_the_rule_alone_would_fail_here():
    # Best fit decreasing gives 6 to the device of 7, and then 4 + 3 has no place beside 5.
    models = list(map(model_of, (6, 5, 4, 3)))
    devices = [device_of(10), device_of(8)]
    check(pack_models(models, devices), models, devices)


def test_no_room_says_what_is_free():
    with pytest.raises(Infeasible, match=r"no place for m9, which needs 9,437,184 bytes, beside"):
        pack_models([model_of(12), model_of(9)], [device_of(12), device_of(8)])


def test_the_command_packs(capsys, tmp_path):
    arguments = ["--pack", "chatglm2-6b,chatglm3-6b@4000,glm-4-9b", "--device", "RTX3090"]
    arguments += ["--gpus", "3", "--free_gib", "24,20,14", "--json", str(tmp_path / "packed.json")]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "chatglm3-6b layers 0-27" in lines[0] and "glm-4-9b layers 0-39" in lines[1]
    assert json.loads((tmp_path / "packed.json").read_text())[1]["model"] == "chatglm3-6b"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--pack", "chatglm2-6b@x"], "KV tokens must be a whole number"),
        (["--pack", "chatglm2-6b", "--free_gib", "1,2"], "--free_gib gives 2 device(s)"),
        (["--pack", "chatglm2-6b", "--free_gib", "a"], "wanted numbers with commas"),
        (["--pack", "chatglm2-6b", "--free_gib", "900"], "has up to"),
        (["--pack", "chatglm2-6b", "--free_gib", "9"], "no place for chatglm2-6b"),
    ],
)
def test_errors_of_packing(arguments, said, capsys):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_kv_counts():
    sizes = ModelSizes.from_config("chatglm2-6b")
    need = Need(100_000)
    device = Device("d", 13 * GIB, 1e12, 1e14, reserved_bytes=0)
    assert pack_models([ModelToPack("m", sizes, Need(0))], [device])
    with pytest.raises(Infeasible):
        pack_models([ModelToPack("m", sizes, need)], [device])
