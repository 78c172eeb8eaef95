"""Files of every kind, folders, hubs; weights and replay.

Which rows an epoch reads is a pure function of (seed, epoch).
"""

import collections
import gzip
import hashlib
import json
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import parse_config
from finetune.epochs import draw_rows
from finetune.row_task import draw_counts
from finetune.rows.encoding import Preparation
from finetune.rows.formats import BadRow, Row
from finetune.rows.sources import (
    RowReader,
    hash_rows,
    join_hashes,
    parse_sources,
    read_file_items,
    read_rows,
    replay_count,
)
from finetune.task import FineTuning
from tests.conftest import shared_file
from tests.finetune.runs import ROOT, child_env, make_rows, metrics, write_rows

ITEMS = [{"prompt": "水，泵", "response": 'a "b"\nc'}, {"prompt": "x", "response": ""}]


def pairs(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.prompt, *row.answers) for row in rows]


def write_kind(folder, kind: str):
    import csv
    import io

    import pyarrow
    import pyarrow.parquet

    file = folder / f"rows{kind}"
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in ITEMS)
    if kind.startswith(".json.gz"):
        text = json.dumps(ITEMS)
    if kind.startswith((".csv", ".tsv")):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(
            out, ["prompt", "response"], delimiter="\t" if kind == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(ITEMS)
        text = "\ufeff" + out.getvalue()
    if kind == ".parquet":
        # a column that only some rows have is null in the others
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(
                [ITEMS[0] | {"history": None}, ITEMS[1] | {"history": [["q", "a"]]}]
            ),
            file,
        )
    else:
        file.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize(
    "kind", [".json", ".jsonl", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".tsv", ".parquet"]
)
def test_kinds_of_files(tmp_path, kind):
    file = write_kind(tmp_path, kind)
    rows, _ = read_rows(file)
    assert pairs(rows) == [(item["prompt"], item["response"]) for item in ITEMS]
    assert (
        all(row.place.startswith(str(file)) for row in rows)
        and len({row.place for row in rows}) == 2
    )
    if kind == ".parquet":
        assert rows[0].turns == () and len(rows[1].turns) == 4
    # the same through a folder and through a pattern
    assert [source.files for source in parse_sources(f"{tmp_path},{tmp_path}/r*s{kind}")] == [
        (file,),
        (file,),
    ]


