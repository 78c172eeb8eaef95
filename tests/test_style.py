"""The readability figures of scripts/style_report.py: counted right, and within the aims."""

import ast
import re
import unicodedata
from pathlib import Path

import pytest

from scripts import style_report
from scripts.style_report import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_nested_comprehensions_are_found():
    plain = ast.parse("[x for x in y if x]", mode="eval").body
    two_conditions = ast.parse("[x for x in y if x if x > 1]", mode="eval").body
    two_loops = ast.parse("{x for x in y for z in x}", mode="eval").body
    found = [style_report.is_nested(node) for node in (plain, two_conditions, two_loops)]
    assert found == [False, True, True]


def test_untyped_arguments_are_those_of_public_functions():
    tree = ast.parse(
        "def f(a, b: int, *, c): ...\n"
        "def _g(a): ...\n"
        "class K:\n"
        "    def __init__(self, d): ...\n"
        "    def _hidden(self, e): ...\n"
    )
    assert [name for _, _, name in style_report.untyped_arguments(tree)] == ["a", "c", "d"]


@pytest.mark.parametrize(
    "graph, circles",
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        (
            {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"d2"}, "d2": {"d"}},
            [["a", "b", "c"], ["d", "d2"]],
        ),
    ],
)
def test_circles(graph, circles):
    assert sorted(style_report.find_circles(graph)) == circles


@pytest.mark.parametrize("package", style_report.PACKAGES)
def test_a_package_is_within_the_aims(package):
    figures = style_report.measure(package)
    assert figures.over_100 == 0
    assert figures.per_1000() < 15
    assert figures.nested == 0
    assert figures.p95_lines < 35
    assert figures.untyped == 0
    assert figures.circles == 0


@pytest.mark.parametrize("package", style_report.PACKAGES)
def test_no_function_is_too_complex(package):
    pytest.importorskip("radon", reason="radon is of the extra dev")
    assert style_report.largest_complexity(package) < 25


def test_a_public_name_is_defined_once():
    names = style_report.repeated_names(("chatglm", "finetune", "predictor", "serving"))
    entry_points = ("main", "build_parser")
    assert {name: places for name, places in names.items() if name not in entry_points} == {}


def width(line: str) -> int:
    """Columns of a line; Chinese characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    return len(line) + wide


def long_prose(path: Path) -> list[int]:
    """Numbers of the lines over 120 columns, without tables, code, headings and HTML.

    A Chinese line may be longer where no sentence ends in it: a line break would show as a space.
    """
    found = []
    in_code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        in_code ^= text.startswith("```")
        is_prose = not (in_code or line.startswith("    ") or text.startswith(("|", "#", "<", "!")))
        can_break = (
            text.isascii() or "zh" not in path.relative_to(ROOT).as_posix() or "。" in text[:-1]
        )
        if is_prose and can_break and width(line) > 120:
            found.append(number)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(path):
    assert long_prose(path) == []


def uneven_rows(path: Path) -> list[int]:
    """Lines of a document's tables that have another number of cells than their head."""
    found, cells, in_code = [], 0, False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        in_code ^= text.startswith("```")
        if in_code or not text.startswith("|"):
            cells = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", text)))
        cells = cells or count
        if count != cells:
            found.append(number)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_are_even(path):
    assert uneven_rows(path) == []


def test_report_in_miniature(tmp_path, capsys):
    pytest.importorskip("radon", reason="radon is of the extra dev")
    assert style_report.main(["predictor", "--json", str(tmp_path / "figures.json")]) == 0
    assert "predictor" in capsys.readouterr().out
    assert (tmp_path / "figures.json").is_file()


def test_an_unknown_package_is_one_line(capsys):
    assert style_report.main(["nowhere"]) == 1
    assert capsys.readouterr().err.startswith("style_report.py: error: nowhere: no package")
