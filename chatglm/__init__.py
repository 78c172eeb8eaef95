"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B on today's transformers, without remote code.

`load_model` and `load_tokenizer` read every published folder; after `import chatglm`, transformers' Auto classes do too.
"""

import importlib
import importlib.abc
import sys

from .families import FAMILIES

__all__ = ["FAMILIES", "load_model", "load_tokenizer"]


def __getattr__(name):
    # Lazy: `train.py --help` wants the names of the families, not seconds of torch.
    if name in ("load_model", "load_tokenizer"):
        from . import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Our modules register themselves with transformers' Auto classes at their foot. They are imported the moment one of
# transformers' auto modules is, whoever imports it: at once would cost everyone seconds, on use would be too late.
WITH_AUTO_MODULE = {
    "transformers.models.auto.configuration_auto": ("chatglm.configuration",),
    "transformers.models.auto.tokenization_auto": ("chatglm.tokenization",),
    "transformers.models.auto.modeling_auto": ("chatglm.modeling_glm", "chatglm.modeling_glm2"),
}


class AutoClassHook(importlib.abc.MetaPathFinder):
    """Lets the other finders find an auto module, and imports ours after it has run."""

    def find_spec(self, name, path, target=None):
        if name not in WITH_AUTO_MODULE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for ours in WITH_AUTO_MODULE[name]:
                importlib.import_module(ours)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AutoClassHook())
for _auto, _modules in WITH_AUTO_MODULE.items():
    if _auto in sys.modules:
        for _module in _modules:
            importlib.import_module(_module)
