"""The notebooks: committed without outputs, alike in both languages, and they run."""

import os
from pathlib import Path

import nbformat
import pytest

from tests.conftest import REPO_ROOT
from tests.finetune.runs import child_env
from tests.warm import warm_python

NOTEBOOKS = sorted((REPO_ROOT / "notebooks").glob("*.ipynb"))
LINKED = ("chatglm", "data", "ds_configs", "finetune", "predictor", "scripts", "serving")


def read(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_are_clean(path):
    notebook = read(path)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert cell.id.replace("-", "").isalpha(), cell.id  # given by hand: they stay
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}  # no version of somebody's Python


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem.endswith("_zh")], ids=str)
def test_the_chinese_notebook_has_the_same_code(path):
    chinese, english = read(path), read(path.with_name(path.name.replace("_zh", "")))
    assert len(chinese.cells) == len(english.cells)
    for ours, theirs in zip(chinese.cells, english.cells):
        assert (ours.cell_type, ours.id) == (theirs.cell_type, theirs.id)
        if ours.cell_type == "code":
            assert ours.source == theirs.source
        else:
            assert ours.source != theirs.source


def printed(cell) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{id: cell} of first_steps.ipynb after a run, in a folder with links to the project's."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    root = tmp_path_factory.mktemp("project")
    for name in (*LINKED, "train.py"):
        (root / name).symlink_to(REPO_ROOT / name)
    (root / "notebooks").mkdir()
    env = child_env(IPYTHONDIR=str(root / "ipython"))
    env["PATH"] = f"{Path(warm_python()).parent}{os.pathsep}{env['PATH']}"
    notebook = read(REPO_ROOT / "notebooks" / "first_steps.ipynb")
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(root / "notebooks")}},
    )
    client.execute(env=env)
    return {cell.id: cell for cell in notebook.cells}


@pytest.mark.slow
def test_it_runs_without_an_error(executed):
    for cell in executed.values():
        if cell.cell_type == "code":
            assert all(out.output_type != "error" for out in cell.outputs)
            assert "Traceback" not in printed(cell) and "error: " not in printed(cell), cell.id


@pytest.mark.slow
def test_the_adapter_answers_its_rows(executed):
    learnt = (
        "It cools the engine. Water flows through it.",
        "它托住车身。气压要合适。磨平了会打滑。",
    )
    for text in learnt:
        assert text not in printed(executed["chat-before"])
        assert text in printed(executed["chat-after"])


@pytest.mark.slow
def test_lengths_are_predicted(executed):
    assert "72 lengths to learn from, 24 held out" in printed(executed["lengths"])
    within = printed(executed["predict"]).strip().splitlines()[-1]
    assert within.endswith("of 24 answers within their 90 % quantile")
    assert int(within.split()[0]) >= 18


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "picture"])
def test_pictures_are_drawn(executed, name):
    kinds = [kind for out in executed[name].outputs for kind in out.get("data", {})]
    assert "image/png" in kinds
