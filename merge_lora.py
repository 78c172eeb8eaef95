"""Fold a LoRA adapter into its base model: python merge_lora.py --ori_model_dir BASE --model_dir
ADAPTER --mode glm2.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.adapter_folders import refuse_foreign
from chatglm.checksums import add_verify_flag
from chatglm.commands import Parser, run_command
from chatglm.families import CHATGLM_FAMILIES, FAMILIES
from chatglm.files import read_json
from chatglm.hub import model_short_name, recover_folder, resolve_folder

if TYPE_CHECKING:
    import torch

    from chatglm.family_tokenizer import FamilyTokenizer
    from finetune.merging import Merged

MERGED_NOTE = "merged.json"
DEFAULT_BASE = "ChatGLM2-6B"


def check_base(
    base: Path, adapter: Path, other_name: bool = False, verify: str | None = None
) -> str | None:
    """None where the adapter is known to belong to the base, else the text of a warning.

    Raises:
        ValueError: it belongs to another base, by its manifest's fingerprint, its shapes, or its
            base's name unless `other_name`.
    """
    from chatglm.loading import base_fingerprint
    from finetune.checkpoint import read_manifest

    changed = adapter_shapes(adapter)
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    made_for = (read_manifest(adapter, verify) or {}).get("base_model", {})
    if made_for.get("fingerprint"):
        if made_for["fingerprint"] != base_fingerprint(base):
            raise ValueError(
                f"{adapter} was trained on {made_for['name_or_path']}, whose weights are not those "
                f"of {base} (fingerprints differ)"
            )
        return None
    check_shapes(base, adapter, changed)
    if named and model_short_name(named) not in (base.name, model_short_name(base.resolve())):
        if not other_name:
            raise ValueError(
                f"{adapter} names {named} as its base, not {model_short_name(base)}; "
                "if they are the same model, say --other_name"
            )
        return (
            f"{adapter} names {named} as its base and has no manifest; "
            f"its shapes fit {base}, its weights cannot be compared"
        )
    return f"{adapter} has no manifest: its shapes fit {base}, its weights cannot be compared"


def check_shapes(base: Path, adapter: Path, changed: dict[str, tuple[int, int]]) -> None:
    """Raises ValueError where the base has no weight of a shape in adapter_shapes(adapter)."""
    from chatglm.weights import stored_shapes

    shapes = stored_shapes(base)
    for name, wanted in changed.items():
        target = f"{name}.weight"
        found = tuple(shapes[target]) if target in shapes else None
        if found != wanted:
            raise ValueError(
                f"{adapter} does not fit {base}: it changes {target} of {wanted}, found {found}"
            )


def adapter_shapes(adapter: Path) -> dict[str, tuple[int, int]]:
    """{module of the base: (out, in) size of the weight that its A and B change}."""
    from chatglm.adapters import PEFT, read_adapter

    pairs: dict[str, dict[str, int]] = {}
    state = read_adapter(adapter)
    for peft_name, tensor in state.items():
        name = peft_name.removeprefix(PEFT)
        for part, size in ((".lora_A.", tensor.shape[-1]), (".lora_B.", tensor.shape[0])):
            if part in name:
                pairs.setdefault(name.split(part)[0], {})[part] = size
    if not pairs:
        raise ValueError(f"{adapter}: its adapter file holds no LoRA weights")
    return {name: (sizes[".lora_B."], sizes[".lora_A."]) for name, sizes in pairs.items()}


def merge(
    base: Path,
    adapter: Path,
    save_dir: Path,
    mode: str | None = None,
    other_name: bool = False,
    *,
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
    verify: str | None = None,
) -> "Merged":
    """Write base + adapter to `save_dir`, which is replaced as a whole or stays as it was.

    Args:
        dtype: of the merged weights; None keeps the base's.
        device: where the products are computed, in fp32.
        verify: how both folders are compared with their checksums, one of checksums.LEVELS; None:
            by SHA-256.
    Raises:
        ValueError: not an adapter, another base's, already merged, damaged, without effect, or a
            merged layer differs from the adapted one.
        OSError: no room on the disk, or it cannot be written.
    """
    from chatglm import load_tokenizer
    from chatglm.adapters import read_adapter, refuse_layout
    from chatglm.loading import resolve_mode
    from chatglm.saving import held_aside, put_in_place
    from finetune.merging import merge_weights

    base, adapter, save_dir = base.resolve(), adapter.resolve(), save_dir.resolve()
    check_folders(base, adapter, save_dir, verify)
    mode = resolve_mode(base, mode)
    if mode in CHATGLM_FAMILIES:
        refuse_layout(adapter, read_adapter(adapter))
    if word := check_base(base, adapter, other_name, verify):
        print(f"WARNING: {word}", file=sys.stderr)

    tokenizer = load_tokenizer(base, mode=mode, verify=verify)
    with held_aside(save_dir) as aside:
        merged = merge_weights(base, adapter, aside, mode=mode, dtype=dtype, device=device)
        write_others(tokenizer, base, adapter, aside)
        if save_dir == adapter:
            # As the old command does it. The adapter moves down: a folder with both would be
            # ambiguous.
            shutil.copytree(adapter, aside / "adapter", copy_function=link_or_copy)
        put_in_place(aside, save_dir)
    return merged


def check_folders(base: Path, adapter: Path, save_dir: Path, verify: str | None) -> None:
    """Raises ValueError where a folder is not what it should be, damaged, or merged already."""
    from chatglm.checksums import check_folder_files, is_top
    from chatglm.runs import check_not_run
    from chatglm.saving import is_free

    check_not_run(adapter, "--model_dir")
    refuse_foreign(adapter)
    if (adapter / MERGED_NOTE).is_file():
        raise ValueError(
            f"{adapter} is merged already ({MERGED_NOTE}); its adapter is in {adapter / 'adapter'}"
        )
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no LoRA adapter: it has no adapter_config.json")
    note = base / MERGED_NOTE
    if note.is_file() and read_json(note).get("adapter_sha256") == adapter_hash(adapter):
        raise ValueError(
            f"{base} already holds this adapter ({MERGED_NOTE}); merging twice would apply it twice"
        )
    if save_dir != adapter and not is_free(save_dir):
        raise ValueError(f"--save_dir {save_dir} is not empty")
    for folder in (base, adapter):
        check_folder_files(folder, verify, default="full", wanted=is_top)


def write_others(tokenizer: "FamilyTokenizer", base: Path, adapter: Path, folder: Path) -> None:
    """What belongs to a merged model besides its weights and config.json."""
    from transformers import GenerationConfig

    from chatglm.loading import stop_ids

    tokenizer.save_pretrained(str(folder))
    there = (base / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(str(base)) if there else GenerationConfig()
    generation.eos_token_id, generation.pad_token_id = stop_ids(tokenizer), tokenizer.pad_token_id
    generation.save_pretrained(str(folder))
    if (adapter / "train_config.json").is_file():  # prediction cuts prompts as training did
        shutil.copyfile(adapter / "train_config.json", folder / "train_config.json")
    note = {"base": str(base), "adapter": str(adapter), "adapter_sha256": adapter_hash(adapter)}
    (folder / MERGED_NOTE).write_text(json.dumps(note, indent=2) + "\n", "utf-8")


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such
    names.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def adapter_hash(adapter: Path) -> str:
    """SHA-256 of the adapter's weights."""
    from chatglm.adapters import adapter_file
    from finetune.files import sha256

    return sha256(adapter_file(adapter))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="merge_lora.py", description=__doc__)
    parser.add_argument(
        "--ori_model_dir",
        help="the base model, a folder or a hub's name (default: ChatGLM2-6B where that is here, "
        "else the one that the adapter names)",
    )
    parser.add_argument(
        "--model_dir", default="output-glm2/epoch-2-step-3900/", help="the adapter folder"
    )
    parser.add_argument(
        "--mode", choices=tuple(FAMILIES), help="family (default: found in the base folder)"
    )
    parser.add_argument(
        "--save_dir",
        help="where the merged model goes (default: MODEL_DIR, its adapter moving to "
        "MODEL_DIR/adapter)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the merged weights (default: the base's)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help='where the products are computed: GPU number, "cpu" or a torch device [cpu]',
    )
    add_verify_flag(parser, "full")
    parser.add_argument(
        "--other_name",
        action="store_true",
        help="the base is the adapter's although its folder is named otherwise",
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: merge_folders(MergeFlags(**vars(args))))


