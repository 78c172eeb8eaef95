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
from typing import TYPE_CHECKING

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from chatglm.commands import Parser, run_command
from finetune.config import parse_bool
from finetune.files import put_in_place, sha256, writing
from predictor.backbones import BACKBONES, ChatGLM, Encoder
from predictor.decoder import CARD, read_card, write_card
from predictor.kernel import FILE as KERNEL_FILE
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.runtime import LengthPredictor
from predictor.scorers import HEAD_FILE, ONNX_FILE, TOKENIZER_FILE, OnnxVectors, encode_all

if TYPE_CHECKING:
    from onnx import NodeProto
    from transformers import PreTrainedModel

OURS = (HEAD_FILE, KERNEL_FILE, LEXICAL_FILE)
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


def export(
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
    name = card["backbone"]["name"]
    onnx = name == "encoder" if onnx is None else onnx
    check_options(checkpoint, name, onnx=onnx, int8=int8, merge=merge)
    check_output(checkpoint, output, overwrite)

    aside = make_aside(output)
    try:
        for file in OURS:
            if (checkpoint / file).is_file():
                with writing(output):
                    shutil.copyfile(checkpoint / file, aside / file)
        for key in ("format", "format_version", "export"):
            card.pop(key, None)
        knobs = dict(card["backbone"])
        backbone = BACKBONES[knobs.pop("name")](**knobs)
        made = {"made_of": str(checkpoint.resolve())}
        if name == "encoder":
            made |= export_encoder(backbone, checkpoint, aside, onnx, int8)
        elif name == "chatglm":
            card |= export_chatglm(backbone, checkpoint, aside, card.get("base_model"), merge)
        finish(aside, card | {"export": made}, checkpoint, exact=not int8, again=name != "chatglm")
        put_in_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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


def make_aside(output: Path) -> Path:
    """An empty folder beside the output. Raises OSError."""
    aside = output.with_name(f".{output.name}.tmp")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    return aside


def read_card_of(checkpoint: Path) -> dict:
    """read_card; where a run's folder is given, its error names the checkpoints inside."""
    try:
        return read_card(checkpoint)
    except FileNotFoundError as error:
        inside = [path.parent.name for path in checkpoint.glob(f"*/{CARD}")]
        inside = sorted(name for name in inside if not name.startswith("."))
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
    if not output.exists() or not any(output.iterdir()):
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
    backbone: Encoder, checkpoint: Path, aside: Path, onnx: bool, int8: bool
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
    model = model.eval()
    rows = [backbone.encode(tokenizer, prompt) for prompt in PROBES]
    wanted = encode_all(backbone, model, tokenizer, rows)
    export_onnx(backbone, model, aside / ONNX_FILE)
    served = OnnxVectors(aside, backbone.max_src_len)
    if any(served.ids(prompt) != row for prompt, row in zip(PROBES, rows)):
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
        vectors = OnnxVectors(aside, backbone.max_src_len)(PROBES)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine = (vectors * wanted).sum(axis=1) / norms
        if not cosine.mean() >= INT8_COSINE:
            raise ValueError(
                f"--int8: vectors are only {cosine.mean():.3f} like the exact ones "
                f"(cosine; wanted {INT8_COSINE}); leave it out"
            )
        made |= {"weights": "onnx int8", "int8_cosine": float(cosine.mean())}
    return made


def export_onnx(backbone: Encoder, model: "PreTrainedModel", file: Path) -> None:
    """Write an ONNX model: ids and mask (B, T) -> vectors (B, width), any B and T.

    Raises:
        ValueError: the packages of the onnx extra are missing.
    """
    import torch

    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--onnx needs {error.name}: pip install 'glm-foundry[onnx]' (or --onnx False)"
        ) from None

    class Vectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
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
    with quiet_exporter():
        torch.onnx.export(
            Vectors().eval(),
            (ids, mask),
            str(file),
            input_names=names,
            output_names=["vectors"],
            dynamic_shapes={name: {0: batch, 1: tokens} for name in names},
            dynamo=True,
            external_data=False,
            verbose=False,
            opset_version=18,
        )


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


