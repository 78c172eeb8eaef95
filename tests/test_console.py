"""glm-foundry: every command, its arguments and exit codes as they are, and a fast --help."""

import importlib
import os
import subprocess
import sys

import pytest
import tomllib

import glm_foundry
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env, command

CPU_SECONDS = {"--help": 0.3, "chat --help": 1.0}  # on machines that others use too
HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets", "scipy", "matplotlib"}
HEAVY |= {
    "httpx",
    "aiohttp",
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "prometheus_client",
    "llguidance",
}
# Commands whose --help imports numpy.
READ_WITH_NUMPY = {
    *("simulate", "deploy", "cost", "lengths", "run", "monitor", "demo", "sweep"),
    *("prepare", "predictor-evaluate", "predictor-export", "predictor-update"),
}


def test_the_entry_point_is_installed_with_its_module():
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["project"]["scripts"]["glm-foundry"].partition(":")
    assert getattr(importlib.import_module(module), name) is glm_foundry.main
    assert module in project["tool"]["setuptools"]["py-modules"]


@pytest.mark.parametrize("name", glm_foundry.COMMANDS)
def test_every_command_has_its_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        glm_foundry.main([name, "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and out.startswith("usage: ") and not err


def test_help_lists_the_commands(capsys):
    assert glm_foundry.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in glm_foundry.COMMANDS.items():
        assert f"  {name} " in text and entry.text in text
    assert max(map(len, text.splitlines())) <= 80
    assert glm_foundry.main([]) == 2
    assert capsys.readouterr().err == text
    assert glm_foundry.main(["--version"]) == 0


@pytest.mark.parametrize(
    "name, guess",
    [("chta", "did you mean chat?"), ("serv", "did you mean serve?"), ("x", "--help lists")],
)
def test_an_unknown_command_is_one_line(capsys, name, guess):
    assert glm_foundry.main([name]) == 2
    out, err = capsys.readouterr()
    assert not out and guess in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "name, module, rest",
    [
        ("train", "train", ["--no_such_flag", "a b"]),
        ("merge", "merge_lora", ["--help"]),
        ("memory", "finetune.memory", ["--no_such_flag"]),
        ("chat", "serving.chat", ["nowhere", "--device", "cpu"]),
        ("batch", "serving.batch", ["--model", "x"]),
    ],
)
def test_arguments_and_exit_codes_pass_through(name, module, rest):
    by_name = command("-m", "glm_foundry", name, *rest, ok=None)
    by_module = command("-m", module, *rest, ok=None)
    for attribute in ("returncode", "stdout", "stderr"):
        assert getattr(by_name, attribute) == getattr(by_module, attribute)


@pytest.mark.parametrize("words", CPU_SECONDS)
def test_help_is_fast(words):
    """The least CPU time of some runs: neither torch nor transformers is imported."""
    least = min(cpu_seconds(words) for _ in range(3))
    assert least < CPU_SECONDS[words]


def cpu_seconds(words: str) -> float:
    """CPU time of a new process, user and system."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glm_foundry", *words.split()],
        cwd=REPO_ROOT,
        env=child_env(),
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("name", glm_foundry.COMMANDS)
def test_what_help_imports(name):
    """Packages that take long to import are imported when a command begins its work."""
    code = f"""
import sys, glm_foundry
try:
    glm_foundry.main([{name!r}, "--help"])
finally:
    print("imported:", *sys.modules)
"""
    imported = command("-c", code, warm=False).stdout.rpartition("imported:")[2].split()
    assert "glm_foundry" in imported and not HEAVY & set(imported)
    assert name in READ_WITH_NUMPY or "numpy" not in imported
