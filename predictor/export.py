"""Exports what training wrote to one folder for serving.

    python -m predictor.export --checkpoint DIR --output DIR2

A checkpoint's optimizer, flags and manifest are left out. For an encoder the folder holds an ONNX
model, which is compared with torch first; for a ChatGLM an adapter, prefix or head with the base's
name, or with --merge one whole model.
"""

import argparse
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from chatglm.commands import Parser, run_command
from chatglm.saving import is_free
from finetune.files import sha256, written_folder
from predictor.backbones import BACKBONES, ChatGLMBackbone, EncoderBackbone, find_base_model
from predictor.command_flags import add_yes_no
from predictor.decoder import CARD, backbone_name, read_card, write_card
from predictor.kernel import FILE as KERNEL_FILE
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.onnx_int8 import quantise
from predictor.rereading import WEIGHTS_FILE as REREADER_FILE
from predictor.rereading import Rereader
from predictor.runtime import LengthPredictor
from predictor.scorers import HEAD_FILE, ONNX_FILE, TOKENIZER_FILE, OnnxVectors, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_FILES = (HEAD_FILE, KERNEL_FILE, LEXICAL_FILE, REREADER_FILE)
# Largest allowed difference between torch's vectors and the export's, of the largest value.
TOLERANCE = 1e-4
INT8_COSINE = 0.98  # least mean cosine similarity of an int8 model's vectors to the exact ones
PROBES = [
    "",
    "Hi",
    "What is the capital of France?",
    "Write a story about a dragon who learns to bake bread.",
    "写一首关于春天的诗，至少八行。",
    "Summarize the following text in one sentence:\n"
    + "The committee met on Tuesday and agreed on nothing. " * 12,
    "Give me 10 ideas for a weekend in the mountains with small children, a dog and no car.",
    "def f(x):\n    return x\n\nexplain this code",
]


def export_predictor(
    checkpoint: Path,
    output: Path,
    *,
    onnx: bool | None = None,
    int8: bool = False,
    merge: bool = False,
    overwrite: bool = False,
) -> dict:
    """Write the folder `output`, whole or not at all; returns its card.

    Args:
        checkpoint: an epoch-E-step-S of an encoder or a ChatGLM, or the folder of a frozen
            backbone's predictor.
        onnx: of an encoder; None means True.
    Raises:
        FileNotFoundError: there is no predictor, or no base model.
        ValueError: options that do not fit it, an output that is in use, or an exported model that
            differs.
    """
    check_folder_files(checkpoint, default="full", wanted=is_top)
    card = read_card_of(checkpoint)
    name = backbone_name(card, checkpoint)
    onnx = name == "encoder" if onnx is None else onnx
    check_options(checkpoint, name, onnx=onnx, int8=int8, merge=merge)
    check_output(checkpoint, output, overwrite)
    for key in ("format", "format_version", "export"):
        card.pop(key, None)
    knobs = dict(card["backbone"])
    backbone = BACKBONES[knobs.pop("name")](**knobs)
    made = {"made_of": str(checkpoint.resolve())}
    with written_folder(output) as aside:
        check_output(checkpoint, output, overwrite)  # again, now that no other writes it
        copy_heads(checkpoint, aside)
        if isinstance(backbone, EncoderBackbone):
            made |= export_encoder(backbone, checkpoint, aside, onnx, int8)
        elif isinstance(backbone, ChatGLMBackbone):
            card |= export_chatglm(backbone, checkpoint, aside, card.get("base_model"), merge)
        write_export_card(
            aside, card | {"export": made}, checkpoint, exact=not int8, compare=name != "chatglm"
        )
    return read_card(output)


def check_options(checkpoint: Path, backbone: str, *, onnx: bool, int8: bool, merge: bool) -> None:
    """Raises ValueError where an option does not fit the checkpoint's backbone."""
    if (onnx or int8) and backbone != "encoder":
        option = "onnx" if onnx else "int8"
        raise ValueError(f"--{option} is for encoders; {checkpoint} is of backbone {backbone}")
    if int8 and not onnx:
        raise ValueError("--int8 needs --onnx True: what is quantised is the ONNX model")
    if merge and backbone != "chatglm":
        raise ValueError(
            f"--merge puts an adapter into a ChatGLM; {checkpoint} is of backbone {backbone}"
        )
    if (checkpoint / ONNX_FILE).is_file():
        raise ValueError(
            f"--checkpoint {checkpoint} is an ONNX export already; export what it was made of"
        )


def copy_heads(checkpoint: Path, aside: Path) -> None:
    """Copy the head's files into `aside`."""
    for file in HEAD_FILES:
        if (checkpoint / file).is_file():
            shutil.copyfile(checkpoint / file, aside / file)


