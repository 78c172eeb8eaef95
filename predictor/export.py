"""What training wrote -> one folder for serving: python -m predictor.export --checkpoint DIR --output DIR2.

A checkpoint's optimizer, flags and manifest stay behind. Of an encoder the folder holds an ONNX model, compared with torch before
it counts; of a ChatGLM its adapter, prefix or head with the base's name, or with --merge one whole model.
"""

import argparse
import logging
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np

from chatglm.checksums import check_folder_files, is_top
from finetune.commands import Parser, run_command
from finetune.config import parse_bool
from finetune.files import put_in_place, sha256, writing
from predictor.backbones import BACKBONES
from predictor.decoder import CARD, read_card, write_card
from predictor.kernel import FILE as KERNEL_FILE
from predictor.lexical import FILE as LEXICAL_FILE
from predictor.runtime import LengthPredictor
from predictor.scorers import HEAD_FILE, ONNX_FILE, TOKENIZER_FILE, OnnxVectors, encode_all

OURS = (HEAD_FILE, KERNEL_FILE, LEXICAL_FILE)
TOLERANCE = 1e-4  # between torch and what was made of it, of the largest value
INT8_COSINE = 0.98  # least mean likeness of an int8 model's vectors to the exact ones
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
        checkpoint: an epoch-E-step-S of an encoder or a ChatGLM, or the folder of a frozen backbone's predictor.
        onnx: of an encoder, None for yes.
    Raises:
        FileNotFoundError: no predictor there, or no base model.
        ValueError: options that do not fit it, an output that is in use, or a model that comes out different.
    """
    check_folder_files(checkpoint, default="full", wanted=is_top)
    card = read_card_of(checkpoint)
    name = card["backbone"]["name"]
    onnx = name == "encoder" if onnx is None else onnx
    if (onnx or int8) and name != "encoder":
        raise ValueError(
            f"--{'onnx' if onnx else 'int8'} is for encoders; {checkpoint} is of backbone {name}"
        )
    if int8 and not onnx:
        raise ValueError("--int8 needs --onnx True: what is quantised is the ONNX model")
    if merge and name != "chatglm":
        raise ValueError(
            f"--merge puts an adapter into a ChatGLM; {checkpoint} is of backbone {name}"
        )
    if (checkpoint / ONNX_FILE).is_file():
        raise ValueError(
            f"--checkpoint {checkpoint} is an ONNX export already; export what it was made of"
        )
    check_output(checkpoint, output, overwrite)

    aside = make_aside(output)
    try:
        for file in OURS:
            if (checkpoint / file).is_file():
                with writing(output):
                    shutil.copyfile(checkpoint / file, aside / file)
        card = {
            key: value
            for key, value in card.items()
            if key not in ("format", "format_version", "export")
        }
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


def make_aside(output: Path) -> Path:
    """An empty folder beside the output. Raises OSError."""
    aside = output.with_name(f".{output.name}.tmp")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    return aside


def read_card_of(checkpoint: Path) -> dict:
    """read_card, with a hint where a run's folder is given for one of its checkpoints."""
    try:
        return read_card(checkpoint)
    except FileNotFoundError as error:
        inside = sorted(
            p.parent.name for p in checkpoint.glob(f"*/{CARD}") if not p.parent.name.startswith(".")
        )
        raise FileNotFoundError(
            f"--checkpoint: {error}" + (f"; in it are {', '.join(inside[:8])}" if inside else "")
        ) from None


def check_output(checkpoint: Path, output: Path, overwrite: bool):
    """Raises ValueError where the output would destroy something."""
    here, there = output.resolve(), checkpoint.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"--output {output} and --checkpoint {checkpoint} lie in one another; name another folder"
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
            f"--output {output} holds a predictor already: replace it with --overwrite, or name another folder"
        )


