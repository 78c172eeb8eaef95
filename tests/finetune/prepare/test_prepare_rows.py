"""python -m finetune.prepare rows, corpus, fetch."""

import gzip
import json
import random
import threading
from datetime import date
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finetune.preference.formats import PREFERENCE_FORMATS
from finetune.prepare import fetch as fetching
from finetune.prepare.command import main
from finetune.prepare.corpora import CORPORA, row_rng
from finetune.rows.sources import read_rows
from tests.conftest import SHARED, shared_file


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text("utf-8").splitlines()))


# ---- rows


@pytest.fixture
def belle(tmp_path) -> str:
    """Belle's two files: Python literals with a trailing space, and JSON lines."""
    half = tmp_path / "Belle.train.json"
    half.write_text("{'input': '水泵漏油怎么办？ ', 'target': '先检查油封。'}\n", "utf-8")
    million = write(
        tmp_path / "belle_1M.json",
        {"instruction": "水泵漏油怎么办？", "input": "", "output": "先检查油封。"},
        {"instruction": "油封多久换一次", "input": "？", "output": "六万公里。"},
    )
    return f"{half},{million}"


def test_belle_is_merged_without_duplicates(belle, tmp_path, capsys):
    """Once, however often it runs; train.py reads the same rows."""
    out = tmp_path / "out" / "belle.jsonl"
    wanted = [
        {"input": "水泵漏油怎么办？", "target": "先检查油封。"},
        {"input": "油封多久换一次？", "target": "六万公里。"},
    ]
    for _ in range(2):
        assert main(["rows", "--input", belle, "--to", "belle", "--output", str(out)]) == 0
        assert read(out) == wanted
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "3 rows read, 1 duplicates left out, 2 written"
    assert main(["rows", "--input", belle, "--duplicates", "keep", "--output", str(out)]) == 0
    kept = [row.content() for row in read_rows(out)[0]]
    assert kept == [row.content() for part in belle.split(",") for row in read_rows(part)[0]]


