"""Programs that know nothing of this project, run by python -m chatglm."""

import os
import subprocess
import sys

import pytest

from chatglm import load_tokenizer
from tests.conftest import REPO_ROOT

SCRIPT = """
import subprocess
import sys

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(tokenizer).__name__, tokenizer("你好")["input_ids"])
if "child" not in sys.argv:
    sys.exit(subprocess.run([sys.executable, *sys.argv, "child"]).returncode)
"""


def run(*words, cwd, **options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(REPO_ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "chatglm", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.slow
def test_a_file_and_the_processes_that_it_starts(tiny_folders, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = run("script.py", tiny_folders["glm"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    wanted = load_tokenizer(tiny_folders["glm"])("你好")["input_ids"]
    assert first == second == f"GLMTokenizer {wanted}"


def test_the_sitecustomize_of_others_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    children = REPO_ROOT / "chatglm" / "children"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (children, REPO_ROOT, tmp_path)))}
    code = "import sys; print('chatglm' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["theirs", "True"]


@pytest.mark.slow
def test_an_installed_command(tmp_path):
    done = run("accelerate", "launch", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "accelerate" in done.stdout


def test_a_module(tmp_path):
    done = run("json.tool", cwd=tmp_path, input='{"a": 1}')
    assert done.returncode == 0 and '"a": 1' in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["no_such"], "chatglm: error: no command, module or file 'no_such' is installed here"),
        (["no.such"], "chatglm: error: no command, module or file 'no.such' is installed here"),
        (["no_such.py"], "chatglm: error: no file no_such.py"),
    ],
)
def test_a_program_that_is_not_there(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == message


def test_help(tmp_path):
    assert "python -m chatglm PROGRAM" in run("--help", cwd=tmp_path).stdout
    assert run(cwd=tmp_path).returncode == 2
