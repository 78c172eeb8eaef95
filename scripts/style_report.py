"""How readable the code is, in numbers: one line a package.

    python scripts/style_report.py [--json FILE] [PACKAGE ...]

The columns, and what the project aims at (tests/test_style.py holds the aims):
    lines       lines of Python
    over 100    lines of more than 100 columns: 0
    compr.      comprehensions and generator expressions per 1,000 lines: under 15
    nested      comprehensions with more than one condition or more than one loop: 0
    p95         lines of a function that 95 % of the functions stay under: under 35
    complexity  the largest cyclomatic complexity of a function (McCabe 1976, by radon): under 25
    untyped     arguments of public functions without an annotation: 0
    circles     groups of modules that import one another in a circle: 0
"""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ("chatglm", "finetune", "predictor", "serving", "scripts", "benchmarks")
COLUMNS = 100
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Figures:
    """The figures of one package; `functions` are lengths in lines, `comprehensions` a count."""

    lines: int = 0
    over_100: int = 0
    comprehensions: int = 0
    nested: int = 0
    p95_lines: int = 0
    complexity: int = 0
    untyped: int = 0
    circles: int = 0

    def per_1000(self) -> float:
        return 1000 * self.comprehensions / max(1, self.lines)


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_nested(node: Comprehension) -> bool:
    """More than one condition, or two loops and more."""
    loops = node.generators
    return len(loops) > 1 or sum(len(loop.ifs) for loop in loops) > 1


def is_public_method(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions of a module and methods of its classes whose names, and whose classes' names, are
    public.
    """
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, FUNCTIONS) and is_public_method(member.name):
                    yield member


def repeated_names(packages: tuple[str, ...]) -> dict[str, list[str]]:
    """{name: modules} of the public functions and classes that more than one module defines."""
    modules: dict[str, list[str]] = {}
    for package in packages:
        for path in source_files(package):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                    modules.setdefault(node.name, []).append(module_name(path))
    return {name: places for name, places in modules.items() if len(places) > 1}


def untyped_arguments(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, function, argument) of each argument of a public function that has no annotation."""
    for function in public_functions(tree):
        given = function.args
        for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
            if argument.annotation is None and argument.arg not in ("self", "cls"):
                yield function.lineno, function.name, argument.arg


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports anywhere, inside functions too."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return (found & modules.keys()) - {name}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            start = stack.index(module)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1:
                circles.append(sorted(component))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return circles


def import_circles(packages: tuple[str, ...] = PACKAGES) -> list[list[str]]:
    """The circles of imports among the modules of `packages`."""
    modules: dict[str, Path] = {}
    for package in packages:
        modules |= {module_name(path): path for path in source_files(package)}
    return find_circles({name: imported_modules(path, modules) for name, path in modules.items()})


def measure(package: str) -> Figures:
    """The figures of a package, but for `complexity`, which needs radon."""
    figures = Figures()
    lengths: list[int] = []
    for path in source_files(package):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        tree = ast.parse(text)
        figures.lines += len(lines)
        figures.over_100 += sum(len(line) > COLUMNS for line in lines)
        figures.untyped += len(list(untyped_arguments(tree)))
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS):
                figures.comprehensions += 1
                figures.nested += is_nested(node)
            elif isinstance(node, FUNCTIONS):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
    lengths.sort()
    figures.p95_lines = lengths[int(0.95 * len(lengths))] if lengths else 0
    figures.circles = len(import_circles((package,)))
    return figures


def largest_complexity(package: str) -> int:
    """Raises ImportError where radon is not installed."""
    from radon.complexity import cc_visit

    found = [0]
    for path in source_files(package):
        found += [block.complexity for block in cc_visit(path.read_text(encoding="utf-8"))]
    return max(found)


def print_figures(rows: dict[str, Figures]) -> None:
    heads = (
        "package",
        "lines",
        "over 100",
        "compr.",
        "nested",
        "p95",
        "complexity",
        "untyped",
        "circles",
    )
    print("".join(head.ljust(12) if not i else head.rjust(11) for i, head in enumerate(heads)))
    for name, row in rows.items():
        cells = (
            row.lines,
            row.over_100,
            f"{row.per_1000():.1f}",
            row.nested,
            row.p95_lines,
            row.complexity,
            row.untyped,
            row.circles,
        )
        print(name.ljust(12) + "".join(str(cell).rjust(11) for cell in cells))


def report(packages: list[str], output: str | None) -> int:
    for name in packages:
        if not source_files(name):
            raise ValueError(f"{name}: no package of this project with Python files")
    rows = {name: measure(name) for name in packages}
    try:
        for name, row in rows.items():
            row.complexity = largest_complexity(name)
    except ImportError:
        raise ImportError('radon is not installed: pip install -e ".[dev]"') from None
    print_figures(rows)
    if output:
        Path(output).write_text(
            json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2) + "\n"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    from chatglm.commands import Parser, run_command

    parser = Parser(prog="style_report.py", description=__doc__.split("\n")[0])
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), metavar="PACKAGE")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: report(args.packages, args.json))


if __name__ == "__main__":
    sys.exit(main())