def test_alpaca_becomes_lines_of_context(tmp_path):
    rows = [
        {"instruction": "翻译", "input": "水", "output": "water"},
        {"instruction": "Name a tree.", "input": "", "output": "Oak"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    out = tmp_path / "alpaca.jsonl"
    words = ["--input", str(tmp_path / "alpaca.json"), "--output", str(out)]
    assert main(["rows", *words, "--to", "context"]) == 0
    assert read(out) == [
        {"context": "Instruction: 翻译\nInput: 水\nAnswer: ", "target": "water"},
        {"context": "Instruction: Name a tree.\nAnswer: ", "target": "Oak"},
    ]
    assert main(["rows", *words, "--to", "instruction"]) == 0
    assert read(out)[0] == {"instruction": "翻译水", "output": "water"}
    assert main(["rows", *words, "--to", "openai"]) == 0
    assert read(out)[1]["messages"][0] == {"role": "user", "content": "Name a tree."}


def test_conversations_become_messages(tmp_path):
    row = {
        "instruction": "q2",
        "output": "a2",
        "system": "s",
        "history": [],
    }
    file, out = write(tmp_path / "a.jsonl", row), tmp_path / "o.jsonl"
    assert main(["rows", "--input", str(file), "--to", "openai", "--output", str(out)]) == 0
    roles = [message["role"] for message in read(out)[0]["messages"]]
    assert roles == ["system", "user", "assistant"]


def test_near_duplicates_and_a_held_out_part(tmp_path, capsys):
    """Of near rows the first stays; a prompt is on one side; nothing is on both."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdefgh ", k=80)) for _ in range(100)]
    rows = [{"prompt": text, "response": str(i)} for i, text in enumerate(texts)]
    near = [{"prompt": text + ".", "response": str(i)} for i, text in enumerate(texts[:10])]
    near += [{"prompt": texts[20][:-3] + "zzz", "response": "20"}]
    file = write(tmp_path / "rows.jsonl", *rows, *near)
    out, held = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    words = ["rows", "--input", str(file), "--output", str(out)]
    assert main([*words, "--duplicates", "near"]) == 0
    assert read(out) == rows
    assert "11 duplicates left out" in capsys.readouterr().out
    assert main(words) == 0 and len(read(out)) == 101  # exact: of normalised text
    assert main([*words, "--held_out", str(held), "--held_out_share", "0.3"]) == 0
    sides = [{row["prompt"] for row in read(path)} for path in (out, held)]
    assert not sides[0] & sides[1] and 15 < len(sides[1]) < 50
    first = held.read_bytes()
    assert main([*words, "--held_out", str(held), "--held_out_share", "0.3"]) == 0
    assert held.read_bytes() == first


def test_compared_by_prompt(tmp_path):
    rows = [{"prompt": "水泵漏油怎么办", "response": answer} for answer in ("检查", "更换")]
    file, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "o.jsonl"
    words = ["rows", "--input", str(file), "--output", str(out)]
    assert main(words) == 0 and read(out) == rows
    assert main([*words, "--compare", "prompt"]) == 0 and read(out) == rows[:1]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--input a.jsonl --output o.jsonl", "a.jsonl:2: "),
        ("--input a.jsonl --output o.txt --on_bad_row skip", "ends in .jsonl"),
        ("--input a.jsonl --output a.jsonl", "a.jsonl is read"),
        ("--input none.jsonl --output o.jsonl", "--input: no such file: none.jsonl"),
        ("--input a.jsonl --output o.jsonl --threshold 0.5", "--threshold needs --duplicates near"),
        ("--input a.jsonl --output o.jsonl --held_out_share 0.5", "needs --held_out"),
        ("--input a.jsonl --output o.jsonl --held_out o.jsonl", "name the same file"),
        (
            "--input h.jsonl --to belle --output o.jsonl",
            "h.jsonl:1: --to belle writes one question",
        ),
        ("--input b.jsonl --to context --output o.jsonl", "b.jsonl:1: --to context wants"),
    ],
)
def test_what_does_not_fit_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "问", "response": "答"}
    write(Path("a.jsonl"), good, {"prompt": "问"})
    write(Path("b.jsonl"), good)
    write(Path("h.jsonl"), good | {"history": [["q", "a"]]})
    assert main(["rows", *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("finetune.prepare: error: ") and error.count("\n") == 1
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "h.jsonl"]


def test_columns_that_json_does_not_have(tmp_path, capsys):
    """A Parquet file's times are text, its NaN is absent; a row with bytes is bad."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    row = {"prompt": "问", "response": "答", "day": date(2026, 11, 3), "price": Decimal("1.5")}
    rows = [row | {"x": float("nan")}, row | {"prompt": "q", "image": b"x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "b.parquet")
    out = tmp_path / "new" / "o.jsonl"
    words = ["rows", "--input", str(tmp_path / "*.parquet"), "--output", str(out)]
    assert main(words) == 1 and not out.parent.exists()
    assert "b.parquet[0]: the row cannot be written as JSON" in capsys.readouterr().err
    assert main([*words, "--on_bad_row", "skip"]) == 0
    assert read(out) == [row | {"day": "2026-11-03", "price": "1.5"}]


def test_a_row_that_the_layout_does_not_hold_is_a_bad_one(tmp_path, capsys):
    good = {"prompt": "问", "response": "答"}
    file = write(tmp_path / "a.jsonl", good, good | {"history": [["q", "a"]]})
    out = tmp_path / "o.jsonl"
    words = ["rows", "--input", str(file), "--output", str(out), "--to", "belle"]
    assert main([*words, "--on_bad_row", "skip"]) == 0 and len(read(out)) == 1
    assert "2 rows read, 1 bad ones skipped, 1 written" in capsys.readouterr().out


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"prompt": "问", "response": "答"})
    (tmp_path / "o.jsonl").mkdir()
    assert main(["rows", "--input", str(file), "--output", str(tmp_path / "o.jsonl")]) == 1
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'o.jsonl'}: Is a directory\n")


# ---- corpora


@pytest.mark.parametrize("likes", ["NaN", "1e999", "1" + "0" * 400, '"nan"'])
def test_numbers_that_are_none(likes, tmp_path, capsys):
    file = tmp_path / "w.jsonl"
    file.write_text(f'{{"article": "a", "abstract": "b", "comments": [["x", {likes}]]}}\n')
    words = ["--input", str(file), "--output", str(tmp_path / "o.jsonl")]
    assert main(["corpus", "weibo", *words]) == 1
    assert 'w.jsonl:1: "likes" must be a number, got ' in capsys.readouterr().err


def corpus(name: str, path: Path, out: Path, *more: str) -> list[dict]:
    assert main(["corpus", name, "--input", str(path), "--output", str(out), *more]) == 0
    return read(out)


def scores(row: dict) -> list:
    return [answer["score"] for answer in row["answers"]]


def test_weibo(tmp_path):
    row = {
        "article": "长 文",
        "abstract": "摘 要",
        "comments": [["好", 2], {"text": "很好啊", "likes": 5}, ["真好", 2], ["", 9]],
    }
    made = corpus("weibo", write(tmp_path / "w.json", row), tmp_path / "o.jsonl")
    assert made == [
        {
            "prompt": "新闻内容：长文摘要：摘要",
            "answers": [
                {"answer": "很好啊", "score": 5},
                {"answer": "真好", "score": 2},
                {"answer": "好", "score": 2},
            ],
            "prefix": "评论：",
        }
    ]


def test_couplets(tmp_path):
    halves = [("晚 风", "早 雨"), ("青 山", "绿 水"), ("一 心", "万 里"), ("春 风 花", "秋 雨 叶")]
    halves.append(("大 江 东 去", "小 河 西 来"))
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "in.txt").write_text("\n".join(a for a, _ in halves), "utf-8")
    (folder / "out.txt").write_text("\n".join(b for _, b in halves), "utf-8")
    made = corpus("couplets", folder, tmp_path / "o.jsonl")
    assert made[0]["prompt"] == "上联：晚风" and made[0]["prefix"] == "下联："
    first = {answer["answer"]: answer["score"] for answer in made[0]["answers"]}
    assert first == {"早雨": 1, "绿水": 0, "万里": 0, "秋雨叶": -1, "小河西来": -1}
    assert scores(made[4]) == [1, -1, -1]  # no other half has its length
    assert corpus("couplets", folder, tmp_path / "o.jsonl") == made
    (folder / "out.txt").write_text("早 雨\n", "utf-8")
    words = ["corpus", "couplets", "--input", str(folder), "--output", str(tmp_path / "x.jsonl")]
    assert main(words) == 1 and not (tmp_path / "x.jsonl").exists()


