#!/usr/bin/env python3
"""Measure how long a model's answers are: it answers prompts in batches, and every answer's length
is a line of --output.

    python scripts/collect_lengths.py --model_path DIR --prompts FILE --output lengths.jsonl

Prompts are JSON lines (also .gz) or a JSON list of {prompt}, {instruction, input} or {text}; the
same prompt is asked once.
A line has what the predictor is trained on: prompt, output_tokens (without the end token), finished
(the end token came within --max_new_tokens), served_model. The same command goes on where it was
stopped, also with more prompts or samples.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command  # noqa: E402
from chatglm.families import family_of  # noqa: E402
from finetune.config import parse_positive  # noqa: E402
from finetune.evaluation.predict import (  # noqa: E402
    InferenceFlags,
    add_model_flags,
    generate_batch,
    load_for_inference,
)
from finetune.files import writing  # noqa: E402
from finetune.rows.formats import BadRow  # noqa: E402
from finetune.rows.sources import read_json_items  # noqa: E402
from predictor.labels import parse_prompt, served_name  # noqa: E402

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

OPENING = b'{"prompt": '  # of every line written here


class Question(NamedTuple):
    """A prompt to ask: its text, its ids as the model gets them, and which sample this is."""

    prompt: str
    ids: list[int]
    sample: int


class RowDraws:
    """A logits processor after which the likeliest token is a sample, each row's from a generator
    of its own.

    The maximum of logits plus Gumbel noise is a sample of their softmax. generate() draws for a
    whole batch from one generator, so that an answer would depend on its neighbours; here it does
    only as far as padding changes rounding.

    Args:
        seeds: of each row, below 2**63.
    """

    def __init__(
        self, seeds: list[int], temperature: float, top_p: float, device: "torch.device"
    ) -> None:
        import torch
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self.warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        self.generators = []
        for seed in seeds:
            self.generators.append(torch.Generator(device).manual_seed(seed))

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min(1e-30).log()


def row_seed(seed: int, prompt: str, sample: int) -> int:
    """A sample's seed, below 2**63."""
    digest = hashlib.sha256(f"{seed} {sample} {prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_prompts(path: str, limit: int | None) -> list[str]:
    """The first `limit` distinct prompts of a file, in its order; raises BadRow for a bad one, or
    none.
    """
    found: dict[str, None] = {}
    for place, item in read_json_items(path):
        if len(found) == limit:
            break
        if isinstance(item, BadRow):
            raise item
        found[parse_prompt(item, place)] = None
    if not found:
        raise BadRow(f"{path}: no rows")
    return list(found)


def fingerprint(model: "PreTrainedModel") -> str:
    """16 digits over names, shapes and 16 values of every weight, an adapter's too; half-precision
    copies agree.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 16)][:16].half().to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_done(path: Path, made_with: dict) -> tuple[set[tuple[str, int]], int]:
    """((prompt, sample) of the lines there are, bytes up to the end of the last whole line).

    Raises:
        ValueError: a line is not ours, or was made with other settings than `made_with`.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    done: set[tuple[str, int]] = set()
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            theirs = {"served_model": row["served_model"], "seed": row["seed"], **row["settings"]}
            done.add((row["prompt"], row["sample"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"--output {path}:{number}: not a line of collect_lengths; name another file"
            ) from None
        for key in {**made_with, **theirs}:
            if made_with.get(key) != theirs.get(key):
                was = f"made with {key} {theirs.get(key)!r}, now it is {made_with.get(key)!r}"
                raise ValueError(f"--output {path}:{number}: {was}; name another file")
    torn = content[whole:]
    if not torn.startswith(OPENING[: len(torn)]):  # lines of another program are not cut away
        raise ValueError(
            f"--output {path}: its end is not a line of collect_lengths; name another file"
        )
    return done, whole


def open_to_append(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")


def encode_questions(
    tokenizer: "FamilyTokenizer",
    prompts: list[str],
    samples: int,
    max_src_len: int,
    done: set[tuple[str, int]],
) -> list[Question]:
    """What is not yet done, longest prompts first: what needs most memory comes first."""
    family = family_of(tokenizer)
    questions: list[Question] = []
    cut = 0
    for prompt in prompts:
        encoded = family.encode_prompt(tokenizer, prompt, max_src_len)
        cut += encoded.truncated
        for sample in range(samples):
            if (prompt, sample) not in done:
                questions.append(Question(prompt, encoded.input_ids, sample))
    if cut:
        print(
            f"{cut} of {len(prompts)} prompts are longer than --max_src_len {max_src_len} "
            "and asked cut",
            flush=True,
        )
    questions.sort(key=lambda question: -len(question.ids))
    return questions


class Answers:
    """A model's answers to questions, greedy or sampled with a seed of each question.

    Args:
        options: of generate(). sampling: temperature and top_p; empty for greedy answers.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "FamilyTokenizer",
        options: dict[str, Any],
        sampling: dict[str, float],
        seed: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.sampling = sampling
        self.seed = seed

    def answer(self, batch: list[Question]) -> Iterator[tuple[Question, list[int], bool]]:
        """(question, ids of its answer, whether the end token came)."""
        options = dict(self.options)
        if self.sampling:
            seeds = []
            for question in batch:
                seeds.append(row_seed(self.seed, question.prompt, question.sample))
            draws = RowDraws(seeds, **self.sampling, device=self.model.device)
            options["logits_processor"] = [draws]
        prompts = [question.ids for question in batch]
        answers = generate_batch(self.model, self.tokenizer, prompts, **options)
        for question, (ids, ended) in zip(batch, answers):
            yield question, ids, ended


def write_answers(
    answers: Answers,
    questions: list[Question],
    file: BinaryIO,
    row_end: dict[str, Any],
    batch_size: int,
    keep_answers: bool,
) -> tuple[int, int]:
    """Append a line for each answer, batch by batch; returns (tokens, unfinished answers)."""
    from tqdm import tqdm

    tokens = unfinished = 0
    start = time.monotonic()
    with tqdm(total=len(questions), desc="answering", unit="answer") as bar:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            lines = []
            for question, ids, ended in answers.answer(batch):
                row = {"prompt": question.prompt, "output_tokens": len(ids), "finished": ended}
                row |= {"sample": question.sample, **row_end}
                if keep_answers:
                    row["answer"] = answers.tokenizer.decode(ids, skip_special_tokens=True)
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
                tokens += len(ids)
                unfinished += not ended
            file.write("".join(lines).encode())
            file.flush()
            rate = tokens / (time.monotonic() - start)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    os.fsync(file.fileno())
    return tokens, unfinished


@dataclass(frozen=True)
class CollectionFlags(InferenceFlags):
    """The flags of this command."""

    prompts: str
    output: str
    served_model: str | None
    samples: int
    limit: int | None
    keep_answers: bool


def collect(flags: CollectionFlags) -> str:
    """Ask what is not yet in the output; returns a line on what was done."""
    prompts = read_prompts(flags.prompts, flags.limit)
    model, tokenizer, max_src_len, options = load_for_inference(flags)
    sampling = {}
    if options.pop("do_sample"):
        sampling = {"temperature": flags.temperature, "top_p": flags.top_p}
    for name in ("temperature", "top_p"):
        options.pop(name, None)  # RowDraws samples instead
    settings = {
        "weights": fingerprint(model),
        "max_src_len": max_src_len,
        "max_new_tokens": flags.max_new_tokens,
        **sampling,
    }
    row_end: dict[str, Any] = {
        "served_model": flags.served_model or served_name(flags.model_path),
        "seed": flags.seed if sampling else None,
    }
    output = Path(flags.output)
    done, whole = read_done(output, row_end | settings)
    questions = encode_questions(tokenizer, prompts, flags.samples, max_src_len, done)
    answers = Answers(model, tokenizer, options, sampling, flags.seed)
    row_end |= {"settings": settings}
    with writing(output), open_to_append(output) as file:
        file.truncate(whole)
        tokens, unfinished = write_answers(
            answers, questions, file, row_end, flags.batch_size, flags.keep_answers
        )
    there = f"; {len(done)} were there" if done else ""
    cut = f"{unfinished} cut at --max_new_tokens {flags.max_new_tokens}"
    return f"{len(questions)} answers of {tokens} tokens, {cut}, written to {output}{there}"


def build_parser() -> Parser:
    # "resolve": flags of finetune.predict that mean something else here are given anew
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="collect_lengths.py",
        description=__doc__,
        formatter_class=layout,
        conflict_handler="resolve",
    )
    add_model_flags(parser)
    parser.add_argument("--max_length", help=argparse.SUPPRESS)
    parser.add_argument(
        "--max_new_tokens",
        type=parse_positive,
        default=512,
        help="an answer is cut here, and then not finished [512]",
    )
    parser.add_argument("--prompts", required=True, help="file of the prompts")
    parser.add_argument("--output", required=True, help="JSON lines to write, or to go on with")
    parser.add_argument(
        "--served_model",
        help="name of the model in the lines (default: the folder's, "
        "of a checkpoint with its run's)",
    )
    parser.add_argument(
        "--samples",
        type=parse_positive,
        default=1,
        help="answers to each prompt, with --do_sample [1]",
    )
    parser.add_argument(
        "--limit", type=parse_positive, help="ask only so many prompts, the first of the file"
    )
    parser.add_argument("--keep_answers", action="store_true", help="write the answers' text too")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.samples > 1 and not args.do_sample:
        parser.error(
            f"--samples {args.samples} without --do_sample would be the same answer "
            f"{args.samples} times"
        )
    if args.max_length:
        parser.error("--max_length counts the prompt; say --max_new_tokens")
    flags = CollectionFlags(**vars(args))
    return run_command(parser.prog, lambda: run(flags))


def run(flags: CollectionFlags) -> None:
    try:
        print(collect(flags))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None


if __name__ == "__main__":
    sys.exit(main())
