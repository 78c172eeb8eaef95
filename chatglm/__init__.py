"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B on today's transformers, without remote code.

`load_model` and `load_tokenizer` read every published folder; after `import chatglm`,
transformers' Auto classes do too.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .families import FAMILIES

__all__ = ["FAMILIES", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    # Lazy: `train.py --help` wants the names of the families, not seconds of torch.
    if name in ("load_model", "load_tokenizer"):
        from . import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Our modules register with transformers' Auto classes when they are imported. The hook below
# imports them right after transformers' own auto modules, whoever imports those: importing them
# with this package would cost every command seconds, on first use would be too late. peft's table
# of what its methods train and models of lm-evaluation-harness and vLLM are completed the same way.
WITH_AUTO_MODULE = {
    "transformers.models.auto.configuration_auto": ("chatglm.configuration",),
    "transformers.models.auto.tokenization_auto": ("chatglm.tokenization",),
    "transformers.models.auto.modeling_auto": (
        "chatglm.modeling_glm",
        "chatglm.modeling_glm2",
        "chatglm.modeling_glm_base",
        "chatglm.modeling_pangu",
    ),
    "peft.utils.constants": ("chatglm.peft_defaults",),
    "lm_eval.models.huggingface": ("chatglm.lm_eval_model",),
    "vllm.transformers_utils.config": ("chatglm.vllm_plugin.config",),
    "vllm.model_executor.models.registry": ("chatglm.vllm_plugin.registry",),
}
# Our models need this module, and it imports modeling_auto: while it is being imported, ours wait
# for its end.
LAYERS = "transformers.modeling_layers"


def register() -> None:
    """Nothing more than importing this package: the entry point of vLLM's plugins."""


def is_importing(name: str) -> bool:
    """Whether a module is being imported right now."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def import_registrations(name: str) -> None:
    """Import our modules that belong to transformers' module `name`, which has just run."""
    auto = "transformers.models.auto.modeling_auto"
    if name == LAYERS:
        if auto not in sys.modules:
            return
        name = auto
    elif name == auto and is_importing(LAYERS):
        return
    for ours in WITH_AUTO_MODULE[name]:
        importlib.import_module(ours)


class AutoClassHook(importlib.abc.MetaPathFinder):
    """Imports our modules after an auto module or LAYERS, which the other finders find, has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WITH_AUTO_MODULE and name != LAYERS:
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and spec is None:
                spec = finder.find_spec(name, path, target)
        if spec is None:
            return None
        loader = spec.loader
        if loader is None:  # a namespace package, which transformers' modules are not
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            import_registrations(name)

        # of this one loader, which its finder made for this module
        setattr(loader, "exec_module", exec_module)  # noqa: B010 (mypy: assignment to a method)
        return spec


sys.meta_path.insert(0, AutoClassHook())
for _auto, _modules in WITH_AUTO_MODULE.items():
    if _auto in sys.modules:
        for _module in _modules:
            importlib.import_module(_module)
