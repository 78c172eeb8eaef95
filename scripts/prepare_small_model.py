#!/usr/bin/env python3
"""Make a small model of a family with random weights, for trials, tests and benchmarks.

    python scripts/prepare_small_model.py --family glm2 --tokenizer DIR --output_dir DIR
        --hidden_size 256 --num_layers 4

The vocabulary follows the tokenizer, rounded up to a multiple of 64. The folder is a checkpoint
like any published one.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, number, run_command, whole  # noqa: E402
from chatglm.families import OWN_FAMILIES  # noqa: E402
from chatglm.files import read_json  # noqa: E402
from chatglm.saving import held_aside, is_free, move_in_place, set_modes  # noqa: E402
from finetune.files import writing  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.configuration import ChatGLMConfig
    from chatglm.family_tokenizer import FamilyTokenizer

COMMANDS = {"bos_token_id": "<sop>", "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}


def make_config(
    family: str,
    tokenizer: "FamilyTokenizer",
    *,
    hidden_size: int,
    num_layers: int,
    heads: int,
    groups: int,
    ffn: int,
    length: int,
    init_std: float,
) -> "ChatGLMConfig":
    """A configuration of the family's architecture for the tokenizer's ids.

    Of GLM-10B the MLP has four times the width, whatever `ffn` says.
    """
    from chatglm.configuration import ChatGLM1Config, ChatGLM2Config, GLMBaseConfig, PanguConfig

    vocab = -(-len(tokenizer) // 64) * 64
    shared: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "glm_family": family,
        "initializer_range": init_std,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "glm":
        commands: dict[str, Any] = {
            key: tokenizer.get_command(token) for key, token in COMMANDS.items()
        }
        return ChatGLM1Config(
            vocab_size=vocab,
            inner_hidden_size=ffn,
            max_sequence_length=length,
            **shared,
            **commands,
        )
    if family == "glm_base":
        return GLMBaseConfig(vocab_size=vocab, max_sequence_length=length, **shared)
    if family == "pangu":
        shared["num_heads"] = shared.pop("num_attention_heads")
        return PanguConfig(
            vocab_size=vocab,
            intermediate_size=ffn,
            max_position_embeddings=length,
            bos_token_id=tokenizer.bos_token_id,
            **shared,
        )
    return ChatGLM2Config(
        padded_vocab_size=vocab,
        ffn_hidden_size=ffn,
        kv_channels=hidden_size // heads,
        multi_query_group_num=groups,
        seq_length=length,
        **shared,
    )


def make_model(
    family: str,
    tokenizer_dir: str | Path,
    output_dir: str | Path,
    *,
    hidden_size: int = 256,
    num_layers: int = 4,
    heads: int = 8,
    groups: int = 2,
    ffn: int = 688,
    length: int = 2048,
    init_std: float = 0.02,
    seed: int = 1234,
) -> Path:
    """Write a random model with its tokenizer to `output_dir`, whole or not at all; returns the
    folder.
    """
    import torch

    from chatglm import load_tokenizer
    from chatglm.loading import model_class_of

    tokenizer = load_tokenizer(tokenizer_dir, mode=family)
    torch.manual_seed(seed)
    config = make_config(
        family,
        tokenizer,
        hidden_size=hidden_size,
        num_layers=num_layers,
        heads=heads,
        groups=groups,
        ffn=ffn,
        length=length,
        init_std=init_std,
    )
    return save_model(model_class_of(config)(config), tokenizer, Path(output_dir))


def save_model(model: "PreTrainedModel", tokenizer: "FamilyTokenizer", output_dir: Path) -> Path:
    """Write a model and its tokenizer beside `output_dir`, then rename.

    Without checksums: tests and trials edit these folders.

    Raises:
        ValueError: another process is writing it.
        OSError: it cannot be written.
    """
    from chatglm.loading import stop_ids

    model.generation_config.eos_token_id = stop_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with writing(output_dir), held_aside(output_dir) as aside:
        model.save_pretrained(str(aside))
        tokenizer.save_pretrained(str(aside))
        set_modes(aside)
        move_in_place(aside, output_dir)
    return output_dir


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="prepare_small_model.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=OWN_FAMILIES, default="glm2", help="[glm2]")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument(
        "--output_dir", required=True, help="folder to write; replaced if it is a model already"
    )
    for name, default, kind, text in (
        ("hidden_size", 256, whole(), "width"),
        ("num_layers", 4, whole(), "blocks"),
        ("heads", 8, whole(), "query heads"),
        ("groups", 2, whole(), "key/value heads (glm2, glm3)"),
        ("ffn", 688, whole(), "width of the MLP"),
        ("length", 2048, whole(2), "longest row in tokens"),
        ("init_std", 0.02, number(), "deviation of the weights"),
        ("seed", 1234, whole(0), "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} [{default}]")
    args = vars(parser.parse_args(argv))
    return run_command(parser.prog, lambda: run(**args))


def run(family: str, tokenizer: str, output_dir: str, **sizes: Any) -> None:
    output = Path(output_dir)
    here, there = output.resolve(), Path(tokenizer).resolve()
    if here == there or here in there.parents:
        raise ValueError(f"--output_dir {output} would replace --tokenizer {tokenizer}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output} is a file; name a folder")
    if not is_free(output) and not (output / "config.json").is_file():
        raise ValueError(f"--output_dir {output} is not empty and holds no model")
    folder = make_model(family, tokenizer, output, **sizes)
    vocabulary = read_json(folder / "config.json")
    print(
        f"wrote {folder} (vocabulary "
        f"{vocabulary.get('padded_vocab_size', vocabulary.get('vocab_size'))})"
    )


if __name__ == "__main__":
    sys.exit(main())
