"""Registers ChatGLM in the python processes that a program under `python -m chatglm` starts.

python imports a module of this name when it starts; `python -m chatglm` puts this folder first in
PYTHONPATH.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent

# A file of this name that python would have found instead runs as well.
_others = [place for place in sys.path if Path(place).resolve() != HERE]
_spec = PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))

import chatglm  # noqa: E402, F401
