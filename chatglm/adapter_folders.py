"""Folders and files of adapters that are not read as they are, and what to do with each.

Free of torch: told by the names of files alone.
"""

from pathlib import Path

COMMAND = "python -m chatglm.convert_adapter"
TENSOR_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# Files of LoRA tensors without a configuration, the first that is there counts: of ChatGLM-Tuning
# and Chatglm_lora_multi-gpu; of their Trainer's checkpoints and of peft; of ChatGLM3's
# finetune_basemodel_demo.
LORA_FILES = (
    "chatglm-lora.pt",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model.pt",
)


def conversion(source: Path, *, lora_alpha: bool = False) -> str:
    """The command that converts `source`; with `lora_alpha`, what its file does not say."""
    alpha = " --lora_alpha N" if lora_alpha else ""
    return f"{COMMAND} {source} --base BASE --output FOLDER{alpha}"


def lora_file(folder: Path) -> Path | None:
    """The file of LoRA tensors in a folder that has no configuration; None where there is none."""
    return next((folder / name for name in LORA_FILES if (folder / name).is_file()), None)


def swift_adapter(folder: Path) -> Path | None:
    """The folder inside a checkpoint of ms-swift 1 that holds its adapter; None if there is none.

    It wrote each adapter into a folder of the adapter's name, which is "default" where users give
    none.
    """
    inner = folder / "default"
    return inner if (inner / "adapter_config.json").is_file() else None


def refuse_foreign(path: Path) -> None:
    """Raises ValueError where `path` is a file of tensors, or a folder of an adapter that another
    program saved without a configuration.
    """
    if path.is_file() and path.suffix in TENSOR_SUFFIXES:
        raise ValueError(
            f"{path} is a file, wanted a folder; if it holds LoRA tensors, convert it: "
            f"{conversion(path, lora_alpha=True)}"
        )
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return
    if file := lora_file(path):
        raise ValueError(
            f"{path} holds LoRA tensors ({file.name}) without an adapter_config.json; "
            f"convert them: {conversion(file, lora_alpha=True)}"
        )
    if inner := swift_adapter(path):
        raise ValueError(
            f"{path} is a checkpoint of ms-swift, its adapter is in {inner}: give that"
        )
