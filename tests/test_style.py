"""The readability figures of scripts/style_report.py: counted right, and within the aims."""

import ast

import pytest

from scripts import style_report


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


def test_report_in_miniature(tmp_path, capsys):
    pytest.importorskip("radon", reason="radon is of the extra dev")
    assert style_report.main(["predictor", "--json", str(tmp_path / "figures.json")]) == 0
    assert "predictor" in capsys.readouterr().out
    assert (tmp_path / "figures.json").is_file()


def test_an_unknown_package_is_one_line(capsys):
    assert style_report.main(["nowhere"]) == 1
    assert capsys.readouterr().err.startswith("style_report.py: error: nowhere: no package")
