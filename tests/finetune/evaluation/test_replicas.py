"""Several replica processes answer as one process does; deaths, resumption, orphans, tables."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.evaluation import answering, evaluate, predict
from finetune.evaluation.generation import AnswerOptions, PromptBatch
from finetune.evaluation.inference import prepare_inference
from finetune.evaluation.replicas import OfflineReplicas, device_name
from finetune.placing import ReplicaSpec, StageSpec
from tests.finetune.runs import ROOT, child_env, make_rows, write_rows
from tests.warm import warm_python

CPU = ReplicaSpec((StageSpec("cpu", 0, 2, 1),))
ASK = ["--max_new_tokens", "6", "--batch_size", "2"]
SAMPLED = ["--do_sample", "True", "--temperature", "2", "--top_p", "1"]


class HandPlan:
    """A placement written by hand."""

    def __init__(self, *replicas: ReplicaSpec):
        self.replicas = replicas

    def describe(self) -> str:
        return f"{len(self.replicas)} replicas by hand"


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    """Replicas start as forks of a process with the libraries."""
    monkeypatch.setattr(sys, "executable", warm_python())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(answering, "plan_replicas", lambda *_, **__: HandPlan(CPU, CPU))


def flags_of(adapter, *more) -> predict.PredictionFlags:
    words = ["--model_path", str(adapter), "--max_new_tokens", "200", "--file", "x", *more]
    return predict.PredictionFlags(**vars(predict.build_parser().parse_args(words)))


@contextmanager
def replicas_of(adapter, specs, new_tokens: int = 200):
    flags = flags_of(adapter)
    setup = prepare_inference(flags)
    options = AnswerOptions({"max_new_tokens": new_tokens, "min_new_tokens": new_tokens})
    with OfflineReplicas(specs, flags, setup, options) as replicas:
        yield replicas


BATCHES = [PromptBatch([2 * i, 2 * i + 1], [[5, 6, 7 + i], [5, 8, 9]], seed=i) for i in range(6)]


def test_a_device_map_in_one_process_answers_as_one_device(adapter):
    stages = (StageSpec("cpu", 0, 1, 1), StageSpec("cpu", 1, 2, 1))
    mapped = ReplicaSpec(stages, {"": "cpu"})
    assert device_name(mapped) == "cpu@1+cpu@1"
    found = []
    for spec in (CPU, mapped):
        with replicas_of(adapter, [spec], 5) as replicas:
            found.append([answers for _, answers in replicas.answers(BATCHES[:2])])
            size = replicas.replicas[0].figures.weight_bytes
            assert list(size) == ["cpu"] and size["cpu"] > 100_000
    assert found[0] == found[1]


def test_a_dead_replicas_batch_is_dealt_again(adapter, capfd):
    """kill -9 in the middle of a batch: no answer is lost, and none comes twice."""
    with replicas_of(adapter, [CPU, CPU], 20) as replicas:
        whole = {batch.seed: answers for batch, answers in replicas.answers(BATCHES)}
    with replicas_of(adapter, [CPU, CPU], 20) as replicas:
        found = []
        for batch, answers in replicas.answers(BATCHES):
            if not found:
                busy = next(r for r in replicas.replicas if r.dealt is not None)
                os.kill(busy.process.pid, signal.SIGKILL)
            found.append((batch.seed, answers))
        deaths = [replica.figures.deaths for replica in replicas.replicas]
        rows = sum(replica.figures.rows for replica in replicas.replicas)
    assert sorted(deaths) == [0, 1] and rows == 12
    assert sorted(found) == sorted(whole.items())
    err = capfd.readouterr().err
    assert f"{busy.name}, process " in err and "was ended by SIGKILL; it is started again" in err


def test_a_batch_that_ends_every_process_is_an_error(adapter):
    with replicas_of(adapter, [CPU]) as replicas:
        answers = replicas.answers(BATCHES)
        deal = replicas._deal

        def deal_and_kill(*given):
            deal(*given)
            for replica in replicas.replicas:
                if replica.dealt is not None:
                    os.kill(replica.process.pid, signal.SIGKILL)

        replicas._deal = deal_and_kill
        with pytest.raises(ChildProcessError, match="died 3 times|ended 3 processes"):
            list(answers)


def test_an_error_of_one_batch_is_the_commands(adapter):
    """The class and the text of the error in the process; the replica is named."""
    with (
        replicas_of(adapter, [CPU], 5) as replicas,
        pytest.raises(RuntimeError, match=r"replica 1 \(cpu@1\): Traceback"),
    ):
        list(replicas.answers([PromptBatch([0], [[10**6]])]))


@pytest.mark.parametrize("more", [[], SAMPLED], ids=["greedy", "sampled"])
def test_a_file_is_answered_as_by_one_process(adapter, tmp_path, two, capfd, more):
    """In the order of its rows; what each replica took is told."""
    file = write_rows(tmp_path / "rows.json", make_rows(9, seed=3))
    words = ["--model_path", str(adapter), *ASK, *more, "--file", str(file), "--output"]
    assert predict.main([*words, str(tmp_path / "one.json"), "--device", "cpu"]) == 0
    assert predict.main([*words, str(tmp_path / "two.json"), "--num_gpus", "2"]) == 0
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    err = capfd.readouterr().err
    assert "2 replicas by hand" in err and "replica 2 (cpu@1): weights " in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "rows.json", "two.json"]


def test_scores_are_those_of_one_process(adapter, tmp_path, two):
    file = write_rows(tmp_path / "rows.json", make_rows(5))
    words = ["--model_path", str(adapter), *ASK, *SAMPLED, "--num_answers", "2"]
    words += ["--test_path", str(file), "--metrics", "exact_match,triple_f1", "--predictions"]
    assert evaluate.main([*words, str(tmp_path / "one"), "--device", "cpu"]) == 0
    assert evaluate.main([*words, str(tmp_path / "two"), "--num_gpus", "2"]) == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


def placed_command(folder: Path) -> Path:
    """A script: finetune.predict with a placement by hand, of two replicas."""
    script = folder / "placed.py"
    script.write_text(
        "import sys\n"
        "from finetune.evaluation import answering, predict\n"
        "from tests.finetune.evaluation.test_replicas import CPU, HandPlan\n"
        "answering.plan_replicas = lambda *_, **__: HandPlan(CPU, CPU)\n"
        "sys.exit(predict.main(sys.argv[1:]))\n"
    )
    return script


def until(condition, seconds: float = 60.0):
    """Wait until the condition holds; returns its value."""
    end_s = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.05)
    return value


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_and_what_was_answered_is_kept(adapter, tmp_path, number):
    """A command that is killed leaves no replica behind, and goes on where it was."""
    file = write_rows(tmp_path / "rows.json", make_rows(60, seed=4))
    words = ["--model_path", adapter, "--batch_size", 2, "--max_new_tokens", 60, "--file", file]
    out = tmp_path / "answers.json"
    script = placed_command(tmp_path)
    told = tmp_path / "stderr"
    with told.open("w") as stderr:
        started = subprocess.Popen(
            [sys.executable, script, *map(str, words), "--num_gpus", "2", "--output", out],
            env=child_env(),
            cwd=ROOT,
            stderr=stderr,
        )
    kept = tmp_path / ".answers.json.partial"
    until(lambda: kept.is_file() and kept.read_text().count("\n") > 6)
    replicas = list(map(int, re.findall(r"process (\d+) is ready", told.read_text())))
    assert replicas and all(map(is_there, replicas))
    os.kill(started.pid, number)
    started.wait(60)
    until(lambda: not any(map(is_there, replicas)), 20)
    if number == signal.SIGINT:
        assert started.returncode == 130
        assert told.read_text().splitlines()[-1] == "finetune.predict: interrupted"
    there = kept.read_text().count("\n") - 1
    assert 0 < there < 60 and not out.exists()
    words = list(map(str, words))
    assert predict.main([*words, "--output", str(out), "--device", "cpu"]) == 0
    assert predict.main([*words, "--output", str(tmp_path / "whole"), "--device", "cpu"]) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not kept.exists()
