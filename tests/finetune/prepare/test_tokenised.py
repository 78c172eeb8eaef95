"""Data sets of token ids: written by finetune.prepare, read by train.py and by `datasets`."""

import json
import shutil

import numpy as np
import pytest

from chatglm import load_tokenizer
from chatglm.families import FAMILIES
from finetune.config import parse_config
from finetune.prepare.command import main
from finetune.record import read_run
from finetune.rows.encoding import Preparation, RowEncoder, prepare_rows
from finetune.rows.sources import RowReader, parse_sources, read_rows
from finetune.rows.streaming import check_streamable
from finetune.rows.token_folders import tokenised_files
from finetune.rows.tokenised import read_tokenised
from finetune.task import FineTuning
from scripts.prepare_tokenizer import main as make_tokenizer
from tests.finetune.runs import make_rows, metrics, write_rows

LENGTHS = ("--max_len", "96", "--max_src_len", "64")


@pytest.fixture(scope="module")
def tokenise(bases, rows_file, tmp_path_factory):
    """tokenise(family, *flags) -> the folder of the data set of `rows_file`."""

    def make(family: str, *more: str, rows=rows_file):
        folder = tmp_path_factory.mktemp("tokenised") / "set"
        words = ["tokenise", "--model_name_or_path", str(bases[family]), "--train_path", str(rows)]
        assert main([*words, "--output", str(folder), *LENGTHS, *more]) == 0
        return folder

    return make


def data_of(words) -> FineTuning:
    task = FineTuning(parse_config(words))
    task.load_rows()
    return task


def conversations(path, count: int):
    """Rows of several turns, of which the last answers alone have loss in some."""
    rows = []
    for number in range(count):
        history = [[f"问题{number}", "答案"]] * (number % 3)
        rows.append({"prompt": f"再问{number}", "response": "再答", "history": history})
    return write_rows(path, rows)


@pytest.mark.parametrize("family", ["glm", "glm2", "glm3", "qwen2"])
def test_train_py_reads_the_same_rows(tokenise, flags, bases, family, tmp_path):
    """Ids and labels of every row are those that train.py makes of the text."""
    rows = conversations(tmp_path / "rows.json", 9)
    folder = tokenise(family, rows=rows)
    out = tmp_path / "out"
    plain = data_of(flags(out, "--train_path", rows, family=family)).data
    read = data_of(flags(out, "--train_path", folder, family=family)).data
    assert len(plain) == len(read) >= 9
    for row in range(len(plain)):
        assert np.array_equal(plain.ids(row), read.ids(row))
        assert plain.n_masked(row) == read.n_masked(row)
        assert np.array_equal(plain.labels(row), read.labels(row))
        assert read.place(row) == f"{folder / 'train-00000.parquet'}[{row}]"
    assert (plain.truncated, plain.skipped) == (read.truncated, read.skipped)


def test_a_run_on_it_is_the_same_run(tokenise, flags, train, tmp_path):
    """Loss by loss; with other rows beside it, and again from the cache."""
    folder = tokenise("glm2")
    train(flags(tmp_path / "a", "--max_steps", 3))
    train(flags(tmp_path / "b", "--max_steps", 3, "--train_path", folder))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert read_run(tmp_path / "b")["rows"] == read_run(tmp_path / "a")["rows"]
    more = write_rows(tmp_path / "more.json", make_rows(5, seed=3))
    task = data_of(flags(tmp_path / "c", "--train_path", f"{folder},{more}:2"))
    assert len(task.data) == 13 + 5
    assert (
        len(data_of(flags(tmp_path / "d", "--train_path", folder, "--dataset_length", 4)).data) == 4
    )


def test_datasets_reads_it(tokenise, bases, rows_file, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tokenise("glm2")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    encoder = RowEncoder(load_tokenizer(bases["glm2"]), FAMILIES["glm2"], 96, 64)
    rows = read_rows(rows_file)[0]
    assert loaded.num_rows == len(rows) == 13
    for row, source in zip(loaded, rows):
        made = encoder.encode(source)[0]
        assert row["input_ids"] == made.input_ids and row["source"] == source.place
        assert row["labels"] == [-100] * made.n_masked + made.input_ids[made.n_masked :]
    card = json.loads((folder / "tokenised.json").read_text())
    assert (card["rows"], card["bad"], card["files"]) == (13, 0, ["train-00000.parquet"])
    assert "13 rows" in (folder / "README.md").read_text("utf-8")


def test_many_files_and_groups(tokenise, monkeypatch):
    from finetune.rows import tokenised

    whole = list(read_tokenised(tokenised_files(tokenise("glm2"))))
    monkeypatch.setattr(tokenised, "ROWS_A_FILE", 5)
    monkeypatch.setattr(tokenised, "ROWS_A_GROUP", 2)
    folder = tokenise("glm2")
    assert len(list(folder.glob("*.parquet"))) == 3
    numbers, rows = zip(*read_tokenised(tokenised_files(folder)))
    assert numbers == (*range(5), *range(5), *range(3))
    assert rows == tuple(row for _, row in whole)
    task_files = parse_sources(str(folder))[0].files
    assert [path.name[6:11] for path in task_files] == ["00000", "00001", "00002"]


@pytest.mark.parametrize(
    "family, words, said",
    [
        ("glm2-other", (), "was tokenised with another tokenizer than this model's"),
        ("glm3", (), "was tokenised with family glm2, this run has glm3"),
        ("glm2", ("--max_len", 80), "was tokenised with max_len 96, this run has 80"),
        (
            "glm2",
            ("--max_src_len", 50),
            "with max_src_len 64, this run has 50: give --max_src_len 64",
        ),
    ],
)
def test_other_settings_are_refused(tokenise, flags, bases, tmp_path, family, words, said):
    folder = tokenise("glm2")
    given = flags(tmp_path / "out", "--train_path", folder, *words, family=family.split("-")[0])
    if family == "glm2-other":
        other = tmp_path / "tokenizer"
        rows = write_rows(tmp_path / "rows.json", make_rows(60, seed=5))
        make = ["--input", str(rows), "--output_dir", str(other), "--vocab_size", "400"]
        assert make_tokenizer([*make, "--family", "glm2"]) == 0
        base = shutil.copytree(bases["glm2"], tmp_path / "other")
        shutil.copy(other / "tokenizer.model", base / "tokenizer.model")
        given += ["--model_name_or_path", str(base)]
    with pytest.raises(ValueError, match=said):
        data_of(given)


def test_damage_is_one_line(tokenise, flags, tmp_path):
    folder = tokenise("glm2")
    file = folder / "train-00000.parquet"
    content = bytearray(file.read_bytes())
    for damaged, said in (
        (b"PAR1" + bytes(100), "train-00000.parquet: not a Parquet file of token ids"),
        (content[:-20], "train-00000.parquet: not a Parquet file of token ids"),
        (None, "names ..train-00000.parquet.., the folder has 0 files"),
    ):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=said):
            data_of(flags(tmp_path / "out", "--train_path", folder))


