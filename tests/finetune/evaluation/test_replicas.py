"""Several replica processes answer as one process does; deaths, resumption, orphans, tables."""

import csv
import json
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
from finetune.evaluation.generation import AnswerOptions, PromptBatch, longest_first
from finetune.evaluation.inference import prepare_inference
from finetune.evaluation.replicas import OfflineReplicas
from finetune.launched import single_start
from finetune.placing import ReplicaSpec, StageSpec
from tests.finetune.runs import ROOT, child_env, launch, make_rows, write_rows
from tests.predictor.synthetic import make_rows as lengths
from tests.predictor.synthetic import train as train_predictor
from tests.warm import warm_python

CPU = ReplicaSpec((StageSpec("cpu", 0, 2, 1),))
ASK = ["--max_new_tokens", "6", "--batch_size", "2"]
SAMPLED = ["--do_sample", "True", "--temperature", "2", "--top_p", "1"]


class HandPlan:
    """A placement written by hand, without predictions."""

    stages = ()

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
    assert mapped.devices == "cpu@1+cpu@1"
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_and_what_was_answered_is_kept(adapter, tmp_path, number):
    """A command that is killed leaves no replica behind, and goes on where it was."""
    file = write_rows(tmp_path / "rows.json", make_rows(36, seed=4))
    words = ["--model_path", adapter, "--batch_size", 2, "--max_new_tokens", 40, "--file", file]
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
    until(lambda: kept.is_file() and kept.read_text().count("\n") > 4)
    replicas = list(map(int, re.findall(r"process (\d+) is ready", told.read_text())))
    assert replicas and all(map(is_there, replicas))
    os.kill(started.pid, number)
    started.wait(60)
    until(lambda: not any(map(is_there, replicas)), 20)
    if number == signal.SIGINT:
        assert started.returncode == 130
        assert told.read_text().splitlines()[-1] == "finetune.predict: interrupted"
    there = kept.read_text().count("\n") - 1
    assert 0 < there < 36 and not out.exists()
    words = list(map(str, words))
    assert predict.main([*words, "--output", str(out), "--device", "cpu"]) == 0
    assert predict.main([*words, "--output", str(tmp_path / "whole"), "--device", "cpu"]) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not kept.exists()


def test_fewer_batches_than_replicas_start_fewer(adapter, tmp_path, two, capfd):
    file = write_rows(tmp_path / "rows.json", make_rows(2))
    words = ["--model_path", str(adapter), *ASK, "--file", str(file), "--num_gpus", "2"]
    assert predict.main(words) == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2 and "replica 2" not in err
    assert "1 of 2 replicas are started, for there are no more batches: 2 prompts" in err


def test_single_prompts_take_one_replica(adapter, two, monkeypatch, capfd):
    words = ["--model_path", str(adapter), "--max_new_tokens", "6", "--prompt", "水泵漏油。"]
    assert predict.main([*words, "--num_gpus", "2"]) == 1
    assert "this placement has 2: give --device, or --device_map auto" in capfd.readouterr().err
    mapped = ReplicaSpec((StageSpec("cpu", 0, 1), StageSpec("cpu", 1, 2)), {"": "cpu"})
    monkeypatch.setattr(answering, "plan_replicas", lambda *_, **__: HandPlan(mapped))
    assert predict.main([*words, "--device_map", "auto"]) == 0
    placed = capfd.readouterr().out
    assert predict.main([*words, "--device", "cpu"]) == 0
    assert capfd.readouterr().out == placed


def test_an_error_while_loading_is_one_line(adapter, tmp_path, monkeypatch, capfd):
    nowhere = ReplicaSpec((StageSpec("cuda:7", 0, 2),))
    monkeypatch.setattr(answering, "plan_replicas", lambda *_, **__: HandPlan(nowhere))
    file = write_rows(tmp_path / "rows.json", make_rows(2))
    words = ["--model_path", str(adapter), *ASK, "--file", str(file), "--num_gpus", "1"]
    assert predict.main(words) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("finetune.predict: error: replica 1 (cuda:7): --device: there is no")


def test_a_table_of_answers_keeps_the_inputs_columns(adapter, tmp_path):
    """CSV in, CSV out: commas, quotes and line breaks come back as they were."""
    file = tmp_path / "rows.csv"
    inputs = [["t, 1", "水泵\n漏油", "a_b_c"], ['"t" 2', "轮胎异响", ""]]
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([["title", "content", "answer"], *inputs])
    words = ["--model_path", str(adapter), *ASK, "--device", "cpu", "--file", str(file)]
    words += ["--columns", "prompt=content,response=answer", "--data_format", "prompt"]
    found = {}
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        assert predict.main([*words, "--output", str(tmp_path / name)]) == 0
        with (tmp_path / name).open(newline="") as table:
            found[name] = list(csv.reader(table, delimiter=delimiter))
    assert found["a.csv"] == found["a.tsv"]
    header, *rows = found["a.csv"]
    assert header == ["title", "content", "prompt", "answer", "reference"]
    assert predict.main([*words, "--output", str(tmp_path / "a.jsonl")]) == 0
    lines = list(map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()))
    for row, given, line in zip(rows, inputs, lines, strict=True):
        assert row == [*given[:2], line["prompt"], line["answer"], given[2]]


