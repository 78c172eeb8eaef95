"""Answers of a tuned model, to one prompt, to a file in batches, or line by line.

Prompts are encoded as in training.

python -m finetune.predict --model_path output-glm2-lora/epoch-2-step-180 --prompt TEXT
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.checksums import add_verify_flag
from chatglm.commands import Parser, run_command
from chatglm.families import FAMILIES, family_of
from chatglm.files import read_json, shorten
from chatglm.hub import resolve_folder
from chatglm.raw_prompts import PROMPT_STYLES
from chatglm.runs import check_not_run
from finetune.config import PRECISIONS, parse_bool, parse_positive
from finetune.conversing import converse
from finetune.flag_effects import PREDICTING, check_given
from finetune.out_of_memory import explained, inference_advice
from finetune.rows.formats import FORMATS, Row, parse_columns
from finetune.rows.sources import RowReader, read_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer


@dataclass(frozen=True)
class RowReadingFlags:
    """The flags of `add_row_flags`."""

    prompt_text: str
    data_format: str
    columns: str


@dataclass(frozen=True)
class InferenceFlags:
    """The flags of `add_model_flags`."""

    model_path: str
    base_model: str | None
    mode: str | None
    prompt_style: str | None
    device: str
    precision: str
    quantization_bit: int | None
    keep_quantized: bool
    verify: str
    max_src_len: int | None
    max_new_tokens: int | None
    max_length: int
    batch_size: int
    do_sample: bool | None
    top_p: float
    temperature: float
    seed: int


@dataclass(frozen=True)
class PredictionFlags(InferenceFlags, RowReadingFlags):
    """The flags of `python -m finetune.predict`."""

    prompt: str | None
    file: str | None
    interactive: bool
    output: str | None


def generate_answers(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", prompts: list[str], **options: Any
) -> list[str]:
    """Answers in the order of `prompts`; `options` are `answers_by_batch`'s."""
    answers = [""] * len(prompts)
    for batch in answers_by_batch(model, tokenizer, prompts, **options):
        for i, answer in batch.items():
            answers[i] = answer
    return answers


def answers_by_batch(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    prompts: list[str],
    *,
    batch_size: int = 8,
    max_src_len: int = 1024,
    progress: bool = False,
    synced: bool = False,
    done: Collection[int] = (),
    seed: int | None = None,
    **options: Any,
) -> Iterator[dict[int, str]]:
    """{number of a prompt: its answer} of one left-padded batch after the other.

    The longest prompts come first.

    Args:
        max_src_len: longest prompt in tokens; use training's, so that prompts are truncated as
            they were there.
        synced: ZeRO-3: every rank keeps stepping until the slowest one has finished.
        done: numbers of prompts that have an answer already. A batch of only such prompts is left
            out; this does not change the other batches.
        seed: set anew for each batch, so that sampled answers do not depend on `done`.
        options: generate()'s, e.g. max_new_tokens, do_sample, top_p.
    """
    import torch
    from tqdm import tqdm

    family = family_of(tokenizer)
    encoded = [family.encode_prompt(tokenizer, prompt, max_src_len).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    if synced:
        options["synced_gpus"] = True
    answered = set(done)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="answering", unit="batch", disable=not progress):
        numbers = order[start : start + batch_size]
        if answered.issuperset(numbers):
            continue
        if seed is not None:
            torch.manual_seed(seed + start)
        generated = generate_batch(model, tokenizer, [encoded[i] for i in numbers], **options)
        batch: dict[int, str] = {}
        for i, (ids, _) in zip(numbers, generated):
            batch[i] = decoded_text(tokenizer, ids)
        yield batch


