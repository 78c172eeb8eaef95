"""scripts/prepare_small_model.py: what it replaces, and what it refuses in one line."""

import pytest

from scripts.prepare_small_model import main

SMALL = ["--hidden_size", "32", "--num_layers", "1", "--heads", "2", "--groups", "1", "--ffn", "48"]


def prepare(tokenizer, output, *more) -> int:
    return main(["--tokenizer", str(tokenizer), "--output_dir", str(output), *SMALL, *more])


def test_an_earlier_model_is_replaced_by_one_writer_at_a_time(
    tiny_folders, tmp_path, holder, capsys
):
    out = tmp_path / "model"
    assert prepare(tiny_folders["glm2"], out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    first = holder(tmp_path / ".model.writing")
    assert prepare(tiny_folders["glm2"], out, "--seed", "1") == 1
    assert f"the folder {out} is in use by another run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    first.kill()
    first.wait()
    assert prepare(tiny_folders["glm2"], out, "--seed", "1") == 0
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "flag, value",
    [("heads", "0"), ("num_layers", "-1"), ("init_std", "-1"), ("init_std", "nan"), ("seed", "x")],
)
def test_sizes_that_are_none(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as left:
        main(["--tokenizer", "t", "--output_dir", str(tmp_path / "m"), f"--{flag}", value])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and f"--{flag}" in said


def test_the_tokenizers_own_folder_is_not_replaced(tiny_folders, tmp_path, capsys):
    folder = tiny_folders["glm2"]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert prepare(folder, folder) == 1
    assert "would replace --tokenizer" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    (tmp_path / "file").touch()
    assert prepare(folder, tmp_path / "file") == 1
    assert "is a file" in capsys.readouterr().err
