"""benchmarks/data_memory.py in miniature, and what 2 ranks do where rows cannot be read."""

import json
import subprocess
import sys

import pytest

from benchmarks import data_memory
from finetune.rows.encoding import RowEncoder
from tests.finetune.runs import ROOT, child_env, free_port, make_rows, write_rows

RANK = """
import sys
import torch.distributed as dist
from finetune.config import parse_config
from finetune.task import FineTuning
dist.init_process_group("gloo")
for number in ("1", "2"):
    task = FineTuning(parse_config([word.replace("NUMBER", number) for word in sys.argv[1:]]))
    try:
        task.load_rows()
        print(len(task.data), task.hash, task.data.place(0), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


@pytest.mark.slow
def test_rows_are_tokenised_once(tmp_path, monkeypatch, capsys):
    """By one of 2 ranks with a cold cache, by nobody with a warm one, once more without a cache."""
    model = data_memory.prepare_model(tmp_path)
    corpus = data_memory.make_corpus(tmp_path / "corpus.jsonl", model, 40_000, "conversations")
    words = data_memory.flags_of(tmp_path, model, corpus)
    found = [data_memory.run_ranks(2, [*words, "--data_cache", str(tmp_path / "cache")])]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(RowEncoder, "encode", RowEncoder.encode)  # put back at the end
    for cache in (str(tmp_path / "cache"), ""):
        data_memory.run_rank([*words, "--data_cache", cache])
        found.append(
            data_memory.together(1, [json.loads(capsys.readouterr().out.splitlines()[-1])])
        )
    assert [row["times_tokenised"] for row in found] == [1, 0, 1]
    assert 30_000 < found[0]["tokens"] < 50_000 and len({row["tokens"] for row in found}) == 1


def test_goals():
    reached = {
        "ranks": 2,
        "cache": "warm",
        "tokens": 10**7,
        "bytes_a_token": 9.0,
        "seconds": 1.9,
        "times_tokenised": 0.0,
    }
    large = reached | {"tokens": 5 * 10**7, "seconds": 5.0, "bytes_a_token": 5.9}
    cold = large | {"cache": "cold", "times_tokenised": 1.0}
    assert not any(map(data_memory.missed, (reached, large, cold)))
    wrong = [
        reached | {"seconds": 2.1},
        large | {"bytes_a_token": 6.1},
        cold | {"times_tokenised": 2.0},
        large | {"times_tokenised": 1.0},
    ]
    assert [len(data_memory.missed(row)) for row in wrong] == [1] * 4


@pytest.mark.slow
def test_an_error_of_the_first_rank_is_everybodys(flags, tmp_path):
    """Both ranks say what is wrong with a row, and go on to the next rows together."""
    write_rows(tmp_path / "rows-1.json", [*make_rows(2), {}])
    good = write_rows(tmp_path / "rows-2.json", make_rows(3))
    words = flags(
        tmp_path / "out",
        "--train_path",
        tmp_path / "rows-NUMBER.json",
        "--data_cache",
        tmp_path / "cache",
    )
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=child_env(**launched, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    said = [
        [line for line in rank.communicate(timeout=120)[0].splitlines() if "rows-" in line]
        for rank in ranks
    ]
    assert said[0] == said[1] and said[0][0].startswith(f"BadRow {tmp_path}/rows-1.json:3: ")
    assert said[0][1].startswith("3 ") and said[0][1].endswith(f"{good}:1")
    assert len(list((tmp_path / "cache").iterdir())) == 1
