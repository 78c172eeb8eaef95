"""benchmarks/serving_load.py in miniature; its figures and how it counts what goes wrong."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.client_env import PACKAGES
from benchmarks.client_env import main as client_env
from benchmarks.serving_load import cost_figures, cpu_seconds, quantile, slope_per_minute
from benchmarks.serving_load import main as load
from tests.warm import warm_python


@pytest.fixture
def run_load(monkeypatch, tmp_path, capsys):
    """Runs a subcommand in a server that starts at once; its figures."""
    monkeypatch.setattr(sys, "executable", warm_python())

    def run(command, *words):
        out = tmp_path / f"{command}.json"
        code = load([command, *map(str, words), "--json", str(out)])
        found = json.loads(out.read_text())
        assert code == 0 and found["faults"] == [], (found["faults"], capsys.readouterr().err)
        return found

    return run


def test_steady(run_load):
    found = run_load("steady", "--clients", 6, "--minutes", 0.03, "--tokens", 6)
    assert found["requests"] >= 6 and found["errors"] == 0
    assert 0 < found["ttft_p50_s"] <= found["ttft_p99_s"]
    assert found["ttft_p50_s"] <= found["latency_p50_s"] < 60
    assert len(found["rss_mib"]) == 4


def test_disconnects(run_load):
    found = run_load("disconnects", "--clients", 40)
    assert sum(found["left"].values()) == 40


def test_cost(run_load):
    sizes = ["--hidden_size", 64, "--layers", 2]
    found = run_load(
        "cost", *sizes, "--clients", 3, "--requests", 6, "--tokens", 5, "--repetitions", 1
    )
    assert found["errors"] == 0 and found["bare_cpu_s"][0] > 0
    assert min(found["ttft_p50_ms"]) > 0


def test_hostile(run_load):
    found = run_load("hostile", "--requests", 80, "--examples", 0)
    assert found["requests"] >= 60 and set(found) >= {"attack", "drawn", "bytes"}


@pytest.mark.slow
def test_hostile_with_schemathesis(run_load):
    found = run_load("hostile", "--requests", 8, "--examples", 10)
    assert found["schemathesis"]["cases"] > 100 and found["schemathesis"]["exit_code"] == 0


def test_figures_of_cost():
    class Flags:
        clients, requests, tokens = 2, 4, 10

    over = {"cpu_s": 1.2, "ttft_s": [0.03, 0.05], "errors": 0}
    found = cost_figures(Flags, {}, [(over, {"cpu_s": 1.0, "ttft_s": [0.01, 0.03]})])
    assert found["cost_share"] == pytest.approx(0.2)
    assert found["ttft_cost_ms"] == pytest.approx(20)
    assert found["cost_us_per_token"] == pytest.approx(5000)


def test_figures_of_time():
    assert slope_per_minute([(0, 10.0), (30, 11.0), (60, 12.0)]) == pytest.approx(2)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2 and quantile([1.0, 9.0], 0.99) == 9
    before = cpu_seconds(os.getpid())
    sum(range(10_000_000))
    assert 0.02 < cpu_seconds(os.getpid()) - before < 10


@pytest.mark.slow
def test_an_environment_is_made_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GLM_FOUNDRY_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setitem(PACKAGES, "empty", ("pip",))
    assert client_env(["empty"]) == 0
    python = Path(capsys.readouterr().out.strip())
    assert python.exists() and python.parents[1].parent == tmp_path
    (python.parent / "mark").touch()
    assert client_env(["empty"]) == 0
    assert Path(capsys.readouterr().out.strip()) == python and (python.parent / "mark").exists()
    monkeypatch.setitem(PACKAGES, "none", ("./not-a-package",))
    assert client_env(["none"]) == 1
    assert "the environment none could not be made" in capsys.readouterr().err
