"""A ChatGLM model as transformers' own GLM, and back: python -m chatglm.export MODEL --to glm
--output FOLDER.

--to glm writes ChatGLM2, ChatGLM3 and GLM-4 as a folder of GlmForCausalLM with tokenizer.json and
a chat template, which transformers opens without this project and without trust_remote_code. An
adapter is folded into its model, or with --keep_adapter converted beside it; int4 and int8 releases
are dequantised. --to chatglm goes back, weights bit for bit.
"""

from pathlib import Path

from ..checksums import add_verify_flag
from ..commands import Parser, run_command
from ..families import CHATGLM_FAMILIES

TARGETS = ("glm", "chatglm")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="chatglm.export", description=__doc__)
    parser.add_argument("model", help="a model's or an adapter's folder, or a hub's name")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the layout to write")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--base", help="the model of an adapter's folder (default: the one that it names)"
    )
    parser.add_argument(
        "--keep_adapter",
        action="store_true",
        help="write the adapter too, in OUTPUT/adapter, in place of folding it in",
    )
    parser.add_argument(
        "--mode", choices=CHATGLM_FAMILIES, help="family (default: found in the folder)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: their own)"
    )
    add_verify_flag(parser, "fast")
    args = parser.parse_args(argv)
    if args.to == "chatglm" and (args.base or args.keep_adapter):
        parser.error("--base and --keep_adapter are for adapters, which --to glm exports")

    def work() -> None:
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