def test_zhidao_and_baike(tmp_path):
    table = (
        "title,question,reply,is_best\n车险,怎么买,网上买,1\n车险,怎么买,不知道,0\n寿险,,问人,1\n"
    )
    (tmp_path / "z.csv").write_text(table, "utf-8")
    made = corpus("zhidao", tmp_path / "z.csv", tmp_path / "o.jsonl")
    assert [row["prompt"] for row in made] == ["问题：车险 内容：怎么买", "问题：寿险"]
    assert made[0]["answers"][1] == {"answer": "不知道", "score": 0} and made[0]["prefix"] == "答："
    row = {"qid": "1", "category": "车", "title": "短", "desc": "更长的问题", "answer": "答案"}
    made = corpus("baike", write(tmp_path / "b.json", row), tmp_path / "o.jsonl")
    answers = [{"answer": "答案", "score": 1}]
    assert made == [{"prompt": "更长的问题", "answers": answers, "prefix": "答："}]


def test_classical(tmp_path):
    for book, count in (("论语", 4), ("史记", 3)):
        folder = tmp_path / "books" / book / "一"
        folder.mkdir(parents=True)
        for file, mark in (("source.txt", "古"), ("target.txt", "今")):
            lines = [f"{book}{mark}{number}" for number in range(count)]
            (folder / file).write_text("\n".join(lines), "utf-8")
    made = corpus("classical", tmp_path / "books", tmp_path / "o.jsonl")
    assert len(made) == 7 and all(scores(row) == [1, 0, 0, -1, -1] for row in made)
    asked = {row["prompt"].partition("：")[0] for row in made}
    assert asked == {"古文", "现代文"}  # both directions
    for row in made:
        wanted = "今" if row["prompt"].startswith("古文") else "古"
        book = row["prompt"].partition("：")[2][:2]
        texts = [answer["answer"] for answer in row["answers"]]
        assert row["prefix"] == ("现代文：" if wanted == "今" else "古文：")
        assert texts[0][:2] == book and texts[0][-1] == row["prompt"][-1]
        assert all(wanted in text for text in texts)
        assert [text[:2] == book for text in texts] == [True, True, True, False, False]


def test_poetry(tmp_path):
    poems = []
    for author, genre in (
        ("李白", "诗"),
        ("李白", "诗"),
        ("杜甫", "诗"),
        ("苏轼", "词"),
        ("贾谊", "赋"),
    ):
        title = f"{author}{len(poems)}"
        poems.append(
            {"author": author, "title": title, "genre": genre, "paragraphs": [title, "行"]}
        )
    made = corpus("poetry", write(tmp_path / "p.json", *poems), tmp_path / "o.jsonl")
    assert made[0]["prompt"] == "以李白的风格，写一首诗，题为李白0" and made[0]["prefix"] == ""
    assert "写一篇赋" in made[4]["prompt"]
    graded = {answer["score"]: answer["answer"] for answer in made[0]["answers"]}
    assert (graded[1], graded[0], graded[-1]) == ("李白0\n行", "李白1\n行", "杜甫2\n行")
    assert graded[-2] in ("苏轼3\n行", "贾谊4\n行")


