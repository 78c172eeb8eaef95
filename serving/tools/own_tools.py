"""Tools of the user's own: a Python file that the user names, whose ToolRegistry objects are taken.

The file is the user's program and runs as such; it is named by a flag, never found in a model's
folder.
"""

import importlib.util
import sys
from pathlib import Path

from serving.tools.registry import ToolRegistry

MODULE = "glm_foundry_own_tools"


def load_tools(path: str) -> ToolRegistry:
    """The tools of every ToolRegistry in a Python file's top level.

    Raises:
        ValueError: it is no Python file, does not run, or has no tools.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"{path}: no Python file (.py) with tools")
    name = f"{MODULE}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    tools = ToolRegistry()
    for value in vars(module).values():
        if isinstance(value, ToolRegistry):
            tools.add(*value)
    if not len(tools):
        raise ValueError(f"{path} has no tools: it needs a ToolRegistry with functions")
    return tools