def quantise(file: Path) -> None:
    """Rewrite an ONNX model's matrix products with weights, and large embeddings, to 8 bits.

    A weight has one scale for each output, an activation one for each token (as in LLM.int8, arXiv
    2208.07339): a token's outputs depend on nothing else in the batch, and a large value reduces
    only its own token's precision. onnxruntime's quantize_dynamic has one scale for a whole batch,
    so that a prompt's vector would depend on its neighbours.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(file))
    graph = model.graph
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
    }
    nodes, constants, quantised, used = [], [], {}, set()

    def constant(name: str, value) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(op: str, inputs: list[str], output: str, **attributes) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    one = constant("q8.one", np.float32(1))
    last = constant("q8.last", np.array([1], np.int64))
    step = constant("q8.step", np.float32(1 / 127))
    least = constant("q8.least", np.float32(1e-12))
    flat = constant("q8.flat", np.array([-1], np.int64))
    zero = constant("q8.zero", np.uint8(128))
    zeros = constant("q8.zeros", np.array([128], np.uint8))

    def quantise_tokens(x: str, width: int) -> tuple[str, str, str]:
        """(uint8 (tokens, width), scales (tokens, 1), shape of x without its last axis)."""
        if x not in quantised:
            k = f"{x}.q8"
            shape = constant(f"{k}.rows.shape", np.array([-1, width], np.int64))
            rows = add("Reshape", [x, shape], f"{k}.rows")
            size = add("Abs", [rows], f"{k}.size")
            largest = add("ReduceMax", [size, last], f"{k}.largest", keepdims=1)
            scaled = add("Mul", [largest, step], f"{k}.scaled")
            scale = add("Max", [scaled, least], f"{k}.scale")
            scales = add("Reshape", [scale, flat], f"{k}.scales")
            count = add("Shape", [scales], f"{k}.count")
            middle = add("Expand", [zeros, count], f"{k}.middle")
            integers = add("QuantizeLinear", [rows, scales, middle], f"{k}.integers", axis=0)
            quantised[x] = integers, scale, add("Shape", [x], f"{k}.outer", end=-1)
        return quantised[x]

    def eight_bits(name: str, axis: int) -> tuple[str, str]:
        """(int8 weight, its scales), one scale for each slice along the other axis.

        Made once where a weight is used twice.
        """
        key = f"{name}.q8.{axis}"
        if key not in used:
            value = numpy_helper.to_array(weights[name])
            scale = np.abs(value).max(axis=axis, keepdims=True) / 127
            scale = np.maximum(scale, 1e-12).astype(np.float32)
            constant(key, np.round(value / scale).astype(np.int8))
            constant(f"{key}.scale", scale.reshape(-1) if axis == 0 else scale)
            used.add(key)
        return key, f"{key}.scale"

    def quantise_product(node: "NodeProto") -> None:
        out, (x, name) = node.output[0], node.input
        width, columns = weights[name].dims
        integers, scale, outer = quantise_tokens(x, width)
        weight, scales = eight_bits(name, 0)
        product = add(
            "MatMulIntegerToFloat",
            [integers, weight, one, scales, zero],
            f"{out}.q8.product",
            domain="com.microsoft",
        )
        product = add("Mul", [product, scale], f"{out}.q8.scaled")
        end = constant(f"{out}.q8.columns", np.array([columns], np.int64))
        shape = add("Concat", [outer, end], f"{out}.q8.shape", axis=0)
        add("Reshape", [product, shape], out)

    def quantise_embedding(node: "NodeProto") -> None:
        out, (name, ids) = node.output[0], node.input
        table, scales = eight_bits(name, 1)
        row = add("Gather", [table, ids], f"{out}.q8.row")
        row = add("Cast", [row], f"{out}.q8.float", to=TensorProto.FLOAT)
        scale = add("Gather", [scales, ids], f"{out}.q8.scale")
        add("Mul", [row, scale], out)

    def is_large_embedding(node: "NodeProto") -> bool:
        if node.op_type != "Gather" or node.input[0] not in weights:
            return False
        return weights[node.input[0]].dims[0] > 1000

    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            quantise_product(node)
        elif is_large_embedding(node):
            quantise_embedding(node)
        else:
            nodes.append(node)
    wanted = set()
    for node in nodes:
        wanted.update(node.input)
    tensors = [tensor for tensor in [*graph.initializer, *constants] if tensor.name in wanted]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(file))


def export_chatglm(
    backbone: ChatGLM, checkpoint: Path, aside: Path, base: str | None, merge: bool
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
    patterns = ("config.json", "model*.safetensors", "model*.index.json")
    if (checkpoint / "adapter_config.json").is_file():
        patterns = ("adapter_config.json", "adapter_model.safetensors")
    for pattern in patterns:
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, aside / file.name)


def merge_into(backbone: ChatGLM, checkpoint: Path, aside: Path, base: str | None) -> None:
    """Write one whole model into `aside`, in the base's precision."""
    import torch

    from chatglm.loading import iterate_weights

    model, tokenizer = backbone.load_served(checkpoint, torch.float32, base_model=base)
    rows = [backbone.encode(tokenizer, prompt) for prompt in PROBES]
    before = encode_all(backbone, model.eval(), tokenizer, rows)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    difference = float(np.abs(encode_all(backbone, model, tokenizer, rows) - before).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(before).max())):
        raise ValueError(
            f"--merge: the merged model's vectors differ from the adapted one's by "
            f"{difference:.1e}; nothing was written"
        )
    dtype = next(tensor.dtype for _, tensor in iterate_weights(base))
    model.to(dtype).save_pretrained(str(aside), max_shard_size="2GB")
    (aside / "generation_config.json").unlink(missing_ok=True)