def test_broken_files_are_named(tmp_path):
    for name, content, said in [
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("b.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "not a whole gzip file"),
        ("c.csv", b'prompt,response\n"x,y\n', "c.csv:1: not valid CSV"),
        ("d.csv", b"prompt,response\na,b,c\n", "d.csv:2: wanted 2 cells"),
        ("e.parquet", b"PAR1", "not a parquet file"),
        ("f.csv", b"\xff\xfe\n", "f.csv:1: not UTF-8"),
        ("g.jsonl", b"{'input': __import__('os')}\n", "g.jsonl:1: not valid JSON"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRow, match=said) as error:
            read_rows(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_names_and_weights(tmp_path):
    for name in ("a.json", "b.jsonl", "c:2.json", "x,y.json"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    given = parse_sources(
        f"{tmp_path}/a.json, {tmp_path}/b.jsonl:0.3,{tmp_path}/c:2.json,hf://owner/name:2,ms://x/y#test"
    )
    assert [
        (source.name.removeprefix(str(tmp_path)), len(source.files), source.weight)
        for source in given
    ] == [
        ("/a.json", 1, 1),
        ("/b.jsonl", 1, 0.3),
        ("/c:2.json", 1, 1),
        ("hf://owner/name", 0, 2),
        ("ms://x/y#test", 0, 1),
    ]
    assert parse_sources(str(tmp_path / "x,y.json"))[0].files == (tmp_path / "x,y.json",)
    for name, said in [
        ("nowhere.json", "no such file: nowhere.json"),
        (f"{tmp_path}/a.json:0", "above 0"),
        (f"{tmp_path}/a.json:-1", "above 0"),
        (f"{tmp_path}/*.csv", "no such file"),
        (f"{tmp_path}/empty", "no .json"),
        (f"{tmp_path}/a.json:nan", "above 0"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
            parse_sources(name)
        assert str(error.value).startswith("--train_path: ")


def test_hubs(monkeypatch, tmp_path):
    """Through the libraries' loaders; a missing library and a silent hub give one-line errors."""
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "gone":
            raise ConnectionError("no network\nmore")
        return [{"prompt": "q", "response": "a", "history": None}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, _ = read_rows(parse_sources("hf://owner/name#test")[0])
    assert rows == [Row("q", ("a",), "hf://owner/name#test[0]")] and asked == [
        ("owner/name", "test")
    ]
    with pytest.raises(ValueError, match=r"^hf://gone: ConnectionError: no network$"):
        read_rows(parse_sources("hf://gone")[0])
    with pytest.raises(
        ValueError,
        match=r"^ms://x/y needs a library that is not here \(modelscope\): "
        r'pip install "modelscope\[datasets\]"$',
    ):
        read_rows(parse_sources("ms://x/y")[0])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        patch.setitem(sys.modules, "pyarrow", None)
        for name, library in (
            ("hf://owner/name", "datasets"),
            (str(write_rows(tmp_path / "a.parquet", [])), "pyarrow"),
        ):
            with pytest.raises(ValueError, match=rf'^{name} needs .*pip install "?{library}"?$'):
                read_rows(parse_sources(name)[0])
    fake = ModuleType("modelscope.msdatasets")
    fake.MsDataset = type("MsDataset", (), {"load": staticmethod(load)})
    monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", fake)
    assert pairs(read_rows(parse_sources("ms://x/y")[0])[0]) == [("q", "a")] and asked[-1] == (
        "x/y",
        "train",
    )
    content = repr([(row.prompt, row.answers, row.turns) for row in rows])
    assert hash_rows(rows) == hashlib.sha256(content.encode()).hexdigest() != hash_rows([])


def test_hash_of_files(tmp_path):
    """One file's is its own SHA-256, as checkpoints have it; of several, any change is seen."""

    def hash_sources(sources):
        return join_hashes(
            [found for source in sources for found in Preparation(RowReader(), None).hashes(source)]
        )

    for name in "ab":
        (tmp_path / name).write_text(name)
    one, both = parse_sources(str(tmp_path / "a")), parse_sources(f"{tmp_path}/a,{tmp_path}/b")
    before = hash_sources(both)
    assert hash_sources(one) == hashlib.sha256(b"a").hexdigest() != before
    (tmp_path / "b").write_text("c")
    assert hash_sources(both) != before


@given(
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(0, 2**40),
    st.integers(0, 3),
    st.integers(1, 6),
)
def test_drawn_rows(rows, drawn, seed, stream, epochs):
    """Each epoch's rows depend on it alone; over all epochs, rows' counts differ by at most one."""
    parts = [draw_rows(rows, drawn, seed, stream, epoch) for epoch in range(epochs)]
    counts = np.bincount(np.concatenate(parts), minlength=rows)
    assert (
        {len(part) for part in parts} == {drawn}
        and len(counts) == rows
        and counts.max() - counts.min() <= 1
    )
    assert np.array_equal(draw_rows(rows, drawn, seed, stream, epochs - 1), parts[-1])
    if drawn == rows:
        assert all(sorted(part) == list(range(rows)) for part in parts)


def test_draws_differ_by_seed_source_and_epoch():
    assert (
        len(
            {
                tuple(draw_rows(30, 9, seed, stream, epoch))
                for seed in range(3)
                for stream in range(3)
                for epoch in range(3)
            }
        )
        == 27
    )


@given(st.integers(20, 10_000), st.floats(0.01, 0.9))
def test_replay_is_its_share(others, ratio):
    count = replay_count(others, ratio)
    assert abs(count - ratio * (others + count)) <= 0.5


def test_counts_of_an_epoch():
    """Own sources count as they are; replay is a quarter of all, 50 of 200, cut 3 to 1; never 0."""
    assert draw_counts([100, 50, 30, 10], 2, 0.25) == [100, 50, 38, 12]
    assert draw_counts([0.2], 1, 0.1) == [1]


@pytest.fixture
def three_files(tmp_path):
    """20, 10 and 6 rows, all different; places tell them apart."""
    rows = make_rows(36, seed=5)
    return [
        write_rows(tmp_path / f"{name}.jsonl", part)
        for name, part in zip("abr", (rows[:20], rows[20:30], rows[30:]))
    ]


def task_of(words) -> FineTuning:
    task = FineTuning(parse_config(words))
    task.load_rows()
    return task


def test_an_epoch_of_weighted_files_and_replay(flags, tmp_path, three_files, capsys):
    a, b, replay = three_files
    words = flags(
        tmp_path / "out",
        "--train_path",
        f"{a},{b}:0.3",
        "--replay_path",
        replay,
        "--replay_ratio",
        "0.25",
    )
    task = task_of(words)
    assert (
        task.rows_per_epoch(None, 4) == 31 and "20 rows of" in capsys.readouterr().out
    )  # 20 + 3, and 8 of 31 are replay
    read = collections.Counter()
    for epoch in range(10):
        order = task.epochs.order(epoch, 0)
        files = [task.data.place(row).split(":")[0][-7] for row in order]
        assert collections.Counter(files) == {"a": 20, "b": 3, "r": 8}
        assert (
            np.array_equal(order, task_of(words).epochs.make_order(epoch, 0))
            if epoch in (0, 9)
            else True
        )
        assert sorted(task.epochs.order(epoch, 4)) == sorted(order)  # grouped: the same rows
        read.update(order.tolist())
    assert (
        {read[i] for i in range(20)} == {10}
        and {read[i] for i in range(20, 30)} == {3}
        and {read[i] for i in range(30, 36)} <= {13, 14}
    )


def test_training_on_weighted_files(flags, train, tmp_path, three_files):
    a, b, replay = three_files
    words = [
        "--train_path",
        f"{a},{b}:0.3",
        "--replay_path",
        replay,
        "--replay_ratio",
        "0.25",
        "--num_train_epochs",
        1,
    ]
    last = train(flags(tmp_path / "out", *words))
    assert (
        last.name == "epoch-1-step-8" and len(metrics(tmp_path / "out")) == 8
    )  # 31 rows, 4 a step


@pytest.mark.parametrize(
    "words, said",
    [
        (["--eval_path", "{a}:2"], "--eval_path takes no weights"),
        (["--replay_path", "nowhere"], "--replay_path: no such file"),
        (["--train_path", "{a}:x"], "--train_path: no such file"),
        (["--train_path", ","], "--train_path: no file in ','"),
        (["--eval_path", ", "], "--eval_path: no file in ', '"),
        (["--replay_path", ","], "--replay_path: no file in ','"),
        (
            ["--eval_path", str(ROOT / "data" / "formats" / "prompt.jsonl"), "--eval_f1", "True"],
            "prompt.jsonl:2: --eval_metrics asks single questions",
        ),
    ],
)
def test_refusals(flags, tmp_path, three_files, words, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        task_of(flags(tmp_path / "out", *(word.format(a=three_files[0]) for word in words)))


@pytest.mark.parametrize(
    "words",
    [
        ["--replay_ratio", "1"],
        ["--columns", "x"],
        ["--data_format", "yaml"],
        ["--streaming", "--batching", "grouped"],
        ["--preprocessing_num_workers", "0"],
        ["--glm3_labels", "x"],
    ],
)
def test_flags_that_mean_nothing(flags, tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        parse_config(flags(tmp_path / "out", *words))
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_places_of_gzip_lines(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'\n{"text": "a", "answer": "b"}\n{\n'))
    found = list(read_file_items(tmp_path / "a.jsonl.gz"))
    assert [place.rsplit(":", 1)[1] for place, _ in found] == ["2", "3"] and isinstance(
        found[1][1], BadRow
    )


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": ..., "output": "b"},
        {"instruction": "a", "output": "b", "system": ..., "history": ...},
        {"prompt": "a", "response": "b", "history": ...},
        {"messages": ..., "prompt": "a", "response": "b"},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "weight": ...},
            ],
            "system": ...,
            "tools": ...,
        },
        {
            "conversations": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "loss": ...},
            ],
            "tools": ...,
        },
        {
            "messages": [
                {"role": "user", "content": "a", "tool_calls": ...},
                {"role": "assistant", "content": "b"},
            ],
            "tools": ...,
            "system": ...,
        },
    ],
)
def test_t6_a_missing_value_is_an_absent_key(tmp_path, row, missing):
    """In JSON, JSON lines and parquet alike, at the row and at each of its turns."""
    import pyarrow
    import pyarrow.parquet

    def fill(value, missing):
        if isinstance(value, dict):
            return {key: fill(x, missing) for key, x in value.items()}
        return (
            [fill(x, missing) for x in value]
            if isinstance(value, list)
            else missing
            if value is ...
            else value
        )

    (tmp_path / "a.jsonl").write_text(json.dumps(fill(row, missing)) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([fill(row, missing)]))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([fill(row, None)]), tmp_path / "c.parquet"
    )
    found = [read_rows(file)[0] for file in sorted(tmp_path.iterdir())]
    assert [pairs(rows) for rows in found] == [[("a", "b")]] * 3 and not any(
        rows[0].turns for rows in found
    )