def read_card_of(checkpoint: Path) -> dict:
    """read_card; where a run's folder is given, its error names the checkpoints inside."""
    try:
        return read_card(checkpoint)
    except FileNotFoundError as error:
        inside = []
        for path in sorted(checkpoint.glob(f"*/{CARD}")):
            if not path.parent.name.startswith("."):
                inside.append(path.parent.name)
        hint = f"; in it are {', '.join(inside[:8])}" if inside else ""
        raise FileNotFoundError(f"--checkpoint: {error}{hint}") from None


def check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    """Raises ValueError where the output would destroy something."""
    here, there = output.resolve(), checkpoint.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"--output {output} and --checkpoint {checkpoint} lie in one another; "
            "name another folder"
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if is_free(output):
        return
    if not (output / CARD).is_file() or (output / "trainer").exists():
        raise ValueError(
            f"--output {output} holds other things than an exported predictor; name another folder"
        )
    if not overwrite:
        raise ValueError(
            f"--output {output} holds a predictor already: "
            "replace it with --overwrite, or name another folder"
        )


def export_encoder(
    backbone: EncoderBackbone, checkpoint: Path, aside: Path, onnx: bool, int8: bool
) -> dict:
    """Write the encoder and its tokenizer into `aside`; returns their part of the card."""
    import torch

    model, tokenizer = backbone.load_served(checkpoint, torch.float32)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"--checkpoint {checkpoint}: its tokenizer is no fast one, "
            f"which serving needs ({TOKENIZER_FILE})"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.save(str(aside / TOKENIZER_FILE))
    if not onnx:
        model.save_pretrained(str(aside))  # an adapter is merged by now
        tokenizer.save_pretrained(str(aside))
        return {"weights": "safetensors"}
    return export_checked_onnx(backbone, model.eval(), tokenizer, aside, checkpoint, int8)


def export_checked_onnx(
    backbone: EncoderBackbone,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    aside: Path,
    checkpoint: Path,
    int8: bool,
) -> dict:
    """Write an ONNX model, beside its tokenizer, and compare it with torch on PROBES.

    Returns:
        Its part of the card.
    Raises:
        ValueError: ids or vectors differ from those of the checkpoint.
    """
    rows = [backbone.encode(tokenizer, prompt) for prompt in PROBES]
    wanted = encode_all(backbone, model, tokenizer, rows)
    export_onnx(backbone, model, aside / ONNX_FILE)
    served = OnnxVectors(aside, backbone.max_src_len)
    if list(map(served.ids, PROBES)) != rows:
        raise ValueError(
            f"{aside / TOKENIZER_FILE} gives other ids than the tokenizer of {checkpoint}"
        )
    difference = float(np.abs(served(PROBES) - wanted).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise ValueError(
            f"the ONNX model's vectors differ from torch's by {difference:.1e} "
            f"(allowed {TOLERANCE:.0e}); nothing was written"
        )
    made = {"weights": "onnx", "onnx_difference": difference}
    if int8:
        quantise(aside / ONNX_FILE)
        cosine = mean_cosine(OnnxVectors(aside, backbone.max_src_len)(PROBES), wanted)
        if not cosine >= INT8_COSINE:
            raise ValueError(
                f"--int8: vectors are only {cosine:.3f} like the exact ones "
                f"(cosine; wanted {INT8_COSINE}); leave it out"
            )
        made |= {"weights": "onnx int8", "int8_cosine": cosine}
    return made


def mean_cosine(vectors: np.ndarray, wanted: np.ndarray) -> float:
    """The mean cosine similarity of rows (N, D) with those of `wanted` (N, D)."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((vectors * wanted).sum(axis=1) / norms).mean())


def export_onnx(backbone: EncoderBackbone, model: "PreTrainedModel", file: Path) -> None:
    """Write an ONNX model: ids and mask (B, T) -> vectors (B, width), any B and T.

    Raises:
        ValueError: the packages of the onnx extra are missing.
    """
    import torch

    check_onnx_packages()

    class Vectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return backbone.vectors(
                self.model, {"input_ids": input_ids, "attention_mask": attention_mask}
            )

    # Plain matrix products, whether or not the exporter supports fused attention.
    model.set_attn_implementation("eager")
    ids = torch.ones((2, 12), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch = torch.export.Dim("batch", max=4096)
    tokens = torch.export.Dim("tokens", max=max(16, backbone.max_src_len))
    names = ["input_ids", "attention_mask"]
    shape = {0: batch, 1: tokens}
    with quiet_exporter():
        torch.onnx.export(
            Vectors().eval(),
            (ids, mask),
            str(file),
            input_names=names,
            output_names=["vectors"],
            dynamic_shapes=dict.fromkeys(names, shape),
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=18,
        )


def check_onnx_packages() -> None:
    """Raises ValueError where a package of the onnx extra is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--onnx needs {error.name}: pip install -e '.[onnx]' (or --onnx False)"
        ) from None


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without warnings, and without torch.onnx's about operators of packages not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def export_chatglm(
    backbone: ChatGLMBackbone, checkpoint: Path, aside: Path, base: str | None, merge: bool
) -> dict:
    """Write the ChatGLM's files into `aside`; returns what changes in the card.

    That is the base's name and fingerprint, None where the folder needs no base.

    Raises:
        ValueError: the merged model's vectors differ.
    """
    from chatglm.loading import named_base
    from finetune.checkpoint import read_manifest

    has_weights, is_whole = backbone.has_weights(checkpoint), backbone.is_whole(checkpoint)
    trained_on = (read_manifest(checkpoint) or {}).get("base_model", {})
    base = None if is_whole else base or trained_on.get("name_or_path") or named_base(checkpoint)
    base = base and str(Path(base).resolve())
    if merge and not is_whole:
        merge_into(backbone, checkpoint, aside, base)
        base, has_weights = None, False
    tokenizer = backbone.tokenizer_of(checkpoint, base)
    if has_weights or merge:
        tokenizer.save_pretrained(str(aside))
    if has_weights:
        copy_weights(checkpoint, aside)
    return {"base_model": base, "base_fingerprint": trained_on.get("fingerprint") if base else None}


