"""A ChatGLM model as transformers' own GLM, and back, or as a GGUF file for llama.cpp:
python -m chatglm.export MODEL --to glm|chatglm|gguf --output FOLDER (or FILE.gguf).

--to glm writes ChatGLM2, ChatGLM3 and GLM-4 as a folder of GlmForCausalLM with tokenizer.json and
a chat template, which transformers opens without this project and without trust_remote_code. An
adapter is folded into its model, or with --keep_adapter converted beside it; int4 and int8 releases
are dequantised. --to chatglm goes back, weights bit for bit. --to gguf writes ChatGLM2, ChatGLM3
and GLM-4 with their vocabulary and chat template as one file, matrices as --type says.
"""

import argparse
from pathlib import Path

from ..checksums import add_verify_flag
from ..commands import Parser, run_command
from ..families import CHATGLM_FAMILIES

TARGETS = ("glm", "chatglm", "gguf")
GGUF_KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="chatglm.export", description=__doc__)
    parser.add_argument("model", help="a model's or an adapter's folder, or a hub's name")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the layout to write")
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder or the file to write"
    )
    parser.add_argument(
        "--base", help="the model of an adapter's folder (default: the one that it names)"
    )
    parser.add_argument(
        "--keep_adapter",
        action="store_true",
        help="write the adapter too, in OUTPUT/adapter (gguf: a second file), in place of folding "
        "it in",
    )
    parser.add_argument(
        "--mode", choices=CHATGLM_FAMILIES, help="family (default: found in the folder)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: their own)"
    )
    parser.add_argument(
        "--type", choices=GGUF_KINDS, help="of the matrices in a GGUF file (default: f16)"
    )
    add_verify_flag(parser, "fast")
    args = parser.parse_args(argv)
    if args.to == "chatglm" and (args.base or args.keep_adapter):
        parser.error("--base and --keep_adapter are for adapters, which --to glm|gguf export")
    if args.type is not None and args.to != "gguf":
        parser.error("--type is of --to gguf; others take --dtype")
    if args.dtype is not None and args.to == "gguf":
        parser.error("--dtype: --to gguf takes --type")

    def work() -> None:
        if args.to == "gguf":
            words = write_gguf(args)
            print(f"{args.output}: {words}")
            return
        from .folders import export_glm, restore_chatglm
        from .weights import EXPORT_DTYPES

        dtype = EXPORT_DTYPES.get(args.dtype)
        if args.to == "chatglm":
            words = restore_chatglm(
                args.model, args.output, mode=args.mode, dtype=dtype, verify=args.verify
            )
        else:
            words = export_glm(
                args.model,
                args.output,
                mode=args.mode,
                base=args.base,
                dtype=dtype,
                keep_adapter=args.keep_adapter,
                verify=args.verify,
            )
        print(f"{args.output}: {words}")

    return run_command(parser.prog, work)


def write_gguf(args: argparse.Namespace) -> str:
    """Write the file that the flags ask for; what it is, in words."""
    from .gguf_file import export_gguf

    return export_gguf(
        args.model,
        args.output,
        kind=args.type or "f16",
        mode=args.mode,
        base=args.base,
        keep_adapter=args.keep_adapter,
        verify=args.verify,
    )
