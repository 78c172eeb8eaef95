"""The one reader of JSON files, and the one way in which a command fails."""

import json

import pytest

from chatglm.commands import Parser, run_command
from chatglm.files import LFS_POINTER, read_json

WRONG = {
    "absent": (None, "No such file"),
    "pointer": (LFS_POINTER + b"\noid sha256:0\nsize 9\n", "git lfs pull"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "gbk": ('{"a": "中文"}'.encode("gbk"), "not UTF-8"),
    "cut": (b'{"a": ', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "list": (b"[1, 2]", "wanted an object, got [1, 2]"),
    "deep": (b"[" * 100_000, "JSON"),
    "number": (b"9" * 5_000, "JSON"),
    "folder": (..., "Is a directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_that_names_it(name, tmp_path, capsys):
    content, said = WRONG[name]
    path = tmp_path / "given.json"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert run_command("prog", lambda: read_json(path)) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("prog: error: ")
    assert str(path) in err and said in err and len(err) < 300


def test_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"键": 1}).encode())
    assert read_json(tmp_path / "a.json") == {"键": 1}


def test_a_wrong_flag_is_one_line(capsys):
    parser = Parser(prog="prog")
    parser.add_argument("--rate", type=int)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--rate", "many"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1 and "--rate" in err


def test_interrupted_commands_say_so(capsys):
    def work():
        raise KeyboardInterrupt

    assert run_command("prog", work) == 130
    assert capsys.readouterr().err == "prog: interrupted\n"