def decoded_text(tokenizer: "FamilyTokenizer", ids: list[int]) -> str:
    """The text of an answer's ids, without control tokens and what a chat template writes first."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    header = tokenizer.answer_header_text
    return text.removeprefix(header) if header.strip() else text


def generate_batch(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    encoded: list[list[int]],
    **options: Any,
) -> list[tuple[list[int], bool]]:
    """(ids of the answer without the end token, whether an end token came) of each encoded prompt.

    The prompts are padded on the left. `options` are generate()'s; without do_sample decoding is
    greedy.
    """
    import torch

    from chatglm.loading import stop_ids

    options = {
        "do_sample": False,
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    } | options
    if not options["do_sample"]:
        options |= {"top_p": None, "top_k": None, "temperature": None}
    longest = max(map(len, encoded))
    ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(encoded):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        generate: Any = model.generate
        out = generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options
        )
    answers = []
    for row in out.tolist():
        generated = row[longest:]
        answer = cut_at_stop(generated, options["eos_token_id"])
        answers.append((answer, len(answer) < len(generated)))
    return answers


def cut_at_stop(ids: list[int], stops: list[int]) -> list[int]:
    """The ids before the first end token; all where there is none."""
    for i, token in enumerate(ids):
        if token in stops:
            return ids[:i]
    return ids


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that answers with a model."""
    parser.add_argument("--model_path", required=True, help="a model, adapter or prefix folder")
    add_loading_flags(parser)
    parser.add_argument(
        "--quantization_bit",
        type=int,
        choices=(4, 8),
        help="hold the frozen linear layers in so many bits, as QLoRA trains over them",
    )
    add_packing_flag(parser)
    add_verify_flag(parser, "fast")
    add_length_flags(parser)
    parser.add_argument(
        "--batch_size", type=parse_positive, default=8, help="prompts answered together [8]"
    )
    add_sampling_flags(parser)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads a model, beside the one that names its folder."""
    parser.add_argument(
        "--base_model", help="base of an adapter or prefix folder (default: the one it names)"
    )
    parser.add_argument(
        "--mode", choices=tuple(FAMILIES), help="family (default: found in the folder)"
    )
    parser.add_argument(
        "--prompt_style",
        choices=PROMPT_STYLES,
        help="chat: the family's prompts; raw: the text alone [as it was trained, else chat]",
    )
    parser.add_argument("--device", default="0", help='GPU number, "cpu" or a torch device [0]')
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the weights [auto]"
    )


def add_packing_flag(parser: argparse.ArgumentParser) -> None:
    """Whether a published int8 or int4 release stays packed."""
    parser.add_argument(
        "--keep_quantized",
        action="store_true",
        help="leave a published int8 or int4 model packed: less memory, slower [dequantised]",
    )


def add_length_flags(parser: argparse.ArgumentParser) -> None:
    """The limits of a prompt and of an answer, in tokens."""
    parser.add_argument(
        "--max_src_len",
        type=parse_positive,
        help="longest prompt in tokens (default: training's, else 1024)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=parse_positive,
        help="longest answer in tokens (default: max_length less the prompt)",
    )
    parser.add_argument(
        "--max_length",
        type=parse_positive,
        default=2048,
        help="longest prompt and answer in tokens [2048]",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Whether and how answers are sampled."""
    parser.add_argument(
        "--do_sample",
        type=parse_bool,
        nargs="?",
        const=True,
        metavar="True|False",
        help="sample instead of taking the likeliest token",
    )
    parser.add_argument("--top_p", type=float, default=0.8, help="with sampling: nucleus [0.8]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="with sampling: temperature [0.8]"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of sampling [1234]")


def add_row_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how rows of a file are read; `reader_of` takes them."""
    parser.add_argument(
        "--prompt_text",
        default="",
        help="instruction put before rows of the old form {text, answer}",
    )
    parser.add_argument(
        "--data_format",
        choices=("auto", *FORMATS),
        default="auto",
        help="of the rows [auto: found from their keys]",
    )
    parser.add_argument(
        "--columns",
        default="",
        help='our names for the rows\' columns: "prompt=question,response=answer"',
    )


def reader_of(flags: RowReadingFlags) -> RowReader:
    """The reader that the flags describe; raises ValueError."""
    return RowReader(flags.prompt_text, flags.data_format, parse_columns(flags.columns))


def load_for_inference(
    flags: InferenceFlags,
) -> tuple["PreTrainedModel", "FamilyTokenizer", int, dict[str, Any]]:
    """(model on its device, tokenizer, max_src_len, generate()'s options)."""
    from chatglm import load_tokenizer

    check_not_run(flags.model_path, "--model_path")
    folder = resolve_folder(flags.model_path, weights=True)
    tokenizer = load_tokenizer(
        folder,
        mode=flags.mode,
        base=flags.base_model,
        prompt_style=flags.prompt_style,
        verify=flags.verify,
    )
    model = load_ready(
        folder,
        mode=flags.mode,
        base=flags.base_model,
        device=flags.device,
        precision=flags.precision,
        quantization_bit=flags.quantization_bit,
        keep_quantized=flags.keep_quantized,
        verify=flags.verify,
    )
    train_config = folder / "train_config.json"
    max_src_len = flags.max_src_len or trained_length(train_config) or 1024
    options: dict[str, Any] = {}
    if flags.max_new_tokens:
        options["max_new_tokens"] = flags.max_new_tokens
    else:
        options["max_length"] = flags.max_length
    options["do_sample"] = bool(flags.do_sample)
    if flags.do_sample:
        options |= {"top_p": flags.top_p, "temperature": flags.temperature}
    return model, tokenizer, max_src_len, options


def trained_length(config: Path) -> int | None:
    """--max_src_len of training, from a checkpoint's train_config.json; None without that file."""
    if not config.is_file():
        return None
    value = read_json(config).get("max_src_len")
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{config}: max_src_len must be a whole number above 0, got {shorten(value)}; "
            "say --max_src_len"
        )
    return value


