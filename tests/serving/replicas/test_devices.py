"""Devices by their names, and what is known of them."""

import pytest

from serving.cost_model.devices import DEVICES, GIB, Device, Link
from serving.replicas import devices
from serving.replicas.devices import LocalDevice, first_devices, parse_devices
from serving.replicas.probe import ProbeResult, ProbeTask, line_through, run_probe


def test_names_are_devices():
    assert [d.name for d in parse_devices("cuda:2, cuda:0", 3, 8)] == ["cuda:2", "cuda:0"]
    assert [d.threads for d in parse_devices("cpu@2,cpu@1,cpu", 0, 4)] == [2, 1, 4]
    assert [d.torch_name for d in parse_devices("cpu@1,cpu@1", 0, 2)] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("cuda:3", "there is no GPU cuda:3 here, only cuda:0 to cuda:1"),
        ("cuda:0,cuda:0", "cuda:0 comes twice"),
        ("cuda:0,cpu@1", "all GPUs or all CPU processes"),
        ("cpu@9", "cpu@9 must have from 1 to 4 threads"),
        ("cpu@0", "cpu@0 must have from 1 to 4 threads"),
        ("gpu0", "wanted names such as"),
        ("", "wanted names such as"),
    ],
)
def test_devices_that_are_not_there(text, said):
    with pytest.raises(ValueError, match="--devices") as error:
        parse_devices(text, 2, 4)
    assert said in str(error.value)


def test_the_first_devices():
    assert [d.name for d in first_devices(2, 4, 8)] == ["cuda:0", "cuda:1"]
    assert len(first_devices(None, 4, 8)) == 4
    with pytest.raises(ValueError, match="--num_gpus 5: there are 4"):
        first_devices(5, 4, 8)
    # Without GPUs: processes that share the cores, with a thread each at least.
    assert [d.threads for d in first_devices(3, 0, 8)] == [2, 2, 2]
    assert [d.threads for d in first_devices(3, 0, 2)] == [1, 1, 1]
    assert [d.threads for d in first_devices(None, 0, 8)] == [8]


def test_free_memory_is_what_the_system_says(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  100 kB\nMemAvailable:      42 kB\n")
    assert devices.free_memory(file) == 42 * 1024
    assert devices.free_memory() > 0


def test_memory_in_use_is_not_there():
    local = [LocalDevice("cuda", 0), LocalDevice("cuda", 1)]
    title = "NVIDIA A100-SXM4-80GB"
    probed = ProbeResult({"cuda:0": title, "cuda:1": title}, {"cuda:0": 79 * GIB, "cuda:1": GIB})
    found = [devices.device_of(each, local, probed, None) for each in local]
    assert [d.memory_bytes for d in found] == [79 * GIB, GIB]
    assert found[0].bandwidth_bytes_s == DEVICES["A100-80G"].bandwidth_bytes_s
    assert [d.torch_name for d in found] == ["cuda:0", "cuda:1"]
    assert found[0].label == f"cuda:0 {title}"


def test_processes_share_the_memory_that_is_free():
    two = first_devices(2, 0, 2)
    one = devices.device_of(two[0], two, ProbeResult(), None)
    whole = devices.device_of(two[0], two[:1], ProbeResult(), None)
    assert one.memory_bytes == pytest.approx(whole.memory_bytes / 2, rel=0.2)
    assert (one.name, one.threads, one.kind) == ("cpu@1", 1, "cpu")


def test_like_links_are_one():
    local = parse_devices("cuda:0,cuda:1,cuda:2", 3, 1)
    found = [Device(f"G{i}", GIB, 1e12, 1e14, torch_name=d.name) for i, d in enumerate(local)]
    links = {"cuda:0>cuda:1": (2.0e11, 5e-6), "cuda:1>cuda:0": (2.1e11, 6e-6)}
    links |= {"cuda:0>cuda:2": (2e10, 1e-5), "cuda:2>cuda:0": (2.2e10, 1e-5)}
    links |= {"cuda:1>cuda:2": (2.1e10, 1e-5), "cuda:2>cuda:1": (2e10, 1e-5)}
    cluster = devices.joined(found, local, ProbeResult(links=links))
    assert cluster.links[0][1] == cluster.links[1][0] == Link(2.0e11, 5e-6)
    assert len({link for row in cluster.links for link in row if link}) == 2


def test_speeds_follow_threads():
    device = Device("cpu@1", GIB, 20e9, 1e12, kind="cpu", threads=1)
    assert devices.scaled_by_threads(device, 4).flops_s == pytest.approx(0.25e12)


def test_a_line_through_two_messages():
    rate, latency = line_through([1e-5 + 4096 / 1e9, 1e-5 + 4 * 2**20 / 1e9])
    assert rate == pytest.approx(1e9)
    assert latency == pytest.approx(1e-5)


def test_links_between_processes_are_measured():
    probed = run_probe(ProbeTask(("cpu@1",), links=True))
    rate, latency = probed.links["cpu"]
    assert 1e7 < rate < 1e12
    assert 0 <= latency < 0.1


def test_a_probe_that_fails_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="could not be measured: no such model folder") as error:
        run_probe(ProbeTask(("cpu@1",), settings=((1, 16),), folder=str(tmp_path / "none")))
    assert "\n" not in str(error.value)