def copy_weights(checkpoint: Path, aside: Path) -> None:
    """Copy a checkpoint's adapter, or else its model, into `aside`."""
    patterns = ["config.json", "model*.safetensors", "model*.index.json"]
    if (checkpoint / "adapter_config.json").is_file():
        patterns = ["adapter_config.json", "adapter_model.safetensors"]
    for pattern in patterns:
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, aside / file.name)


def merge_into(backbone: ChatGLMBackbone, checkpoint: Path, aside: Path, base: str | None) -> None:
    """Write one whole model into `aside`, in the base's precision."""
    import torch

    from chatglm.loading import iterate_weights

    base = find_base_model(checkpoint, base, None)
    model, tokenizer = backbone.load_served(checkpoint, torch.float32, base_model=base)
    rows = [backbone.encode(tokenizer, prompt) for prompt in PROBES]
    before = encode_all(backbone, model.eval(), tokenizer, rows)
    merged: Any = model  # peft's attributes are untyped
    if hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
    difference = float(np.abs(encode_all(backbone, merged, tokenizer, rows) - before).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(before).max())):
        raise ValueError(
            f"--merge: the merged model's vectors differ from the adapted one's by "
            f"{difference:.1e}; nothing was written"
        )
    _, first = next(iterate_weights(base))
    merged.to(first.dtype).save_pretrained(str(aside), max_shard_size="2GB")
    (aside / "generation_config.json").unlink(missing_ok=True)


def write_export_card(
    aside: Path, card: dict, checkpoint: Path, *, exact: bool, compare: bool
) -> None:
    """Write the card with the sums of all files.

    With `compare`, load the folder and compare it with the checkpoint.

    Raises:
        ValueError: its predictions differ, where they should be exact.
    """
    for key in [key for key, value in card.items() if value is None]:
        del card[key]
    files = {}
    for path in sorted(aside.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    card["export"]["files"] = files
    write_card(aside, card)
    if card["backbone"]["name"] == "states":
        Rereader.from_pretrained(aside)  # raises where a file is not whole
        return
    if not compare:
        return
    before = LengthPredictor.from_pretrained(checkpoint).predict(PROBES)
    after = LengthPredictor.from_pretrained(aside).predict(PROBES)
    differences = []
    for old, new in zip(before, after):
        differences.append(np.abs(old.cumulative - new.cumulative).max())
    moved = float(np.max(differences))
    if exact and not moved <= 1e-3:
        raise ValueError(
            f"the exported predictor's probabilities differ by {moved:.1e} "
            f"from those of {checkpoint}; nothing was written"
        )
    card["export"]["probabilities_moved"] = moved
    write_card(aside, card)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="predictor.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="what train.py --task predictor wrote: epoch-E-step-S, or a frozen backbone's folder",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    add_yes_no(
        parser,
        "--onnx",
        None,
        "encoders: an ONNX model instead of torch's weights; serves without torch [True]",
    )
    add_yes_no(
        parser,
        "--int8",
        False,
        "encoders: 8-bit products, about twice as fast and a quarter the size [False]",
    )
    add_yes_no(
        parser,
        "--merge",
        False,
        "ChatGLM: one whole model instead of an adapter or prefix and its base [False]",
    )
    add_yes_no(parser, "--overwrite", False, "replace an earlier export in --output [False]")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)

    def work() -> None:
        card = export_predictor(
            Path(args.checkpoint),
            Path(args.output),
            onnx=args.onnx,
            int8=args.int8,
            merge=args.merge,
            overwrite=args.overwrite,
        )
        print_export(card, args.output)

    return run_command(parser.prog, work)


def print_export(card: dict, output: str) -> None:
    """Print what was written to `output`, from its card."""
    made = card["export"]
    size = 0
    for file in made["files"].values():
        size += file["bytes"]
    words = [f"{card['backbone']['name']}", f"{size / 1e6:.1f} MB"]
    for key, value in made.items():
        if key in ("files", "made_of"):
            continue
        words.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    print(f"exported to {output}: {', '.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
