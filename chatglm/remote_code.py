"""Code that comes with a ChatGLM folder is never run, whatever transformers' Auto classes are told.

`guard_code` puts one check before the function by which transformers fetches such code.
Folders of other model types are left to transformers.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, dynamic_module_utils

from .files import read_json
from .folders import OWN_TYPES

# In tokenizer_config.json of ChatGLM's and of GLM-4's releases.
TOKENIZER_CLASSES = ("ChatGLMTokenizer", "ChatGLM4Tokenizer")
# Options that say where a hub keeps a file.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def holds_chatglm(source: object, **options: Any) -> bool:
    """Whether a folder or hub name is a ChatGLM's: its model_type, or its tokenizer's class.

    Args:
        options: from_pretrained's; those in HUB_OPTIONS count.
    """
    name = str(source)
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    folder = Path(name, hub.get("subfolder") or "")
    try:
        if folder.is_dir():
            model = folder / "config.json"
            config = read_json(model) if model.is_file() else {}
            if config.get("model_type") is not None:
                return config["model_type"] in OWN_TYPES
            tokenizer = folder / "tokenizer_config.json"
            config = read_json(tokenizer) if tokenizer.is_file() else {}
        else:
            config, _ = PreTrainedConfig.get_config_dict(name, **hub)
            if config.get("model_type") is not None:
                return config["model_type"] in OWN_TYPES
            # not at the top: its module imports ours
            from transformers.models.auto.tokenization_auto import get_tokenizer_config

            config = get_tokenizer_config(name, **hub)
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return config.get("tokenizer_class") in TOKENIZER_CLASSES


def refuse_code(source: object, file: str, **options: Any) -> None:
    """Raises ValueError where the code in `file` belongs to a ChatGLM folder or hub name."""
    if holds_chatglm(source, **options):
        raise ValueError(
            f"{source} is a ChatGLM, whose {file} is never run: load it by chatglm.load_model, "
            "load_tokenizer, AutoModel, AutoModelForCausalLM or AutoTokenizer"
        )


def guard_code() -> None:
    """Put `refuse_code` before the two functions by which transformers fetches code, once.

    The class that an auto_map names may lie in another repository (REPOSITORY--FILE.CLASS), so the
    folder that names it is asked about too.
    """
    fetch = dynamic_module_utils.get_cached_module_file
    find = dynamic_module_utils.get_class_from_dynamic_module
    if getattr(fetch, "refuses_chatglm", False):
        return

    @functools.wraps(fetch)
    def guarded_fetch(
        pretrained_model_name_or_path: Any, module_file: str, *args: Any, **kwargs: Any
    ) -> str:
        refuse_code(pretrained_model_name_or_path, module_file, **kwargs)
        return fetch(pretrained_model_name_or_path, module_file, *args, **kwargs)

    @functools.wraps(find)
    def guarded_find(
        class_reference: str, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        refuse_code(pretrained_model_name_or_path, class_reference, **kwargs)
        return find(class_reference, pretrained_model_name_or_path, *args, **kwargs)

    guarded_fetch.refuses_chatglm = True  # type: ignore[attr-defined]
    module: Any = dynamic_module_utils  # its type does not say that a function may be replaced
    module.get_cached_module_file = guarded_fetch
    for name, loaded in list(sys.modules.items()):
        if name.startswith("transformers.") and vars(loaded).get(find.__name__) is find:
            setattr(loaded, find.__name__, guarded_find)