def test_texts_are_asked_of_it_in_vain(tokenise):
    source = parse_sources(str(tokenise("glm2")))[0]
    with pytest.raises(ValueError, match="is a tokenised data set, without its texts"):
        read_rows(source)
    with pytest.raises(ValueError, match="--streaming reads JSON lines"):
        check_streamable(source)


def test_flags_of_reading_have_no_effect(tokenise, flags, tmp_path):
    folder = tokenise("glm2")
    words = flags(tmp_path / "out", "--train_path", folder, "--prompt_text", "读：")
    with pytest.raises(ValueError, match="--prompt_text has no effect: all rows are token ids"):
        data_of(words)


def test_another_task_reads_no_ids(tokenise, bases):
    class Others(RowEncoder):
        """As pre-training's and preferences' encoders are."""

    encoder = Others(load_tokenizer(bases["glm2"]), FAMILIES["glm2"], 96, 64)
    source = parse_sources(str(tokenise("glm2")))[0]
    with pytest.raises(ValueError, match="for fine-tuning, which this --task is not"):
        prepare_rows(source, Preparation(RowReader(), encoder))


def test_written_whole_or_not(bases, tmp_path, capsys):
    """A bad row at the end leaves nothing; a folder of something else is not replaced."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "问", "response": "答"}\n' * 3 + '{"prompt": 1}\n')
    words = ["tokenise", "--model_name_or_path", str(bases["glm2"]), "--train_path", str(rows)]
    assert main([*words, "--output", str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"finetune.prepare: error: {rows}:4: ")
    assert main([*words, "--output", str(tmp_path)]) == 1
    assert "is there and is no tokenised data set" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert main([*words, "--output", str(tmp_path / "set"), "--on_bad_row", "skip"]) == 0
    assert "3 rows, 0 cut, 1 bad ones skipped" in capsys.readouterr().out
    # Once more: the old set is replaced.
    assert main([*words, "--output", str(tmp_path / "set"), "--on_bad_row", "skip"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "set"]


def test_lengths(bases, tmp_path, capsys):
    """Percentiles by hand: answers of 1 to 100 pieces; and a picture."""
    tokenizer = load_tokenizer(bases["glm2"])
    encoder = RowEncoder(tokenizer, FAMILIES["glm2"], 10**4, 10**4)
    data = [{"prompt": "水泵漏油", "response": "油封" * count} for count in range(1, 101)]
    rows = write_rows(tmp_path / "rows.json", data)
    wholes, prompts = [], []
    for row in read_rows(rows)[0]:
        made = encoder.encode(row)[0]
        wholes.append(len(made.input_ids))
        prompts.append(made.n_masked)
    words = ["lengths", "--model_name_or_path", str(bases["glm2"]), "--train_path", str(rows)]
    limit = sorted(wholes)[79]
    more = ["--max_len", str(limit), "--max_src_len", "32", "--json", str(tmp_path / "l.json")]
    assert main([*words, *more, "--picture", str(tmp_path / "l.png")]) == 0
    found = json.loads((tmp_path / "l.json").read_text())
    ordered = sorted(wholes)
    whole = found["whole"]
    assert (whole["p50"], whole["p90"], whole["p99"]) == (ordered[49], ordered[89], ordered[98])
    assert whole["max"] == ordered[-1] and found["tokens"] == sum(wholes)
    assert found["prompt"]["max"] == prompts[0]
    assert found["over_max_len"] == pytest.approx(sum(n > limit for n in wholes) / 100)
    cut = [
        RowEncoder(tokenizer, FAMILIES["glm2"], limit, 32).encode(row) for row in read_rows(rows)[0]
    ]
    assert found["cut"] == sum(made[0].truncated for made in cut) / 100 > 0.1
    assert "100 rows" in capsys.readouterr().out
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