def base_folder(given: str | None, adapter: Path) -> Path:
    """The base model's folder: what --ori_model_dir says, else DEFAULT_BASE where that is here,
    else the one that the adapter names.

    Raises:
        OSError: a hub does not give it; as chatglm.hub.resolve_folder.
    """
    if given is None and not Path(DEFAULT_BASE).is_dir():
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(named, str) and named:
            return recover_folder(named)
    return resolve_folder(given or DEFAULT_BASE, weights=True)


@dataclass(frozen=True)
class MergeFlags:
    """The command line."""

    ori_model_dir: str | None
    model_dir: str
    mode: str | None
    save_dir: str | None
    dtype: str | None
    device: str
    verify: str | None
    other_name: bool


def merge_folders(args: MergeFlags) -> int:
    """Merge, and print what was merged; raises as `merge`."""
    adapter = Path(args.model_dir)
    save_dir = adapter if args.save_dir is None else Path(args.save_dir)
    if args.save_dir == "":
        raise ValueError(
            "--save_dir is empty: name a folder, "
            "or leave the flag out to merge in place of --model_dir"
        )
    adapter = resolve_folder(adapter, weights=True)
    refuse_foreign(adapter)
    base = base_folder(args.ori_model_dir, adapter)
    for path, flag in ((base, "--ori_model_dir"), (adapter, "--model_dir")):
        if not path.is_dir():
            raise FileNotFoundError(f"{flag}: no such folder: {path}")
    # torch: seconds, and only once the flags are right
    from finetune.distributed import DTYPES
    from finetune.evaluation.inference import pick_device

    merged = merge(
        base,
        adapter,
        save_dir,
        args.mode,
        args.other_name,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        device=pick_device(args.device),
        verify=args.verify,
    )
    print(
        f"merged {merged.layers} layers into {save_dir}, "
        f"{str(merged.dtype).removeprefix('torch.')} "
        f"(largest difference of outputs, merged against adapted: {merged.difference:.1e})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