def test_t6_the_fault_rows():
    """The rows that pandas and datasets write, as they were sent in."""
    rows, _ = read_rows(shared_file("faults/06-null-in-json-rows/rows.jsonl"))
    assert pairs(rows) == [("翻译", "hello"), ("总结今天下雨", "雨")]
    assert pairs(read_rows(shared_file("faults/06-null-in-json-rows/rows_sharegpt.jsonl"))[0]) == [
        ("你好", "你好！")
    ]
    assert pairs(read_rows(shared_file("faults/13-pretty-printed-json/one.json"))[0]) == [
        ("翻译", "hello")
    ]
    assert pairs(
        read_rows(shared_file("faults/15-bom-outside-first-line/two_files_joined.jsonl"))[0]
    ) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize(
    "text, places",
    [
        (json.dumps(ITEMS[0], indent=2), [":1"]),
        ("\n".join(json.dumps(item, indent=2) for item in ITEMS), [":1", ":5"]),
        (json.dumps({"data": ITEMS}), [":data[0]", ":data[1]"]),
        (json.dumps({"version": 1, "data": ITEMS}, indent=1), [":data[0]", ":data[1]"]),
        ("\ufeff\n" + "\n\ufeff".join(map(json.dumps, ITEMS)), [":2", ":3"]),
        ("\ufeff" + json.dumps(ITEMS, indent=4), ["[0]", "[1]"]),
        ("\ufeff" + "\n\ufeff".join(json.dumps(item, indent=2) for item in ITEMS), [":1", ":5"]),
    ],
)
def test_t6_json_over_several_lines(tmp_path, suffix, text, places):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    rows, _ = read_rows(file)
    assert pairs(rows) == [(item["prompt"], item["response"]) for item in ITEMS][: len(rows)]
    assert [row.place for row in rows] == [f"{file}{place}" for place in places]


