"""What transformers' Auto classes give for a ChatGLM.

AutoModel gives the class with `chat`, as the releases' own auto_map does; its body is
`.transformer`. AutoModelForSequenceClassification gives the body with a score. Auto classes of
heads that these models do not have refuse in one line.
"""

from typing import Any, NoReturn

WITH_CHAT = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
WITH_SCORE = ("AutoModelForSequenceClassification",)


class NoSuchHead:
    """Stands for a model class in the mapping of an Auto class whose head ChatGLM does not have."""

    def __init__(self, auto_class: type):
        self.__name__ = self.auto_class = auto_class.__name__

    def from_pretrained(self, source: object, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError, in one line."""
        raise ValueError(
            f"{source}: no ChatGLM here has the head of {self.auto_class}, and code that comes "
            "with a model is never run; AutoModel and AutoModelForCausalLM load it"
        )

    def _from_config(self, config: Any, **kwargs: Any) -> NoReturn:
        self.from_pretrained(config.name_or_path or type(config).__name__)


def subclasses(parent: Any) -> list[Any]:
    """All classes below `parent`."""
    found: list[Any] = []
    for child in parent.__subclasses__():
        found += [child, *subclasses(child)]
    return found


def register_model(model_class: Any, names: tuple[str, ...] = WITH_CHAT) -> None:
    """Register a model class with the Auto classes `names`; with the rest, a refusal.

    A class that another of the same configuration is registered with keeps it.
    """
    # not at the top: these modules import ours
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    for auto_class in subclasses(_BaseAutoModelClass):
        # a class of somebody else's may share another's mapping
        mapping = auto_class.__dict__.get("_model_mapping")
        if mapping is None or auto_class.__module__ != modeling_auto.__name__:
            continue
        config_class = model_class.config_class
        if auto_class.__name__ in names:
            mapping.register(config_class, model_class, exist_ok=True)
        elif config_class not in mapping:
            mapping.register(config_class, NoSuchHead(auto_class))
