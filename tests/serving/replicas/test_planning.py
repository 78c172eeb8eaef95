"""From flags to a plan: devices, deployer, replicas, predictions, and what was taken."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import deployment
from finetune.placing import PlacementFlags, plan_replicas
from serving.cost_model.devices import GIB, Device
from serving.cost_model.model import DATASHEET
from serving.deployment.placement import Infeasible, Need
from serving.engines.pipeline import open_pipeline
from serving.engines.stage_reports import ModelLoading
from serving.replicas import planning
from serving.replicas.measuring import StressTester, cost_of, limits_of, time_batch
from serving.replicas.served_sizes import served_sizes
from serving.replicas.speeds import (
    RowCost,
    all_measurements,
    fit_first,
    fit_other,
    measurements_of,
    with_speeds,
)
from tests.causal_folders import make_causal_folder

FLAGS = PlacementFlags(None, None, None, None, None, "datasheet", False, 120.0)
NEED = {"kv_tokens": 512, "batch": 2, "prompt_tokens": 24, "output_tokens": 8}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(planning, "count_cores", lambda: 2)
    monkeypatch.setattr(planning, "count_gpus", lambda: 0)


def planned(folder, flags=FLAGS, **changes):
    return plan_replicas(replace(flags, **changes), str(folder), **NEED)


def test_a_chain_on_two_processes(tiny_folders):
    plan = planned(tiny_folders["glm2"], deployer="even", devices="cpu@1,cpu@1")
    (replica,) = plan.replicas
    places = [(stage.device, stage.start, stage.end, stage.threads) for stage in replica.stages]
    assert places == [("cpu", 0, 1, 1), ("cpu", 1, 3, 1)]
    assert set(replica.device_map.values()) == {"cpu"}
    said = plan.describe()
    assert "even: 3 layers on 2 of 2 device(s)" in said
    assert re.search(r"stage 1 on cpu@1, layers 1-2: [\d,]+ bytes of weights", said)


def test_replicas_of_one_device_each(tiny_folders):
    plan = planned(tiny_folders["glm2"], deployer="he", num_gpus=2)
    assert [len(replica.stages) for replica in plan.replicas] == [1, 1]
    assert all(replica.device_map is None for replica in plan.replicas)
    assert plan.replicas[0].stages[0].threads == 1


def test_auto_is_equal_shares(tiny_folders):
    plan = planned(tiny_folders["glm2"], device_map="auto", num_gpus=2)
    assert plan.placement.deployer == "even"


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "glm4", "llama", "qwen2"])
def test_predicted_bytes_are_those_of_a_real_pipeline(family, tiny_folders, tmp_path):
    folder = tiny_folders.get(family) or make_causal_folder(tmp_path, family)
    plan = planned(folder, deployer="even", devices="cpu@1")
    engine = open_pipeline(
        ModelLoading(str(folder)),
        plan.replicas[0],
        limits_of(plan.placement.need),
        cost_of(plan.placement, plan.profile),
    )
    (report,) = engine.stage_reports()
    assert plan.stages[0].weight_bytes == report.weight_bytes
    need = Need(512, 2, 24, 8)
    timing = time_batch(engine, need, 1)
    per_token = plan.stages[0].kv_bytes // 512
    assert timing.kv_bytes[0] == 2 * 64 * per_token  # two rows of the smallest length class
    table = planning.comparison(plan, engine.stage_reports(), timing.stages)
    assert table.count("predicted") == table.count("taken") == 1
    assert f"{report.weight_bytes:,}" in table
    assert "a pass" in planning.comparison(plan, engine.stage_reports())
    with pytest.raises(ValueError, match=r"1 stage\(s\), the engine 2"):
        planning.comparison(plan, [report, report])


@pytest.mark.slow
def test_the_benchmark_in_miniature(tiny_folders, tmp_path, capsys):
    """A pipeline of two processes beside its prediction."""
    output = tmp_path / "rows.json"
    sizes = ["--hidden", "32", "--layers", "3", "--repetitions", "1"]
    need = ["--batch", "2", "--prompt_tokens", "20", "--output_tokens", "4"]
    arguments = ["--tokenizer", str(tiny_folders["glm2"]), "--devices", "cpu@1,cpu@1"]
    assert deployment.main([*arguments, *sizes, *need, "--json", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert [row["layers"] for row in rows["stages"]] == ["0-0", "1-2"]
    for row in rows["stages"]:
        assert row["weight_bytes"][0] == row["weight_bytes"][1]
        assert row["kv_bytes"][0] == row["kv_bytes"][1]
        assert min(row["prefill_s"] + row["decode_s"]) > 0
    assert [row["deployer"] for row in rows["wholes"]] == ["helr", "even"]
    assert "worst" in capsys.readouterr().out


def test_a_cluster_file_replaces_measuring(tiny_folders, tmp_path):
    devices = []
    for name, threads in (("big", 2), ("small", 1)):
        devices.append(
            {
                "name": name,
                "memory_bytes": GIB,
                "bandwidth_bytes_s": 1e10 * threads,
                "flops_s": 1e11 * threads,
                "reserved_bytes": 0,
                "kind": "cpu",
                "threads": threads,
            }
        )
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({"devices": devices}))
    plan = planned(tiny_folders["glm2"], deployer="lr", cluster=str(file), profile=None)
    assert plan.measured_s == 0 and plan.profile == DATASHEET
    assert plan.replicas[0].stages[0].threads == 2
    one = planned(tiny_folders["glm2"], deployer="lr", cluster=str(file), num_gpus=1)
    assert len(one.placement.cluster.devices) == 1
    with pytest.raises(ValueError, match="--num_gpus 3: --cluster has 2"):
        planned(tiny_folders["glm2"], cluster=str(file), num_gpus=3)


def write_map(folder: Path, values) -> str:
    modules = {"transformer.embedding": 0}
    for layer, device in enumerate(values):
        modules[f"transformer.encoder.layers.{layer}"] = device
    (folder / "map.json").write_text(json.dumps(modules))
    return str(folder / "map.json")


def test_a_device_map_of_a_file(tiny_folders, tmp_path):
    path = write_map(tmp_path, [0, 1, 1])
    plan = planned(tiny_folders["glm2"], device_map=path, devices="cpu@1,cpu@1")
    assert plan.placement.stages == ((0, 1), (1, 2))
    path = write_map(tmp_path, ["cpu@2", "cpu@1", "cpu@1"])
    plan = planned(tiny_folders["glm2"], device_map=path, devices="cpu@1,cpu@2")
    assert plan.placement.stages == ((1, 1), (0, 2))


@pytest.mark.parametrize(
    "values, said",
    [
        ([0, 1], "layers.2 is on no device"),
        ([0, 1, 0], "layers.2 returns to device 0"),
        ([0, 1, 2], "no device 2"),
        ([0, 1, "cuda:0"], "no device 'cuda:0'; there are cpu@1, cpu@1"),
        ([0, 1, 1, 1], "layers.3: the model has 3 layers"),
        ([0, 1, True], "no device True"),
    ],
)
def test_device_maps_that_are_none(values, said, tiny_folders, tmp_path):
    path = write_map(tmp_path, values)
    with pytest.raises(ValueError) as error:
        planned(tiny_folders["glm2"], device_map=path, devices="cpu@1,cpu@1")
    assert said in str(error.value) and path in str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_gpus": 2, "devices": "cpu@1"}, "--num_gpus and --devices contradict"),
        ({"device_map": "auto", "deployer": "helr"}, "--device_map and --deployer contradict"),
        ({"cluster": "x.json", "devices": "cpu@1"}, "--cluster and --devices contradict"),
        ({"deployer": "helr", "measure": True}, "--measure is of --deployer morphling"),
        (
            {"deployer": "morphling", "measure": True, "measure_s": 0.0},
            "--measure_s must be above 0",
        ),
    ],
)
def test_flags_that_contradict(changes, said, tiny_folders):
    with pytest.raises(ValueError, match=said):
        planned(tiny_folders["glm2"], **changes)


def test_nothing_fits(tiny_folders, monkeypatch):
    monkeypatch.setattr("serving.replicas.devices.free_memory", lambda: 0)
    with pytest.raises(Infeasible, match="helr: no chain of devices holds the model: needs"):
        plan_replicas(
            replace(FLAGS, deployer="helr"), str(tiny_folders["glm2"]), kv_tokens=10**9, batch=1
        )


def test_stress_tests_of_the_real_engine(tiny_folders):
    plan = planned(
        tiny_folders["glm2"],
        deployer="morphling",
        devices="cpu@1,cpu@1",
        measure=True,
        measure_s=0.01,
    )
    assert plan.stress_tests == len(plan.rates) == 1  # the budget is spent by the first
    assert plan.stress_s > 0.01
    assert "1 stress test(s) in" in plan.describe()


def test_a_stress_tester_stops_at_its_budget():
    times = iter([0.0, 3.0, 3.0, 8.0])

    def fails(placement):
        raise ValueError("stop here")

    tester = StressTester(fails, 5.0, clock=lambda: next(times))
    with pytest.raises(ValueError, match="stop here"):
        tester(None)
    assert (tester.tests, tester.seconds) == (1, 0.0)  # an engine that was not opened


def timed_rows(sizes, device, profile):
    """Timings that a profile would give."""
    cost, rows = RowCost(sizes, device), []
    for batch, prompt in ((1, 64), (1, 256), (4, 32), (4, 128)):
        for phase in ("prefill", "decode"):
            whole, layers = measurements_of((phase, batch, prompt, 1.0, 1.0))
            rows.append((phase, batch, prompt, cost(whole, profile), cost(layers, profile)))
    return rows


def test_a_profile_is_found_again_and_another_devices_speeds():
    from serving.cost_model.model import ModelSizes

    sizes = ModelSizes.from_config("chatglm2-6b", 4)
    device = Device("cpu@2", 64 * GIB, 2e10, 1e12, kind="cpu", threads=2)
    true = replace(
        DATASHEET,
        weight_passes=1.4,
        compute_passes=3.0,
        layer_overhead_s=2e-4,
        step_overhead_s=1e-3,
    )
    rows = timed_rows(sizes, device, true)
    measured = with_speeds(sizes, replace(device, bandwidth_bytes_s=1.0, flops_s=1.0), rows)
    fitted = fit_first(sizes, measured, rows)
    cost = RowCost(sizes, measured)
    for row in all_measurements(rows):
        assert cost(row, fitted) == pytest.approx(row.seconds, rel=0.05)
    half = replace(device, bandwidth_bytes_s=1.2e10, flops_s=4e11, threads=1)
    slow_rows = timed_rows(sizes, half, true)
    found = fit_other(sizes, with_speeds(sizes, half, slow_rows), slow_rows, fitted)
    cost = RowCost(sizes, found)
    for row in all_measurements(slow_rows):
        assert cost(row, fitted) == pytest.approx(row.seconds, rel=0.1)
    assert found.bandwidth_bytes_s < measured.bandwidth_bytes_s


def test_sizes_of_packed_weights(tiny_folders, tmp_path):
    config = json.loads((Path(tiny_folders["glm2"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    plain = served_sizes(str(tmp_path), base=None, element_bytes=4)
    packed = served_sizes(str(tmp_path), base=None, element_bytes=4, keep_quantized=True)
    assert packed.model.layer_bytes == pytest.approx(plain.model.layer_bytes / 8, rel=0.01)
    assert packed.model.kv_bytes_per_token == plain.model.kv_bytes_per_token
