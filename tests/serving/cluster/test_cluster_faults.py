"""Clusters on a Ray of this machine: the benchmark of faults in miniature, down, status."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time

import httpx
import pytest

from benchmarks import cluster_faults
from benchmarks.client_env import environment_python
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.serving.gateway.engines import free_port
from tests.serving.server.conftest import folders

__all__ = ["folders"]  # a fixture
SECONDS = ("served again s", "restored s")


@pytest.fixture(scope="module")
def ray_python():
    """(python, environment) of the environment `ray`, which finds this project's packages too."""
    python = environment_python("ray")
    paths = [str(REPO_ROOT), sysconfig.get_paths()["purelib"]]
    environment = child_env() | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"RAY_worker_register_timeout_seconds": "180"}
    with tempfile.TemporaryDirectory(prefix="r") as place:  # sockets below it want short paths
        yield python, environment | {"RAY_TMPDIR": place}


def test_requests_are_counted_as_what_their_clients_saw():
    """One of each kind, around a kill at 10 s."""
    wanted = {0: "a b c"}

    def seen(text, is_whole, tries=1, begun_s=11.0, asked_s=9.0):
        return cluster_faults.Asked(
            0, True, asked_s, begun_s, 12.0, text, is_whole=is_whole, tries=tries
        )

    asked = [
        seen("a b c", True),
        seen("a b c", True, tries=2, asked_s=10.5),
        seen("a b", False),
        seen("", False, begun_s=0.0, tries=9),
        seen("a b ca b c", True),
        seen("a b", True),
    ]
    found = cluster_faults.counts_of(asked, wanted, killed_s=10.0)
    assert found.pop("served again s") == 1.0
    told = {"requests": 6, "whole": 1, "asked again": 1, "broken off": 1, "lost": 1, "doubled": 2}
    assert found == told


SETTINGS = """
from types import SimpleNamespace
from ray import serve
from serving.cluster import application
from serving.cluster.bundles import ReplicaPlace
from serving.cluster.flags import parse_cluster_flags

words = ["up", "--model", "m", "--replicas", "2", "--max_replicas", "5", "--kv_tokens", "1000"]
_, flags = parse_cluster_flags(words)
settings = application.replica_settings(flags, ReplicaPlace(2, 1), 2)
deployment = serve.deployment(application.RayReplica, name="Replica").options(**settings)
scaling = deployment._deployment_config.autoscaling_config
policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
said = {"predicted_tokens": {"a": 2500.0, "b": 500.0}}
print(policy(SimpleNamespace(aggregated_metrics=said, target_num_replicas=2))[0])
print(scaling.min_replicas, scaling.max_replicas)
print(deployment._deployment_config.request_router_config.get_request_router_class().__name__)
print(deployment._replica_config.placement_group_bundles)
"""


@pytest.mark.slow
def test_ray_takes_the_settings(ray_python):
    """Its own checks of the deployment; policy and router as its processes will unpack them."""
    python, environment = ray_python
    done = subprocess.run(
        [python, "-c", SETTINGS], env=environment, capture_output=True, text=True, timeout=300
    )
    wanted = ["3.0", "2 5", "PredictedWorkRouter", "[{'CPU': 2.0, 'GPU': 1.0}]"]
    assert done.stdout.splitlines() == wanted, done.stderr[-2000:]


@pytest.mark.slow
def test_the_benchmark_in_miniature(ray_python, folders, tmp_path):
    """Nothing that had not begun is lost or doubled, whichever process is killed."""
    python, environment = ray_python
    rows_file = tmp_path / "rows.json"
    words = ["--model", folders[0], "--predictor", folders[1], "--port", free_port()]
    words += ["--clients", 4, "--tokens", 40, "--prompts", 4, "--before_s", 2]
    words += ["--limit_s", 180, "--patience_s", 180, "--json", rows_file]
    done = subprocess.run(
        [python, "benchmarks/cluster_faults.py", *map(str, words)],
        cwd=REPO_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    rows = json.loads(rows_file.read_text())
    assert [row["fault"] for row in rows] == list(cluster_faults.FAULTS)
    for row in rows:
        assert row["lost"] == row["doubled"] == 0, row
        assert row["whole"] > 0 and all(row[name] is not None for name in SECONDS), row


@pytest.mark.slow
def test_up_status_and_down(ray_python, folders):
    """The commands as users give them, in two terminals."""
    python, environment = ray_python
    port = free_port()
    words = ["--model", folders[0], "--predictor", folders[1], "--port", port, "--device", "cpu"]
    words += [
        "--replicas",
        1,
        "--served_model_name",
        "m",
        "--kv_tokens",
        4096,
        "--address",
        "local",
    ]

    def run(*given: str) -> subprocess.CompletedProcess:
        command = [python, "-m", "serving.cluster", *given]
        return subprocess.run(
            command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    up = subprocess.Popen(
        [python, "-m", "serving.cluster", "up", *map(str, words)],
        cwd=REPO_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
    )
    try:
        assert up.stdout.readline() == f"serving glm-foundry at http://127.0.0.1:{port}/v1\n"
        base = f"http://127.0.0.1:{port}"
        models = httpx.get(f"{base}/v1/models", timeout=60).json()
        assert models["data"][0]["id"] == "m"
        status = run("status")
        told = json.loads(status.stdout)
        assert told["status"] == "RUNNING" and told["front"]["open"] == 0, status.stderr
        assert told["deployments"]["Replica"]["replicas"] == {"RUNNING": 1}
        down = run("down")
        assert down.returncode == 0 and down.stdout == "glm-foundry has ended\n", down.stderr
        assert up.wait(120) == 0
    finally:
        up.kill()
        up.communicate()
    time.sleep(1)
    gone = run("status")
    assert gone.returncode == 1 and "no Ray cluster runs on this machine" in gone.stderr