def load_ready(
    path: str | Path,
    *,
    mode: str | None = None,
    base: str | None = None,
    device: str = "0",
    precision: str = "auto",
    quantization_bit: int | None = None,
    keep_quantized: bool = False,
    verify: str | None = None,
) -> "PreTrainedModel":
    """A model on its device, ready for inference.

    The arguments are the values of the flags of `add_model_flags`. On a CPU the precision "auto" is
    fp32.
    """
    from chatglm import load_model
    from finetune.distributed import DTYPES, resolve_precision

    device = pick_device(device)
    if precision == "auto" and device == "cpu":
        dtype = DTYPES["fp32"]
    else:
        dtype = DTYPES[resolve_precision(precision)]
    if quantization_bit:
        # Quantised weights cannot be moved, so they are loaded onto the device.
        return load_model(
            path,
            mode=mode,
            dtype=dtype,
            base=base,
            quantization_bit=quantization_bit,
            device_map={"": device},
            verify=verify,
        ).eval()
    model = load_model(
        path, mode=mode, dtype=dtype, base=base, keep_quantized=keep_quantized, verify=verify
    )
    return model.to(device).eval()


def pick_device(name: str) -> str:
    """The torch device of --device; a GPU number means the CPU on a machine without GPUs.

    Raises ValueError where there is no such device.
    """
    import torch

    if name.isdigit():
        count = torch.cuda.device_count()
        if count and int(name) >= count:
            raise ValueError(f"--device: there is no GPU {name} here, only 0 to {count - 1}")
        return f"cuda:{name}" if count else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device: there is no {name!r} here") from None
    return name


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="answer this prompt (instruction and input together)")
    what.add_argument(
        "--file",
        help="answer every row of these files (a comma list, as --train_path takes), "
        "each a single question",
    )
    what.add_argument(
        "--interactive",
        action="store_true",
        help="a conversation, as python -m serving.chat has it; of a pipe, each line by itself",
    )
    parser.add_argument(
        "--output",
        help="with --file: JSON lines of {prompt, answer, reference} (default: standard output)",
    )
    add_row_flags(parser)
    return parser


def answer_with_advice(flags: PredictionFlags) -> int:
    """Raises ValueError, OSError; MemoryError that says what would make it fit."""
    with explained(
        lambda: inference_advice(flags.model_path, flags.batch_size, flags.quantization_bit)
    ):
        return answer(flags)


def answer(flags: PredictionFlags) -> int:
    """Answer what the flags ask for: a file's rows, lines of the standard input, or a prompt."""
    rows = read_questions(flags.file, "--file", reader_of(flags)) if flags.file else []
    model, tokenizer, max_src_len, options = load_for_inference(flags)
    options |= {"batch_size": flags.batch_size, "max_src_len": max_src_len}
    # The seed is set at each batch: random numbers drawn while loading, such as an adapter's
    # initial weights, change no answer.
    options["seed"] = flags.seed
    if flags.file:
        prompts = [row.prompt for row in rows]
        answers = generate_answers(model, tokenizer, prompts, progress=True, **options)
        write_answers(rows, answers, flags.output)
    elif flags.interactive and sys.stdin.isatty():
        converse(model, tokenizer, options)
    elif flags.interactive:
        answer_lines(model, tokenizer, options)
    else:
        print(generate_answers(model, tokenizer, [flags.prompt or ""], **options)[0])
    return 0


def write_answers(rows: list[Row], answers: list[str], output: str | None) -> None:
    """Write JSON lines of {prompt, answer, reference} to a file, else to the standard output."""
    lines = []
    for row, text in zip(rows, answers):
        entry = {"prompt": row.prompt, "answer": text, "reference": list(row.answers)}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    if not output:
        sys.stdout.write("".join(lines))
        return
    from finetune.files import write_aside

    write_aside(Path(output), "".join(lines))
    print(f"{len(rows)} answers written to {output}")


def answer_lines(
    model: "PreTrainedModel", tokenizer: "FamilyTokenizer", options: dict[str, Any]
) -> None:
    """Answer the lines of a pipe, each by itself, until its end or Ctrl-C."""
    seed = options["seed"]
    while True:
        try:
            line = input()
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip():
            ask = options | {"seed": seed}
            print(generate_answers(model, tokenizer, [line], **ask)[0], flush=True)
            seed += 1  # so that the same question may get another answer


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_given(parser, vars(args), PREDICTING)
    if not (args.prompt or args.file or args.interactive):
        parser.error("say what to answer: --prompt TEXT, --file FILE or --interactive")
    flags = PredictionFlags(**vars(args))
    return run_command(parser.prog, lambda: answer_with_advice(flags))


if __name__ == "__main__":
    sys.exit(main())
