"""Which family a folder's files show.

Free of torch and transformers. Code in a folder is read as text and never run.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .byte_pairs import is_tiktoken_file
from .families import FAMILIES, OWN_FAMILIES
from .files import read_json
from .hub import repository_of


class _Evidence(NamedTuple):
    """What one sign in a folder says: the model belongs to one of `families`."""

    families: frozenset[str]
    strong: bool  # strong evidence may contradict what a user asks for; names only help to guess
    sentence: str  # for an error


def _sign(sentence: str, *families: str, strong: bool = True) -> _Evidence:
    return _Evidence(frozenset(families), strong, sentence)


_END = r"(?![a-z0-9])"  # chatglm-2e-5 and chatglm-3epochs name no generation
_NAME_PATTERNS = [
    (rf"(glm|codegeex)[-_]?4{_END}", "glm4"),
    (rf"glm[-_]?3{_END}|longalign[-_]6b", "glm3"),
    (rf"(glm|codegeex)[-_]?2{_END}", "glm2"),
    (rf"chatglm[-_]?6b{_END}", "glm"),
]
# transformers' causal models that the family `causal` takes: their layers have the same parts.
CAUSAL_TYPES = ("glm", "glm4", "llama", "qwen2", "qwen3")
PANGU_TYPES = ("pangu", "gpt_pangu")  # of the releases' config.json, and of their code
MOST_LAYERS = 1000  # the largest release has 40; 10**8 would be built before weights are missed
LARGEST_SIZE = 2**24  # of any other dimension of a weight
GLM4_VOCABULARY = 151552  # rows of the embedding in every release


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _evidence(
    folder: str | Path,
    base: str | Path | None = None,
    config: dict[str, Any] | None = None,
    follow: bool = True,
) -> Iterator[_Evidence]:
    """What a folder (or a model's name) says about its family, most telling first.

    Code is read as text only.

    The base model of an adapter or prefix, which `base` may name, counts too, but not the base of
    a base: two folders may name each other.
    """
    path = Path(folder)
    config = _read_json(path / "config.json") if config is None else config
    tokenizer = _read_json(path / "tokenizer_config.json")
    adapter = _read_json(path / "adapter_config.json")

    base = base or adapter.get("base_model_name_or_path")
    if (other := other_architecture(path, config)) is not None:
        yield other
        return
    if causal := causal_sentence(config, tokenizer, base if follow else None):
        yield _sign(causal, "causal")
        return

    for file, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        family = values.get("glm_family")
        if isinstance(family, str) and family in OWN_FAMILIES:
            yield _sign(f'{file} says "glm_family": "{family}"', family)

    yield from _architecture_evidence(path, config)
    yield from _vocabulary_evidence(path)
    yield from _tokenizer_evidence(path, tokenizer)

    if follow and isinstance(base, (str, Path)) and base:
        for evidence in _evidence(base, follow=False):
            sentence = f"the adapter's base model: {evidence.sentence}"
            yield evidence._replace(sentence=sentence)

    yield from _name_evidence(path, config, tokenizer)
    yield from _value_evidence(config)


def other_architecture(path: Path, config: dict[str, Any]) -> _Evidence | None:
    """The sign that a folder holds a model of our classes that is no ChatGLM; None without one."""
    if (model_type := config.get("model_type")) in PANGU_TYPES:
        return _sign(f'config.json says "model_type": "{model_type}"', "pangu")
    if is_glm_base(config):
        return _sign("config.json has block_position_encoding, as GLM-10B's", "glm_base")
    if not config and (path / "vocab.model").is_file():
        return _sign("the folder holds vocab.model, Pangu-alpha's tokenizer", "pangu")
    if not config and (path / "cog-pretrain.model").is_file():
        return _sign("the folder holds cog-pretrain.model, GLM-10B's tokenizer", "glm_base")
    return None


def is_glm_base(config: dict[str, Any]) -> bool:
    """Whether a config.json is GLM-350M's or GLM-10B's; "glm" alone is a model of transformers."""
    kind = config.get("model_type")
    return kind == "glm_base" or (kind == "glm" and "block_position_encoding" in config)


def is_causal_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that the family `causal` takes."""
    return config.get("model_type") in CAUSAL_TYPES and not is_glm_base(config)


def causal_sentence(
    config: dict[str, Any], tokenizer: dict[str, Any], base: object = None
) -> str | None:
    """The sign that a folder's model is no ChatGLM but another causal model; None without one.

    Args:
        config, tokenizer: config.json and tokenizer_config.json.
        base: the folder of an adapter's base model.
    """
    if is_causal_config(config):
        model_type = config["model_type"]
        return f'config.json says "model_type": "{model_type}"'
    if not config and tokenizer.get("glm_family") == "causal":
        return 'tokenizer_config.json says "glm_family": "causal"'
    if not config and isinstance(base, (str, Path)) and base:
        found = _read_json(Path(base, "config.json"))
        if is_causal_config(found):
            model_type = found["model_type"]
            return f'the config.json of its base model says "model_type": "{model_type}"'
    return None


def _architecture_evidence(path: Path, config: dict[str, Any]) -> Iterator[_Evidence]:
    """What the keys of config.json and ChatGLM-6B's tokenizer file say."""
    if (path / "ice_text.model").is_file():
        yield _sign("the folder holds ice_text.model, ChatGLM-6B's tokenizer", "glm")
    for key in ("position_encoding_2d", "inner_hidden_size"):
        if key in config:
            yield _sign(f"config.json has {key}, which only ChatGLM-6B has", "glm")
    for key in ("multi_query_group_num", "padded_vocab_size"):
        if key in config:
            sentence = f"config.json has {key}, which ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B have"
            yield _sign(sentence, "glm2", "glm3", "glm4")
    if config.get("padded_vocab_size") == GLM4_VOCABULARY:
        yield _sign(f"config.json has GLM-4-9B's {GLM4_VOCABULARY} tokens", "glm4")


def _name_evidence(
    path: Path, config: dict[str, Any], tokenizer: dict[str, Any]
) -> Iterator[_Evidence]:
    """What the names of the model say."""
    names = (
        config.get("_name_or_path"),
        tokenizer.get("name_or_path"),
        repository_of(path) or path.absolute().name,
    )
    for name in names:
        family = _named_family(name) if isinstance(name, str) else None
        if family:
            yield _sign(f"it is named {name}", family, strong=False)


def _value_evidence(config: dict[str, Any]) -> Iterator[_Evidence]:
    """What the published values of config.json say, where nothing else does."""
    ratios: dict[float, tuple[str, ...]] = {
        16: ("glm2",),
        50: ("glm3",),
        500: ("glm3", "glm4"),
        10000: ("glm4",),
    }
    ratio = config.get("rope_ratio")
    if isinstance(ratio, (int, float)) and ratio in ratios:
        yield _sign(f"config.json has rope_ratio {ratio}", *ratios[ratio], strong=False)
    if isinstance(config.get("eos_token_id"), list):
        yield _sign("config.json lists several eos_token_id", "glm4", strong=False)


def _vocabulary_evidence(path: Path) -> Iterator[_Evidence]:
    """What tokenizer.model is: a byte-pair vocabulary, or SentencePiece's."""
    file = path / "tokenizer.model"
    if is_tiktoken_file(file):
        yield _sign("tokenizer.model is a byte-pair vocabulary, GLM-4-9B's", "glm4")
    elif begins_as_sentencepiece(file):
        sentence = "tokenizer.model is SentencePiece's, which ChatGLM2-6B and ChatGLM3-6B have"
        yield _sign(sentence, "glm2", "glm3")


def begins_as_sentencepiece(path: Path) -> bool:
    """Whether a file begins as SentencePiece's models do: a first piece (field 1), its text."""
    try:
        with open(path, "rb") as file:
            start = file.read(3)
    except OSError:
        return False
    return len(start) == 3 and start[0] == 0x0A and start[2] == 0x0A


def _tokenizer_evidence(path: Path, tokenizer: dict[str, Any]) -> Iterator[_Evidence]:
    """What a folder's tokenizer files say; `tokenizer` is its tokenizer_config.json."""
    keys = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    added = [tokenizer.get(key) for key in keys] + [_read_json(path / "added_tokens.json")]
    template = [tokenizer.get("chat_template"), _read_text(path / "chat_template.jinja")]
    code = _read_text(path / "tokenization_chatglm.py")
    texts = {
        "the added tokens": json.dumps(added, ensure_ascii=False),
        "the chat template": json.dumps(template, ensure_ascii=False),
    }
    for where, text in texts.items():
        strong = where == "the added tokens"  # any program may write a template
        if "[gMASK]<sop>" in text or "<|begin_of_image|>" in text:
            yield _sign(f"GLM-4-9B's tokens are in {where}", "glm4", strong=strong)
        elif "<|user|>" in text:
            sentence = f"<|user|>, a role token of ChatGLM3-6B and GLM-4-9B, is in {where}"
            yield _sign(sentence, "glm3", "glm4", strong=strong)
            yield _sign(f"GLM-4-9B's <sop> is not in {where}", "glm3", strong=False)
    if tokenizer.get("tokenizer_class") == "ChatGLM4Tokenizer":
        yield _sign("tokenizer_config.json names ChatGLM4Tokenizer", "glm4")
    if "ice_text.model" in code:
        yield _sign("tokenization_chatglm.py reads ice_text.model, ChatGLM-6B's tokenizer", "glm")
    elif "tiktoken" in code:
        yield _sign("tokenization_chatglm.py reads a byte-pair vocabulary, GLM-4-9B's", "glm4")
    elif "<|user|>" in code:
        sentence = "<|user|>, a role token of ChatGLM3-6B, is in tokenization_chatglm.py"
        yield _sign(sentence, "glm3")
    elif code:
        yield _sign("tokenization_chatglm.py has no role tokens, so it is ChatGLM2-6B's", "glm2")


def _named_family(name: str) -> str | None:
    """The family that a model's name contains."""
    for pattern, family in _NAME_PATTERNS:
        if re.search(pattern, name.lower()):
            return family
    return None


def infer_family(
    folder: str | Path, base: str | Path | None = None, config: dict[str, Any] | None = None
) -> str | None:
    """The family (a key of FAMILIES) of a checkpoint, tokenizer or adapter folder.

    None where its files cannot tell: ChatGLM2 and ChatGLM3 share their config format. Never runs
    code found in the folder.

    Args:
        base: the base model of an adapter or prefix folder; by default the one that it names.
        config: used in place of the folder's config.json.
    """
    possible = frozenset(FAMILIES)
    strong_first = sorted(_evidence(folder, base, config), key=lambda evidence: not evidence.strong)
    for evidence in strong_first:
        possible = possible & evidence.families or possible
    return next(iter(possible)) if len(possible) == 1 else None


def contradicts(folder: str | Path, family: str, base: str | Path | None = None) -> str | None:
    """The sentence of evidence that `family` is wrong for `folder`; None without evidence."""
    for evidence in _evidence(folder, base):
        if evidence.strong and family not in evidence.families:
            return evidence.sentence
    return None
