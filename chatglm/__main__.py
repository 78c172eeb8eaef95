"""Other programs with ChatGLM registered: python -m chatglm PROGRAM ARGUMENTS...

PROGRAM is an installed command (lm_eval, accelerate, trl, torchrun), a module or a python file,
which need not know this project: transformers' Auto classes load ChatGLM in it and in every python
process that it starts. Code that comes with a model is never run.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

from .commands import child_environment, fail

CHILDREN = Path(__file__).resolve().parent / "children"  # sitecustomize.py of child processes


def has_module(name: str) -> bool:
    """Whether a module of this name is installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a part of the name is no package
        return False


def find_program(name: str) -> Callable[[], object]:
    """What runs a command, a module or a file, as python itself would.

    Raises:
        ValueError: there is no such program.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"no file {name}")
        sys.path.insert(0, str(Path(name).resolve().parent))
        return partial(runpy.run_path, name, run_name="__main__")
    for command in entry_points(group="console_scripts", name=name):
        return command.load()
    if has_module(name):
        return partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    raise ValueError(f"no command, module or file {name!r} is installed here")


def main() -> int:
    """Run the program of the command line; its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    environment = child_environment()
    paths = [str(CHILDREN), environment["PYTHONPATH"]]
    os.environ.update(environment | {"PYTHONPATH": os.pathsep.join(paths)})
    try:
        program = find_program(words[0])
    except ValueError as error:
        return fail("chatglm", f"error: {error}", 2)
    sys.argv = words
    code = program()
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