def export_encoder(backbone, checkpoint: Path, aside: Path, onnx: bool, int8: bool) -> dict:
    """The encoder and its tokenizer into `aside`; returns what the card tells of it."""
    import torch

    model, tokenizer = backbone.load_served(checkpoint, torch.float32)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"--checkpoint {checkpoint}: its tokenizer is no fast one, which serving needs ({TOKENIZER_FILE})"
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
            f"the ONNX model's vectors differ from torch's by {difference:.1e} (allowed {TOLERANCE:.0e}); nothing was written"
        )
    made = {"weights": "onnx", "onnx_difference": difference}
    if int8:
        quantise(aside / ONNX_FILE)
        vectors = OnnxVectors(aside, backbone.max_src_len)(PROBES)
        cosine = (vectors * wanted).sum(axis=1) / (
            np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted, axis=1)
        )
        if not cosine.mean() >= INT8_COSINE:
            raise ValueError(
                f"--int8: vectors are only {cosine.mean():.3f} like the exact ones (cosine; wanted {INT8_COSINE}); leave it out"
            )
        made |= {"weights": "onnx int8", "int8_cosine": float(cosine.mean())}
    return made


def export_onnx(backbone, model, file: Path):
    """Ids and mask (B, T) -> vectors (B, width), any B and T.

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

    model.set_attn_implementation(
        "eager"
    )  # plain products, whatever the exporter knows of fused attention
    ids = torch.ones((2, 12), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch, tokens = (
        torch.export.Dim("batch", max=4096),
        torch.export.Dim("tokens", max=max(16, backbone.max_src_len)),
    )
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of operators of packages that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Vectors().eval(),
                (ids, mask),
                str(file),
                input_names=["input_ids", "attention_mask"],
                output_names=["vectors"],
                dynamic_shapes={
                    name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")
                },
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=18,
            )
    finally:
        log.setLevel(level)


def quantise(file: Path):
    """Rewrite an ONNX model's products with weights, and its large embeddings, for 8-bit integers.

    A weight has one scale for each output, an activation one for each token (as in LLM.int8, arXiv 2208.07339): a token's outputs
    depend on nothing else in the batch, and one large value spoils its own token's precision alone. onnxruntime's quantize_dynamic
    has one scale for all that lies in a batch, so that a prompt's vector would depend on its neighbours.
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

    one, last = constant("q8.one", np.float32(1)), constant("q8.last", np.array([1], np.int64))
    step, least = constant("q8.step", np.float32(1 / 127)), constant("q8.least", np.float32(1e-12))
    flat = constant("q8.flat", np.array([-1], np.int64))
    zero, zeros = (
        constant("q8.zero", np.uint8(128)),
        constant("q8.zeros", np.array([128], np.uint8)),
    )

    def quantise_tokens(x: str, width: int) -> tuple[str, str, str]:
        """(uint8 (tokens, width), scales (tokens, 1), shape of x without its last axis)."""
        if x not in quantised:
            k = f"{x}.q8"
            rows = add(
                "Reshape",
                [x, constant(f"{k}.rows.shape", np.array([-1, width], np.int64))],
                f"{k}.rows",
            )
            largest = add(
                "ReduceMax", [add("Abs", [rows], f"{k}.size"), last], f"{k}.largest", keepdims=1
            )
            scale = add("Max", [add("Mul", [largest, step], f"{k}.scaled"), least], f"{k}.scale")
            scales = add("Reshape", [scale, flat], f"{k}.scales")
            middle = add("Expand", [zeros, add("Shape", [scales], f"{k}.count")], f"{k}.middle")
            integers = add("QuantizeLinear", [rows, scales, middle], f"{k}.integers", axis=0)
            quantised[x] = integers, scale, add("Shape", [x], f"{k}.outer", end=-1)
        return quantised[x]

    def eight_bits(name: str, axis: int) -> tuple[str, str]:
        """(int8 weight, its scales), one scale for each slice along the other axis; made once where a weight is used twice."""
        key = f"{name}.q8.{axis}"
        if key not in used:
            value = numpy_helper.to_array(weights[name])
            scale = np.maximum(np.abs(value).max(axis=axis, keepdims=True) / 127, 1e-12).astype(
                np.float32
            )
            constant(key, np.round(value / scale).astype(np.int8))
            constant(f"{key}.scale", scale.reshape(-1) if axis == 0 else scale)
            used.add(key)
        return key, f"{key}.scale"

    for node in graph.node:
        out = node.output[0] if node.output else ""
        if node.op_type == "MatMul" and node.input[1] in weights:
            width, columns = weights[node.input[1]].dims
            integers, scale, outer = quantise_tokens(node.input[0], width)
            weight, scales = eight_bits(node.input[1], 0)
            product = add(
                "MatMulIntegerToFloat",
                [integers, weight, one, scales, zero],
                f"{out}.q8.product",
                domain="com.microsoft",
            )
            product = add("Mul", [product, scale], f"{out}.q8.scaled")
            shape = add(
                "Concat",
                [outer, constant(f"{out}.q8.columns", np.array([columns], np.int64))],
                f"{out}.q8.shape",
                axis=0,
            )
            add("Reshape", [product, shape], out)
        elif (
            node.op_type == "Gather"
            and node.input[0] in weights
            and weights[node.input[0]].dims[0] > 1000
        ):
            table, scales = eight_bits(node.input[0], 1)
            row = add(
                "Cast",
                [add("Gather", [table, node.input[1]], f"{out}.q8.row")],
                f"{out}.q8.float",
                to=TensorProto.FLOAT,
            )
            add("Mul", [row, add("Gather", [scales, node.input[1]], f"{out}.q8.scale")], out)
        else:
            nodes.append(node)
    wanted = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in [*graph.initializer, *constants] if tensor.name in wanted]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(file))