def test_rows_of_like_predicted_answers_are_answered_together(adapter, tmp_path):
    """The longest first; answers stay in the order of the rows."""
    kinds = ["name", "essay", "list", "explain"] * 3
    prompts = [f"{kind} river lamp train {i}" for i, kind in enumerate(kinds)]
    predictor = train_predictor(tmp_path, lengths(300, seed=5))
    predicted = answering.predict_lengths(str(predictor), prompts, str(adapter))
    order = longest_first([[0]] * 12, predicted)
    assert [kinds[i] for i in order] == ["essay"] * 3 + ["explain"] * 3 + ["list"] * 3 + [
        "name"
    ] * 3
    rows = [{"prompt": prompt, "response": "x"} for prompt in prompts]
    file = write_rows(tmp_path / "rows.json", rows)
    words = ["--model_path", str(adapter), *ASK, "--device", "cpu", "--file", str(file)]
    assert predict.main([*words, "--output", str(tmp_path / "a")]) == 0
    words += ["--predictor", str(predictor)]
    assert predict.main([*words, "--output", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "words, said",
    [
        ("--num_gpus 2 --device 1", "--device needs a run without --deployer, --num_gpus"),
        ("--deployer helr --device_map auto", "a run without --device_map"),
        ("--cluster c.json", "--cluster needs --deployer, --num_gpus, --devices"),
        ("--deployer helr --measure", "--measure needs --deployer morphling"),
        ("--deployer morphling --measure_s 5", "--measure_s needs --measure"),
    ],
)
def test_flags_without_effect(words, said, capsys):
    for main, what in ((predict.main, "--file"), (evaluate.main, "--test_path")):
        with pytest.raises(SystemExit) as stop:
            main(["--model_path", "m", what, "x", *words.split()])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_probe_is_on_one_device(capsys):
    for words in ("--num_gpus 2", "--predictor p"):
        with pytest.raises(SystemExit):
            evaluate.main(["--model_path", "m", "--probe", "x", *words.split()])
        assert f"{words.split()[0]} needs --test_path" in capsys.readouterr().err


def test_under_a_launcher_one_rank_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # some of it is taken away
    for rank, world, own in (("0", "2", "2"), ("1", "2", "2"), ("0", "4", "2"), ("0", "1", "1")):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", own)):
            monkeypatch.setenv(name, value)
        given = ["--local_rank=0", "--file", "x"]
        if (rank, world) == ("1", "2"):
            with pytest.raises(SystemExit) as stop:
                single_start(given)
            assert stop.value.code == 0
        elif own != world:
            with pytest.raises(SystemExit, match="ranks on several machines"):
                single_start(given)
        elif world == "1":
            assert single_start(given) == given
        else:
            assert single_start(given) == ["--file", "x", "--num_gpus", "2"]
            assert "WORLD_SIZE" not in os.environ and single_start(["--prompt", "x"])
            assert "without a launcher it is --num_gpus 2" in capsys.readouterr().err


def test_a_deployers_replicas_answer(adapter, tmp_path, capfd):
    """From the flags to the answers: the placement is printed, and what it took beside it."""
    device = {"memory_bytes": 2**33, "bandwidth_bytes_s": 1e10, "flops_s": 1e11, "kind": "cpu"}
    devices = [device | {"name": "cpu", "reserved_bytes": 0, "threads": 1}] * 2
    cluster = tmp_path / "cluster.json"
    cluster.write_text(json.dumps({"devices": devices}))
    file = write_rows(tmp_path / "rows.json", make_rows(8))
    words = ["--model_path", str(adapter), *ASK, "--file", str(file), "--output"]
    assert predict.main([*words, str(tmp_path / "one"), "--device", "cpu"]) == 0
    placed = ["--num_gpus", "2", "--deployer", "helr", "--cluster", str(cluster)]
    assert predict.main([*words, str(tmp_path / "two"), *placed]) == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    err = capfd.readouterr().err
    assert "helr: 2 layers on 1 of 2 device(s), 2 replica(s)" in err
    found = re.search(r"weights ([\d.]+) MiB on cpu \(predicted ([\d.]+)\)", err)
    taken, predicted = map(float, found.groups())
    assert predicted == pytest.approx(taken, rel=0.25) and err.count(" (predicted ") == 4


@pytest.mark.launch
def test_under_deepspeed(adapter, tmp_path):
    """`deepspeed --num_gpus 2` answers once, by two replicas of one command."""
    file = write_rows(tmp_path / "rows.json", make_rows(5))
    words = ["--model_path", adapter, *ASK, "--file", file, "--output"]
    assert predict.main([*map(str, words), str(tmp_path / "one"), "--device", "cpu"]) == 0
    launch("deepspeed", placed_command(tmp_path), *words, tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