@pytest.mark.parametrize(
    "text, said",
    [
        ('{\n "a": 1,\n "b"\n}\n', "a.json:4: not valid JSON"),
        ('{\n "a": 1\n},\n{\n"a": 2\n}', "a.json:3: .*wanted one JSON object a line"),
        ('{"a": 1},\n{"a": 2}', "a.json:1: not valid JSON: Extra data"),
        ("{\n" * 3, "a.json:2: not valid JSON"),
    ],
)
def test_t6_the_line_that_is_wrong_is_named(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadRow, match=said):
        read_rows(tmp_path / "a.json")


@pytest.mark.slow
def test_t9_a_packed_file_takes_no_more_memory_than_its_rows(tmp_path):
    """600 MB of blanks in a line, a list or a table's cell, in a process limited to 500 MB more."""
    words = """if True:
        import resource, sys
        from finetune.rows import sources
        sources.LINE_LIMIT, sources.WHOLE_LIMIT = 2**20, 2**20
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 3 * 10**8
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name in sys.argv[1:]:
            try:
                print(len(sources.read_rows(name)[0]))
            except ValueError as error:
                print(error)
    """
    row = b'{"prompt": "a", "response": "b"}\n'
    contents = [
        ("blank.jsonl", row, b" " * 9999 + b"\n"),
        ("line.jsonl", row, b"0"),
        ("list.json", b"[", b"0"),
        ("cell.csv", b"prompt,response\n", b"0"),
    ]
    for name, head, filler in contents:
        with gzip.open(tmp_path / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write(head)
            for _ in range(60):
                file.write(filler * (10**7 // len(filler)))
    files = [str(tmp_path / f"{name}.gz") for name, *_ in contents]
    done = subprocess.run(
        [sys.executable, "-c", words, *files],
        cwd=ROOT,
        env=child_env(),
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    assert said[0] == "1" and len(said) == 4, done.stderr
    assert "line.jsonl.gz:2: a line of more than 1,048,576 bytes" in said[1]
    assert (
        "list.json.gz: unpacks to more than 1,048,576 bytes" in said[2]
        and "cell.csv.gz:2: a line of more" in said[3]
    )


def test_a_pointer_of_git_lfs_says_what_to_do(tmp_path):
    for name in ("a.jsonl", "b.csv", "c.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
        with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            read_rows(tmp_path / name)


def test_newcomers_question_rows_and_columns(tmp_path):
    """Rows of question and answer are read; of other names the remedy is said, and it works."""
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert pairs(read_rows(tmp_path / "a.jsonl")[0]) == [("a", "b")]
    (tmp_path / "b.jsonl").write_text('{"title": "a", "answer": "b"}\n')
    with pytest.raises(BadRow, match=r"no key .*--columns, such as prompt=title,response=body"):
        read_rows(tmp_path / "b.jsonl", reader=RowReader(columns={}))
    rows, _ = read_rows(
        tmp_path / "b.jsonl", reader=RowReader(columns={"prompt": "title", "response": "answer"})
    )
    assert pairs(rows) == [("a", "b")]