def test_a_bad_row_names_its_line(tmp_path, capsys):
    good = {"title": "问", "answer": "答"}
    file = write(tmp_path / "b.json", good, {"answer": "无题"})
    words = ["corpus", "baike", "--input", str(file), "--output", str(tmp_path / "o.jsonl")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert f'{file}:2: wanted text at "title"' in error and error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_graded_answers_are_read_as_pairs(tmp_path):
    """What a corpus becomes is what --task reward and dpo read."""
    rows = [{"first": f"上{i}", "second": f"下{i}"} for i in range(6)]
    made = corpus("couplets", write(tmp_path / "c.jsonl", *rows), tmp_path / "o.jsonl")
    _, answers, given = PREFERENCE_FORMATS["scored_answers"].read(made[0])
    assert given == [1, 0, 0] and answers[0] == "下0"
    assert read_rows(tmp_path / "o.jsonl")[0][0].prompt == "上联：上0下联："
    assert row_rng(1, 2).random() == row_rng(1, 2).random() != row_rng(1, 3).random()
    assert set(CORPORA) == {"weibo", "couplets", "zhidao", "classical", "poetry", "baike"}


# ---- public files


def test_fetch(tmp_path, capsys):
    """From a mirror, checked, not twice; a page in the place of rows is refused."""
    files = fetching.SETS["chatglm_finetuning"]
    mirror = tmp_path / "mirror"
    for file in files.files:
        write(mirror / files.repository / "HEAD" / file.path, {"instruction": "a", "output": "b"})
    words = ["fetch", "chatglm_finetuning", "--output", str(tmp_path / "here")]
    assert main([*words, "--base_url", mirror.as_uri()]) == 0
    assert capsys.readouterr().out.count("another than the file of docs/results.md") == 4
    assert read(tmp_path / "here" / "data" / "spo_0.json") == [{"instruction": "a", "output": "b"}]
    assert main([*words, "--base_url", "file:///nowhere"]) == 0  # they are there
    assert capsys.readouterr().out.count("is there") == 4
    (mirror / files.repository / "HEAD" / "data" / "spo_0.json").write_text("<html>")
    assert main([*words[:3], str(tmp_path / "x"), "--base_url", mirror.as_uri()]) == 1
    assert "spo_0.json: what was downloaded is no rows" in capsys.readouterr().err
    assert main([*words[:3], str(tmp_path / "x"), "--base_url", "file:///nowhere"]) == 1
    error = capsys.readouterr().err
    assert "--base_url" in error and error.count("\n") == 1
    assert not list((tmp_path / "x").rglob("*.json"))


class BrokenOff(BaseHTTPRequestHandler):
    """Says that 99 bytes come, and closes the connection after a whole row."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "99")
        self.end_headers()
        self.wfile.write(b'{"instruction": "a", "output": "b"}\n')

    def log_message(self, *words: object) -> None:
        pass


def test_a_download_that_breaks_off(tmp_path, capsys, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), BrokenOff)
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    words = ["fetch", "uellm", "--output", str(tmp_path / "x"), "--base_url"]
    assert main([*words, url]) == 1
    assert "the connection ended after 36 of 99 bytes" in capsys.readouterr().err
    server.server_close()
    assert main([*words, "http://a b"]) == 1
    assert "http://a b/HYIUYOU/" in capsys.readouterr().err
    (tmp_path / "long").write_bytes(b"x" * 200_000)
    monkeypatch.setattr(fetching, "SIZE_LIMIT", 100_000)
    with pytest.raises(OSError, match="more than 100,000 bytes"):
        fetching.download_bytes((tmp_path / "long").as_uri())
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="public data in ../shared")
def test_known_files_are_those_of_the_results():
    folders = {"chatglm_finetuning": "finetune", "uellm": "uellm"}
    for name, files in fetching.SETS.items():
        for file in files.files:
            content = shared_file(f"data/{folders[name]}/{file.name}").read_bytes()
            said = fetching.describe_content(content, file)
            assert said == f"{file.rows} rows, the file of docs/results.md"
            assert len(content) == file.size


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="public data in ../shared")
def test_real_rows(tmp_path, capsys):
    """The first Chinese rows of several sources are merged, near-duplicates left out."""
    file = shared_file("data/length/instructions.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(400)]
    keys = ("instruction", "input", "output")
    write(tmp_path / "a.jsonl", *({key: row[key] for key in keys} for row in rows))
    out = tmp_path / "o.jsonl"
    words = ["rows", "--input", str(tmp_path / "a.jsonl"), "--output", str(out)]
    assert main([*words, "--duplicates", "near"]) == 0
    assert 300 < len(read(out)) <= 400