def export_chatglm(backbone, checkpoint: Path, aside: Path, base: str | None, merge: bool) -> dict:
    """What belongs to the ChatGLM into `aside`; returns what of the card changes: the base's name, none where it is merged.

    Raises:
        ValueError: the merged model's vectors are others.
    """
    from chatglm.loading import named_base
    from finetune.checkpoint import read_manifest

    own, whole = backbone.has_weights(checkpoint), backbone.is_whole(checkpoint)
    adapter = (checkpoint / "adapter_config.json").is_file()
    trained_on = (read_manifest(checkpoint) or {}).get("base_model", {})
    base = None if whole else base or trained_on.get("name_or_path") or named_base(checkpoint)
    base = base and str(Path(base).resolve())
    if merge and not whole:
        merge_into(backbone, checkpoint, aside, base)
        base, own = None, False
    tokenizer = backbone.tokenizer_of(checkpoint, base)
    if own or merge:
        tokenizer.save_pretrained(str(aside))
    if own:
        names = (
            ("adapter_config.json", "adapter_model.safetensors")
            if adapter
            else ("config.json", "model*.safetensors", "model*.index.json")
        )
        for file in [file for name in names for file in checkpoint.glob(name)]:
            shutil.copyfile(file, aside / file.name)
    return {"base_model": base, "base_fingerprint": trained_on.get("fingerprint") if base else None}


def merge_into(backbone, checkpoint: Path, aside: Path, base: str | None):
    """One whole model into `aside`, in the base's precision."""
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
            f"--merge: the merged model's vectors differ from the adapted one's by {difference:.1e}; nothing was written"
        )
    model.to(next(tensor.dtype for _, tensor in iterate_weights(base))).save_pretrained(
        str(aside), max_shard_size="2GB"
    )
    (aside / "generation_config.json").unlink(missing_ok=True)


def finish(aside: Path, card: dict, checkpoint: Path, *, exact: bool, again: bool):
    """The card with the sums of all files; and, with `again`, the folder loaded and compared with what it was made of.

    Raises:
        ValueError: its predictions are others, where they should be exact.
    """
    card = {key: value for key, value in card.items() if value is not None}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(aside.iterdir())
    }
    card["export"]["files"] = files
    write_card(aside, card)
    if not again:
        return
    before, after = (
        LengthPredictor.from_pretrained(folder).predict(PROBES) for folder in (checkpoint, aside)
    )
    moved = [np.abs(a.cumulative - b.cumulative).max() for a, b in zip(before, after)]
    if exact and not max(moved) <= 1e-3:
        raise ValueError(
            f"the exported predictor's probabilities differ by {max(moved):.1e} from those of {checkpoint}; nothing was written"
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


def run(checkpoint: str, output: str, **choices):
    card = export(Path(checkpoint), Path(output), **choices)
    made = card["export"]
    size = sum(file["bytes"] for file in made["files"].values())
    words = [f"{card['backbone']['name']}", f"{size / 1e6:.1f} MB"] + [
        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in made.items()
        if k not in ("files", "made_of")
    ]
    print(f"exported to {output}: {', '.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
