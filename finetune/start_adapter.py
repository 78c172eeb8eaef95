"""--adapter: the flags of LoRA that an existing adapter gives. Free of torch.

A run that starts from an adapter trains on its A and B. What it exports is an adapter of the same
base, which merges and loads as any other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.files import read_json, shorten
from chatglm.folders import check_folder


class Setting(NamedTuple):
    """A value of adapter_config.json that is a flag here.

    Attributes:
        key: its key there.
        default: peft's, where the file does not have the key.
        is_valid: whether a value can be the flag's.
    """

    key: str
    default: Any
    is_valid: Callable[[Any], bool]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_scale(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def is_names(value: Any) -> bool:
    """Whether a value is a pattern, or a list of names."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) for name in value)
    return isinstance(value, str) and bool(value)


SETTINGS = {
    "lora_dim": Setting("r", 8, is_count),
    "lora_alpha": Setting("lora_alpha", 8, is_scale),
    "lora_dropout": Setting("lora_dropout", 0.0, is_share),
    "lora_module_name": Setting("target_modules", None, is_names),
    "use_rslora": Setting("use_rslora", False, is_switch),
    "use_dora": Setting("use_dora", False, is_switch),
}
FREE = ("lora_dropout",)  # acts in training only, so the flag may say another
# What trains, or is repeated, besides A and B of named layers.
NOT_CONTINUED = (
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters"),
    "lora_bias",
)


def add_adapter_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The given flags, and where --adapter is one of them, those that the adapter decides.

    Raises:
        ValueError: the folder is no LoRA adapter that can be trained on, or a flag contradicts it.
        OSError: it is not there.
    """
    if not given.get("adapter"):
        return given
    method = given.get("train_type", "lora")
    if method != "lora":
        raise ValueError(f"--adapter needs --train_type lora; got {method}")
    folder = check_folder(given["adapter"], weights=True)
    taken = read_lora_flags(folder)
    for name, value in taken.items():
        said = given.get(name, value)
        if name not in FREE and not says_same(name, said, value):
            raise ValueError(
                f"--{name} {said} contradicts --adapter {folder}, which has {value}: "
                f"leave --{name} out"
            )
    free = {name: given[name] for name in FREE if name in given}
    return given | taken | free


def says_same(name: str, said: Any, value: Any) -> bool:
    """Whether a flag says what the adapter has; the order of names does not count."""
    if name == "lora_module_name":
        return set(str(said).replace(" ", "").split(",")) == set(value.split(","))
    return bool(said == value)


def read_lora_flags(folder: Path) -> dict[str, Any]:
    """{flag: value} of a LoRA adapter's adapter_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not LoRA's, trains more than A and B, or a value cannot be.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--adapter {folder} is no adapter: it has no adapter_config.json")
    values = read_json(path)
    kind = values.get("peft_type") or values.get("swift_type")
    if kind != "LORA":
        raise ValueError(f"--adapter {folder}: wanted peft_type LORA, got {shorten(kind)}")
    trained = [key for key in NOT_CONTINUED if values.get(key)]
    if values.get("bias", "none") != "none":
        trained.append("bias")
    if trained:
        raise ValueError(
            f"--adapter {folder}: {trained[0]} of adapter_config.json is not trained on here; "
            "merge it (merge_lora.py), then train on the result"
        )
    flags = {}
    for name, setting in SETTINGS.items():
        value = values.get(setting.key, setting.default)
        if not setting.is_valid(value):
            raise ValueError(f"{path}: {setting.key} cannot be {shorten(value)}")
        flags[name] = ",".join(sorted(value)) if isinstance(value, list) else value
    return flags