def finish(aside: Path, card: dict, checkpoint: Path, *, exact: bool, again: bool) -> None:
    """Write the card with the sums of all files.

    With `again`, load the folder and compare it with the checkpoint.

    Raises:
        ValueError: its predictions differ, where they should be exact.
    """
    card = {key: value for key, value in card.items() if value is not None}
    files = {}
    for path in sorted(aside.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    card["export"]["files"] = files
    write_card(aside, card)
    if not again:
        return
    before = LengthPredictor.from_pretrained(checkpoint).predict(PROBES)
    after = LengthPredictor.from_pretrained(aside).predict(PROBES)
    moved = [np.abs(a.cumulative - b.cumulative).max() for a, b in zip(before, after)]
    if exact and not max(moved) <= 1e-3:
        raise ValueError(
            f"the exported predictor's probabilities differ by {max(moved):.1e} "
            f"from those of {checkpoint}; nothing was written"
        )
    card["export"]["probabilities_moved"] = float(max(moved))
    write_card(aside, card)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="predictor.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    yes_no = {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="what train.py --task predictor wrote: epoch-E-step-S, or a frozen backbone's folder",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--onnx",
        **yes_no,
        help="encoders: an ONNX model instead of torch's weights; serves without torch [True]",
    )
    parser.add_argument(
        "--int8",
        **yes_no,
        default=False,
        help="encoders: 8-bit products, about twice as fast and a quarter the size [False]",
    )
    parser.add_argument(
        "--merge",
        **yes_no,
        default=False,
        help="ChatGLM: one whole model instead of an adapter or prefix and its base [False]",
    )
    parser.add_argument(
        "--overwrite", **yes_no, default=False, help="replace an earlier export in --output [False]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    return run_command(parser.prog, lambda: run(**args))


def run(checkpoint: str, output: str, **choices: bool | None) -> None:
    """Export, and print what was written; `choices` as `export` takes them."""
    card = export(Path(checkpoint), Path(output), **choices)
    made = card["export"]
    size = sum(file["bytes"] for file in made["files"].values())
    words = [f"{card['backbone']['name']}", f"{size / 1e6:.1f} MB"]
    for key, value in made.items():
        if key in ("files", "made_of"):
            continue
        words.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    print(f"exported to {output}: {', '.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
