"""Wrong files fail in one line: a sample of benchmarks/failures.py, and its classification."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.failing_commands import COMMANDS
from benchmarks.failures import Case, faults_of, left_behind
from benchmarks.forking import Outcome
from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.warm import warm_python

# Every so many of about 700 cases; no multiple of the number of kinds, so that these take turns.
EVERY = [89, pytest.param(23, marks=pytest.mark.slow)]
REPORT = next(command for command in COMMANDS if command.name == "finetune.report")
CASE = Case(REPORT, "RUN_DIR", "run/run.json", "empty", False)


@pytest.fixture(scope="module", params=EVERY)
def sample(request, tmp_path_factory) -> list[dict]:
    """Cases in a process of their own: forks of this one would share its threads and memory."""
    file = tmp_path_factory.mktemp("failures") / "cases.json"
    words = [
        "benchmarks/failures.py",
        "--every",
        str(request.param),
        "--jobs",
        "1",
        "--json",
        str(file),
    ]
    done = subprocess.run(
        [warm_python(), *words],
        cwd=REPO_ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert file.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(file.read_text())


def test_every_failure_is_one_line(sample):
    assert len(sample) >= 7 and len({row["kind"] for row in sample}) >= 6
    wrong = [row for row in sample if row["wrong"]]
    assert not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)


@pytest.mark.parametrize(
    "code, err, said",
    [
        (1, "finetune.report: error: run/run.json: not valid JSON\n", None),
        (1, "  3%|x| 1/9 [00:01<00:02]\rfinetune.report: error: run.json: empty\n", None),
        (0, "finetune.report: error: run.json: empty\n", "exit code 0"),
        (-9, "finetune.report: error: run.json: empty\n", "exit code -9"),
        (1, "", "nothing on stderr"),
        (1, "Traceback (most recent call last):\nValueError: run.json\n", "2 lines"),
        (1, "report: error: run.json: empty\n", "1 lines"),
        (1, "finetune.report: error: Expecting value: line 1\n", "names none of"),
    ],
)
def test_the_judgement(code, err, said):
    found = faults_of(CASE, Outcome(code, "", err), [])
    assert (not found) if said is None else said in found[0]


def test_what_is_left_behind_is_seen():
    before = {"run": (), "run/run.json": (3, 1)}
    after = {"run": (), "run/run.json": (4, 2), ".curves.png.tmp": (1, 1)}
    assert left_behind(before, after, CASE) == ["changed run/run.json", "left .curves.png.tmp"]
    assert left_behind(before, {"run": ()}, CASE) == ["removed run/run.json"]
    assert left_behind(before, before, CASE) == []


FAILING = (
    "from chatglm.commands import run_command\nimport sys\n"
    "print('ready', flush=True)\nsys.exit(run_command('prog', lambda: open('/no/such')))"
)


def failing_rank(rank: str) -> subprocess.Popen:
    words = [sys.executable, "-c", FAILING]
    env = os.environ | {"RANK": rank, "PYTHONPATH": str(REPO_ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=env, text=True, **pipes)


def test_the_first_rank_speaks_for_all():
    """What a launcher does: rank 0 fails and has printed; the others are ended."""
    first, other = failing_rank("0"), failing_rank("1")
    line = "prog: error: /no/such: No such file or directory\n"
    assert first.communicate(timeout=60)[1] == line and first.returncode == 1
    other.stdout.readline()
    time.sleep(0.3)
    other.terminate()
    assert other.communicate(timeout=60)[1] == "" and other.returncode == -signal.SIGTERM
    alone = failing_rank("1")
    assert alone.communicate(timeout=60)[1] == line and alone.returncode == 1
