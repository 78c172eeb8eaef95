"""Sample data: committed files equal the generator's, splits are disjoint, tokenizer decodes."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
FILES = ("spo_train.json", "spo_test.json", "copy_pretrain.json")
RELATIONS = {"部件故障", "性能故障", "组成", "检测工具"}


def run_script(name, *args):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)


def read_rows(name):
    text = (DATA / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def triples(row):
    return [tuple(line.split("_")) for line in row["output"].split("\n")]


def pairs(rows):
    return {(subject, obj) for row in rows for subject, _, obj in triples(row)}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    result = run_script(
        "prepare_tokenizer.py", "--input", *(DATA / name for name in FILES), "--output_dir", folder
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def pieces(tokenizer_dir):
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


def test_generator_writes_the_committed_bytes(tmp_path):
    result = run_script("prepare_sample_data.py", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    there = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*") if p.is_file()}
    assert written == sorted(there - {"probe.jsonl"})  # which was written by hand
    for name in written:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_another_seed_gives_other_rows(tmp_path):
    result = run_script(
        "prepare_sample_data.py", "--output_dir", tmp_path, "--seed", 1, "--copy_rows", 10
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "spo_train.json").read_bytes() != (DATA / "spo_train.json").read_bytes()


@pytest.mark.parametrize(
    "flag,value", [("--train_rows", 0), ("--held_out_share", 1), ("--held_out_test_rows", 101)]
)
def test_generator_refuses_sizes_it_cannot_make(tmp_path, flag, value):
    result = run_script("prepare_sample_data.py", "--output_dir", tmp_path / "out", flag, value)
    assert result.returncode == 2
    assert flag in result.stderr
    assert not (tmp_path / "out").exists()


def test_readme_states_the_hash_and_row_count_of_each_file():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name in (
        *FILES,
        "probe.jsonl",
        *(f"formats/{p.name}" for p in (DATA / "formats").iterdir()),
    ):
        content = (DATA / name).read_bytes()
        line = next(line for line in readme.splitlines() if line.startswith(f"| {name} "))
        assert hashlib.sha256(content).hexdigest() in line
        assert int(line.split("|")[2]) == content.count(b"\n")


def test_data_stays_small():
    assert sum((DATA / name).stat().st_size for name in FILES) < 2_500_000


@pytest.mark.parametrize("name", FILES)
def test_every_row_has_the_three_text_fields(name):
    for row in read_rows(name):
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value for value in row.values())


def test_the_probe_asks_for_nothing_that_is_trained():
    rows, trained = (
        read_rows("probe.jsonl"),
        {row["instruction"] for name in FILES for row in read_rows(name)},
    )
    assert all(
        list(row) == ["instruction", "input", "output"] and row["instruction"] and row["output"]
        for row in rows
    )
    assert len({row["instruction"] + row["input"] for row in rows}) == len(rows) and not trained & {
        row["instruction"] for row in rows
    }


@pytest.mark.parametrize("name", ["spo_train.json", "spo_test.json"])
def test_every_output_line_is_a_triple_found_in_the_input(name):
    for row in read_rows(name):
        found = triples(row)
        assert len(set(found)) == len(found)
        for triple in found:
            assert len(triple) == 3, row
            subject, relation, obj = triple
            assert relation in RELATIONS
            assert subject in row["input"] and obj in row["input"], row


def test_every_relation_is_in_both_splits_and_some_rows_hold_two_triples():
    for name in ("spo_train.json", "spo_test.json"):
        rows = read_rows(name)
        assert {relation for row in rows for _, relation, _ in triples(row)} == RELATIONS
        assert any(len(triples(row)) > 1 for row in rows)


def test_no_input_is_in_two_files_or_twice_in_an_extraction_file():
    test, train, copies = (
        {row["input"] for row in read_rows(name)}
        for name in ("spo_test.json", "spo_train.json", "copy_pretrain.json")
    )
    assert len(test) == len(read_rows("spo_test.json"))
    assert len(train) == len(read_rows("spo_train.json"))
    assert not test & train
    assert not test & copies


def test_at_least_half_of_the_test_pairs_are_never_together_in_training():
    test = pairs(read_rows("spo_test.json"))
    unseen = test - pairs(read_rows("spo_train.json"))
    assert len(unseen) / len(test) >= 0.5


def test_held_out_test_rows_state_only_pairs_that_no_training_sentence_states():
    seen = pairs(read_rows("spo_train.json"))
    assert not seen & pairs(read_rows("spo_test.json")[:60])


def test_copying_never_asks_for_triples():
    extract = {row["instruction"] for row in read_rows("spo_train.json")}
    assert extract == {row["instruction"] for row in read_rows("spo_test.json")}
    for row in read_rows("copy_pretrain.json"):
        assert row["instruction"] not in extract
        words = re.split(r"[_\n]", row["output"])
        assert all(word in row["input"] for word in words), row  # copied, nothing inferred


def test_tokenizer_follows_the_conventions(tokenizer_dir, pieces):
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.vocab_size() == 760
    assert pieces.is_byte(3)
    for control in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"):
        assert pieces.piece_to_id(control) == pieces.unk_id()
    assert json.loads((tokenizer_dir / "tokenizer_config.json").read_text(encoding="utf-8")) == {
        "tokenizer_class": "ChatGLMTokenizer",
        "glm_family": "glm2",
        "remove_space": False,
        "do_lower_case": False,
    }


def test_tokenizer_round_trips_the_data_and_strange_text(pieces):
    texts = [value for name in FILES for row in read_rows(name)[:200] for value in row.values()]
    strange = [
        "[Round 1]\n\n问：水温过高\n\n答：",
        "two  spaces ",
        " lead",
        "ﬁ ① Ａ",
        "😀\t\r\n",
        "2024年3.5万",
    ]
    for text in texts + strange:
        assert pieces.decode(pieces.encode(text)) == text
    digits = pieces.encode("2024", out_type=str)
    assert digits == ["▁", "2", "0", "2", "4"]
    assert "<0x0A>" in pieces.encode("水温\n油压", out_type=str)


def test_a_word_is_the_same_pieces_in_the_answer_as_in_the_text(pieces):
    """Copying needs it: an answer's first word must not merge with the space before the text."""
    bad = total = 0
    for row in read_rows("spo_test.json"):
        text = " ".join(map(str, pieces.encode(row["input"])[1:])) + " "
        for subject, _, obj in triples(row):
            for word in (subject, obj):
                total += 1
                bad += " ".join(map(str, pieces.encode(word)[1:])) + " " not in text
    assert bad <= 0.02 * total


def test_tokenizer_is_deterministic(tokenizer_dir, tmp_path):
    result = run_script(
        "prepare_tokenizer.py",
        "--input",
        *(DATA / name for name in FILES),
        "--output_dir",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tokenizer_dir / path.name).read_bytes(), path.name


def test_tokenizer_says_in_one_line_what_is_wrong(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"input": "水温"}\n{"input": \n', encoding="utf-8")
    for source, wanted in [(tmp_path / "none.json", "none.json"), (broken, "line 2")]:
        result = run_script(
            "prepare_tokenizer.py", "--input", source, "--output_dir", tmp_path / "out"
        )
        assert result.returncode == 1
        assert wanted in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
