"""Fold a LoRA adapter into its base model: python merge_lora.py --ori_model_dir BASE --model_dir ADAPTER --mode glm2."""

import json
import os
import shutil
import sys
from pathlib import Path

from chatglm.families import FAMILIES
from finetune.commands import Parser, run_command

MERGED_NOTE = "merged.json"


def check_base(base: Path, adapter: Path, other_name: bool = False) -> str | None:
    """None where the adapter is known to belong to the base; a word of warning where nothing can tell.

    Raises:
        ValueError: it belongs to another base, by its manifest's fingerprint, its shapes, or its base's name unless `other_name`.
    """
    from chatglm.loading import base_fingerprint, iterate_weights
    from finetune.checkpoint import read_manifest

    changed = adapter_shapes(adapter)
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    except ValueError as error:
        raise ValueError(f"{adapter / 'adapter_config.json'}: not valid JSON: {error}") from None
    made_for = (read_manifest(adapter) or {}).get("base_model", {})
    if made_for.get("fingerprint"):
        if made_for["fingerprint"] != base_fingerprint(base):
            raise ValueError(
                f"{adapter} was trained on {made_for['name_or_path']}, whose weights are not those of {base} (fingerprints differ)"
            )
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in iterate_weights(base)}
    for name, (out_size, in_size) in changed.items():
        target = name.removeprefix("base_model.model.") + ".weight"
        if target not in shapes or shapes[target] != (out_size, in_size):
            raise ValueError(f"{adapter} does not fit {base}: it changes {target} of {(out_size, in_size)}, found {shapes.get(target)}")
    if named and Path(named).name not in (base.name, base.resolve().name):
        if not other_name:
            raise ValueError(f"{adapter} names {named} as its base, not {base.name}; if they are the same model, say --other_name")
        return f"{adapter} names {named} as its base and has no manifest; its shapes fit {base}, its weights cannot be compared"
    return f"{adapter} has no manifest: its shapes fit {base}, its weights cannot be compared"


def adapter_shapes(adapter: Path) -> dict[str, tuple[int, int]]:
    """module name -> (out, in) size of the weight that its A and B change."""
    from chatglm.loading import read_tensors

    pairs: dict[str, dict[str, int]] = {}
    for name, tensor in read_tensors(adapter_file(adapter)):
        for part, size in ((".lora_A.", tensor.shape[-1]), (".lora_B.", tensor.shape[0])):
            if part in name:
                pairs.setdefault(name.split(part)[0], {})[part] = size
    if not pairs:
        raise ValueError(f"{adapter}: its adapter file holds no LoRA weights")
    return {name: (sizes[".lora_B."], sizes[".lora_A."]) for name, sizes in pairs.items()}


def merge(base: Path, adapter: Path, save_dir: Path, mode: str | None = None, other_name: bool = False) -> float:
    """Write base + adapter to `save_dir`; returns the largest difference of logits between merged and adapted.

    Raises:
        ValueError: not an adapter, another base's, already merged, or the merged logits differ from the adapted ones.
    """
    import torch

    from chatglm import load_model, load_tokenizer
    from chatglm.loading import iterate_weights, resolve_mode, stop_ids

    if (adapter / MERGED_NOTE).is_file():
        raise ValueError(f"{adapter} is merged already ({MERGED_NOTE}); its adapter is in {adapter / 'adapter'}")
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no LoRA adapter: it has no adapter_config.json")
    note = base / MERGED_NOTE
    if note.is_file() and json.loads(note.read_text())["adapter_sha256"] == adapter_hash(adapter):
        raise ValueError(f"{base} already holds this adapter ({MERGED_NOTE}); merging twice would apply it twice")
    if save_dir.exists() and any(save_dir.iterdir()) and save_dir.resolve() != adapter.resolve():
        raise ValueError(f"--save_dir {save_dir} is not empty")
    if word := check_base(base, adapter, other_name):
        print(f"WARNING: {word}", file=sys.stderr)

    mode = resolve_mode(base, mode)
    dtype = next(tensor.dtype for _, tensor in iterate_weights(base))
    model = load_model(adapter, mode=mode, base=base, dtype=torch.float32)
    family, tokenizer = FAMILIES[mode], load_tokenizer(base, mode=mode)
    probe = torch.tensor([family.encode_example(tokenizer, "发动机抖动，怎么办？", "检查火花塞。", 512, 256).input_ids])
    with torch.inference_mode():
        adapted = model(input_ids=probe).logits
        model = model.merge_and_unload()
        merged = model(input_ids=probe).logits
    difference = float((adapted - merged).abs().max())
    bound = 1e-4 * max(1.0, float(adapted.abs().max()))
    if not difference <= bound:
        raise ValueError(f"merged logits differ from adapted ones by {difference:.2e} (allowed {bound:.2e}); nothing was written")

    aside = save_dir.with_name(f".{save_dir.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(dtype).save_pretrained(str(aside), max_shard_size="2GB")
    tokenizer.save_pretrained(str(aside))
    model.generation_config.eos_token_id = stop_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.save_pretrained(str(aside))
    if (adapter / "train_config.json").is_file():  # prediction cuts prompts as training did
        shutil.copy(adapter / "train_config.json", aside)
    note = {"base": str(base.resolve()), "adapter": str(adapter.resolve()), "adapter_sha256": adapter_hash(adapter)}
    (aside / MERGED_NOTE).write_text(json.dumps(note, indent=2) + "\n")
    if save_dir.resolve() == adapter.resolve():
        # In place, as the old command does it. The adapter moves down: a folder with both would be ambiguous.
        shutil.copytree(adapter, aside / "adapter")
        replaced = adapter.with_name(f".{adapter.name}.old")
        os.replace(adapter, replaced)
        os.replace(aside, save_dir)
        shutil.rmtree(replaced)
    else:
        if save_dir.exists():
            save_dir.rmdir()
        os.replace(aside, save_dir)
    return difference


def adapter_file(adapter: Path) -> Path:
    files = [adapter / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (adapter / name).is_file()]
    if not files:
        raise ValueError(f"{adapter}: neither adapter_model.safetensors nor adapter_model.bin")
    return files[0]


def adapter_hash(adapter: Path) -> str:
    from finetune.checkpoint import sha256

    return sha256(adapter_file(adapter))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="merge_lora.py", description=__doc__)
    parser.add_argument("--ori_model_dir", default="ChatGLM2-6B", help="the base model [ChatGLM2-6B]")
    parser.add_argument("--model_dir", default="output-glm2/epoch-2-step-3900/", help="the adapter folder")
    parser.add_argument("--mode", choices=tuple(FAMILIES), help="family (default: found in the base folder)")
    parser.add_argument("--save_dir", help="where the merged model goes (default: MODEL_DIR, its adapter moving to MODEL_DIR/adapter)")
    parser.add_argument("--other_name", action="store_true", help="the base is the adapter's although its folder is named otherwise")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: run(args))


def run(args) -> int:
    adapter = Path(args.model_dir)
    save_dir = Path(args.save_dir or args.model_dir)
    for path, flag in ((Path(args.ori_model_dir), "--ori_model_dir"), (adapter, "--model_dir")):
        if not path.is_dir():
            raise FileNotFoundError(f"{flag}: no such folder: {path}")
    difference = merge(Path(args.ori_model_dir), adapter, save_dir, args.mode, args.other_name)
    print(f"merged into {save_dir} (largest difference of logits, merged against adapted: {difference:.1e})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
