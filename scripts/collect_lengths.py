#!/usr/bin/env python3
"""Measure how long a model's answers are: it answers prompts in batches, and every answer's length
is a line of --output.

    python scripts/collect_lengths.py --model_path DIR --prompts FILE --output lengths.jsonl

Prompts are JSON lines (also .gz) or a JSON list of {prompt}, {instruction, input} or {text}; the
same prompt is asked once.
A line has what the predictor is trained on: prompt, output_tokens (without the end token), finished
(the end token came within --max_new_tokens), served_model. The same command goes on where it was
stopped, also with more prompts or samples.

--engine continuous begins an answer as soon as one of --batch_size ends, where --engine static
waits for the longest of a batch: on one device it is faster where lengths differ. Sampled answers
come from the same distribution by the same seeds, but each draw takes another number from its
generator, so they are not those of the other engine. Their settings say so ("engine"), and one file
has answers of one engine.

With --states DIR the served model's hidden states are kept too, at the end of the prompt and every
--state_every answer tokens, by the continuous engine; train.py --backbone states learns from them.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatglm.commands import Parser, run_command  # noqa: E402
from chatglm.saving import locked_output  # noqa: E402
from finetune.config import parse_positive  # noqa: E402
from finetune.evaluation.answering import (  # noqa: E402
    AnsweredBatches,
    Answerer,
    batch_counts,
    measure_prompts,
    open_answerer,
    predict_lengths,
    with_progress,
)
from finetune.evaluation.generation import (  # noqa: E402
    AnswerOptions,
    PromptBatch,
    encode_prompts,
    longest_first,
    make_batches,
    model_fingerprint,
)
from finetune.evaluation.inference import (  # noqa: E402
    InferenceFlags,
    InferenceSetup,
    add_model_flags,
    load_ready,
    loading_options,
    prepare_inference,
)
from finetune.files import check_file_to_write, writing  # noqa: E402
from finetune.flag_effects import PLACING, check_given  # noqa: E402
from finetune.launched import single_start  # noqa: E402
from finetune.rows.formats import BadRow  # noqa: E402
from finetune.rows.sources import read_json_items  # noqa: E402
from predictor.labels import parse_prompt, served_name  # noqa: E402
from scripts.continuous_answers import CollectedAnswer, continuous_answers  # noqa: E402
from serving.engines import Sampling  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer
    from serving.engines.state_shards import StateFolder
    from serving.engines.state_tap import StateTap

FLUSH_S = 30.0  # how much work a killed command with --states loses at most
STATE_EVERY = 64
# The default layer of --state_layers: 22 of SmolLM2's 30, where 16 ranks better by 0.01.
LAYER_SHARE = 0.73
OPENING = b'{"prompt": '  # of every line written here


class Question(NamedTuple):
    """A prompt to ask: its text, its ids as the model gets them, and which sample this is."""

    prompt: str
    ids: list[int]
    sample: int


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
    tokenizer: "FamilyTokenizer", prompts: list[str], samples: int, max_src_len: int
) -> list[Question]:
    """All questions, in the order of the prompts."""
    questions: list[Question] = []
    cut = 0
    for prompt, encoded in zip(prompts, encode_prompts(tokenizer, prompts, max_src_len)):
        cut += encoded.truncated
        for sample in range(samples):
            questions.append(Question(prompt, encoded.input_ids, sample))
    if cut:
        print(
            f"{cut} of {len(prompts)} prompts are longer than --max_src_len {max_src_len} "
            "and asked cut",
            flush=True,
        )
    return questions


def question_batches(
    questions: list[Question], batch_size: int, seed: int | None
) -> list[PromptBatch]:
    """Questions in batches; with a seed each question is sampled with one of its own."""
    encoded = [question.ids for question in questions]
    batches = make_batches(encoded, range(len(questions)), batch_size)
    if seed is None:
        return batches
    seeded = []
    for batch in batches:
        seeds = []
        for i in batch.numbers:
            seeds.append(row_seed(seed, questions[i].prompt, questions[i].sample))
        seeded.append(replace(batch, row_seeds=seeds))
    return seeded


def write_answers(
    answered: AnsweredBatches,
    questions: list[Question],
    file: BinaryIO,
    row_end: dict[str, Any],
    tokenizer: "FamilyTokenizer | None",
) -> tuple[int, int]:
    """Append a line for each answer, batch by batch; returns (tokens, unfinished answers).

    Args:
        tokenizer: decodes the answers, which the lines then have; None leaves them out.
    """
    tokens = unfinished = 0
    for batch, answers in with_progress(answered, len(questions), batch_counts):
        lines = []
        for i, (ids, ended) in zip(batch.numbers, answers):
            lines.append(answer_line(questions[i], ids, ended, row_end, tokenizer))
            tokens += len(ids)
            unfinished += not ended
        file.write("".join(lines).encode())
        file.flush()
    os.fsync(file.fileno())
    return tokens, unfinished


def answer_line(
    question: Question,
    ids: list[int],
    ended: bool,
    row_end: dict[str, Any],
    tokenizer: "FamilyTokenizer | None",
) -> str:
    """The line of an answer; arguments as of `write_answers`."""
    row = {"prompt": question.prompt, "output_tokens": len(ids), "finished": ended}
    row |= {"sample": question.sample, **row_end}
    if tokenizer:
        row["answer"] = tokenizer.decode(ids, skip_special_tokens=True)
    return json.dumps(row, ensure_ascii=False) + "\n"


class ContinuousLines:
    """Answers and their states, written together: no line is there before its states are.

    Args:
        file: of the lines, open to append.
        folder: of the states, if they are kept.
        lines: how many the file has.
    """

    def __init__(self, file: BinaryIO, folder: "StateFolder | None", lines: int):
        self.file, self.folder, self.count = file, folder, lines
        self._waiting: list[str] = []
        self._flushed_s = time.monotonic()

    def add(self, line: str, answer: CollectedAnswer) -> None:
        """Add an answer's line and states; both are on disk within FLUSH_S."""
        if self.folder is not None:
            self.folder.add(self.count, answer.readings)
        self.count += 1
        self._waiting.append(line)
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self.folder is not None:
            self.folder.flush()
        self.file.write("".join(self._waiting).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self._waiting = []
        self._flushed_s = time.monotonic()


@dataclass(frozen=True)
class CollectionFlags(InferenceFlags):
    """The flags of this command."""

    prompts: str
    output: str
    served_model: str | None
    samples: int
    limit: int | None
    keep_answers: bool
    engine: str
    states: str | None
    state_layers: tuple[int, ...] | None
    state_every: int | None
    state_entropy: bool


def collect(flags: CollectionFlags) -> str:
    """Ask what is not yet in the output; returns a line on what was done.

    Raises:
        ValueError: another process writes the output, or the folder of states.
    """
    check_file_to_write(Path(flags.output), "--output")
    with ExitStack() as locks:
        locks.enter_context(locked_output(Path(flags.output), "--output"))
        if flags.states:
            locks.enter_context(locked_output(Path(flags.states), "--states"))
        return collect_alone(flags)


def collect_alone(flags: CollectionFlags) -> str:
    """`collect` of the only process that writes the output."""
    prompts = read_prompts(flags.prompts, flags.limit)
    setup = prepare_inference(flags)
    options = dict(setup.options)
    sampling = {}
    if options.pop("do_sample"):
        sampling = {"temperature": flags.temperature, "top_p": flags.top_p}
    for name in ("temperature", "top_p"):
        options.pop(name, None)  # RowDraws samples instead
    questions = encode_questions(setup.tokenizer, prompts, flags.samples, setup.max_src_len)
    encoded = [question.ids for question in questions]
    predicted: list[float] = []
    if flags.predictor:
        asked = [question.prompt for question in questions]
        predicted = predict_lengths(flags.predictor, asked, setup.tokenizer.name_or_path)
    questions = [questions[i] for i in longest_first(encoded, predicted)]
    if flags.engine == "continuous":
        return ask_continuously(flags, questions, setup, sampling)
    work = measure_prompts(encoded, predicted, flags)
    with open_answerer(flags, setup, AnswerOptions(options, sampling), work) as answerer:
        settings = answer_settings(flags, setup, answerer.fingerprint()) | sampling
        return ask(flags, questions, answerer, settings, setup.tokenizer)


def answer_settings(flags: CollectionFlags, setup: InferenceSetup, weights: str) -> dict[str, Any]:
    """What answers depend on, beside the sampling, as the lines have it.

    Args:
        weights: the model's fingerprint.
    """
    settings: dict[str, Any] = {
        "weights": weights,
        "max_src_len": setup.max_src_len,
        "max_new_tokens": flags.max_new_tokens,
    }
    if setup.tokenizer.prompt_style != "chat":
        settings["prompt_style"] = setup.tokenizer.prompt_style
    return settings


def ask(
    flags: CollectionFlags,
    questions: list[Question],
    answerer: Answerer,
    settings: dict[str, Any],
    tokenizer: "FamilyTokenizer",
) -> str:
    """Ask those of the questions that are not yet in the output; returns a line on what was done.

    Args:
        settings: of answers, which all lines of a file share.
    """
    seed = flags.seed if flags.do_sample else None
    row_end: dict[str, Any] = {
        "served_model": flags.served_model or served_name(flags.model_path),
        "seed": seed,
    }
    output = Path(flags.output)
    done, whole = read_done(output, row_end | settings)
    questions = [q for q in questions if (q.prompt, q.sample) not in done]
    batches = question_batches(questions, flags.batch_size, seed)
    row_end |= {"settings": settings}
    with writing(output), open_to_append(output) as file:
        file.truncate(whole)
        tokens, unfinished = write_answers(
            answerer.answers(batches),
            questions,
            file,
            row_end,
            tokenizer if flags.keep_answers else None,
        )
    return summary_line(flags, len(questions), tokens, unfinished, len(done))


def ask_continuously(
    flags: CollectionFlags,
    questions: list[Question],
    setup: InferenceSetup,
    sampling: dict[str, float],
) -> str:
    """As `ask`, by the continuous engine; with --states the answers' hidden states are kept."""
    model = load_ready(setup.folder, device=flags.device, **loading_options(flags))
    tap = open_tap(flags, model) if flags.states else None
    seed = flags.seed if flags.do_sample else None
    named = {"served_model": flags.served_model or served_name(flags.model_path)}
    weights = model_fingerprint(model)
    settings = answer_settings(flags, setup, weights) | {"engine": "continuous", **sampling}
    row_end: dict[str, Any] = {**named, "seed": seed}
    done, whole = read_done(Path(flags.output), row_end | settings)
    row_end |= {"settings": settings}
    questions = [q for q in questions if (q.prompt, q.sample) not in done]
    answered = continuous_answers(
        model,
        tap,
        [question.ids for question in questions],
        [question_sampling(flags, question, sampling, seed) for question in questions],
        setup.tokenizer,
        flags.batch_size,
    )
    about: dict[str, Any] = {**named, "weights": weights}
    if tap is not None:
        about |= described_states(tap, model, flags.max_new_tokens)
    tokenizer = setup.tokenizer if flags.keep_answers else None
    tokens, unfinished = write_continuous(
        flags,
        questions,
        answered,
        about,
        partial(answer_line, row_end=row_end, tokenizer=tokenizer),
        whole,
    )
    return summary_line(flags, len(questions), tokens, unfinished, len(done))


def open_tap(flags: CollectionFlags, model: "PreTrainedModel") -> "StateTap":
    """What reads the states, by the flags."""
    from serving.engines.bodies import decoder_layers
    from serving.engines.passes import plain_model
    from serving.engines.state_tap import StateTap

    layers = flags.state_layers
    if not layers:
        layers = (max(round(LAYER_SHARE * len(decoder_layers(plain_model(model)))), 1),)
    return StateTap(layers, flags.state_every or STATE_EVERY, flags.state_entropy)


def described_states(tap: "StateTap", model: "PreTrainedModel", cap: int | None) -> dict[str, Any]:
    """What states.json says of the states."""
    from serving.engines.bodies import hidden_size_of
    from serving.engines.passes import plain_model

    return {
        "hidden_size": hidden_size_of(plain_model(model)),
        "layers": list(tap.layers),
        "every": tap.every,
        "cap": cap,
        "entropy": tap.entropy,
    }


def write_continuous(
    flags: CollectionFlags,
    questions: list[Question],
    answered: Iterable[CollectedAnswer],
    about: dict[str, Any],
    line_of: Callable[[Question, list[int], bool], str],
    whole: int,
) -> tuple[int, int]:
    """Append the answers' lines, and their states; returns (tokens, unfinished answers).

    Args:
        about: of the folder of states.
        whole: bytes of the output that stay.
    """
    from serving.engines.state_shards import StateFolder

    output = Path(flags.output)
    there = count_lines(output, whole)
    folder = StateFolder(Path(flags.states), about, there) if flags.states else None
    tokens = unfinished = 0
    with writing(output), open_to_append(output) as file:
        file.truncate(whole)
        lines = ContinuousLines(file, folder, there)
        try:
            for answer in with_progress(answered, len(questions), answer_counts):
                line = line_of(questions[answer.number], answer.ids, answer.finished)
                lines.add(line, answer)
                tokens += len(answer.ids)
                unfinished += not answer.finished
        finally:
            lines.flush()
    return tokens, unfinished


def count_lines(path: Path, size: int) -> int:
    """Lines within the first `size` bytes of a file, which may be absent."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return file.read(size).count(b"\n")


def question_sampling(
    flags: CollectionFlags, question: Question, sampling: dict[str, float], seed: int | None
) -> Sampling:
    """How the engine answers a question: greedily without a seed."""
    if seed is None:
        return Sampling(flags.max_new_tokens)
    own_seed = row_seed(seed, question.prompt, question.sample)
    return Sampling(flags.max_new_tokens, sampling["temperature"], sampling["top_p"], seed=own_seed)


def answer_counts(answer: CollectedAnswer) -> tuple[int, int]:
    """(rows, tokens) of an answer."""
    return 1, len(answer.ids)


def summary_line(
    flags: CollectionFlags, answers: int, tokens: int, unfinished: int, before: int
) -> str:
    """What was done."""
    there = f"; {before} were there" if before else ""
    cut = f"{unfinished} cut at --max_new_tokens {flags.max_new_tokens}"
    return f"{answers} answers of {tokens} tokens, {cut}, written to {flags.output}{there}"


def layer_numbers(text: str) -> tuple[int, ...]:
    """Numbers of layers, ascending, each once: "11,22"."""
    try:
        layers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        layers = []
    if not layers or layers[0] < 1:
        raise argparse.ArgumentTypeError(f"wanted layers from 1, as 11,22; got {text!r}")
    return tuple(layers)


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
    parser.add_argument(
        "--engine",
        choices=("static", "continuous"),
        help="static: batch after batch; continuous: --batch_size answers at once, on one device "
        "[static; continuous with --states]",
    )
    add_state_flags(parser)
    return parser


def add_state_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --states."""
    parser.add_argument(
        "--states", metavar="DIR", help="keep the answers' hidden states in this folder"
    )
    parser.add_argument(
        "--state_layers",
        type=layer_numbers,
        metavar="N,N",
        help="with --states: after which layers, from 1 [one, at 73 %% of the depth]",
    )
    parser.add_argument(
        "--state_every",
        type=parse_positive,
        help=f"with --states: answer tokens between two readings [{STATE_EVERY}]",
    )
    parser.add_argument(
        "--state_entropy",
        action="store_true",
        help="with --states: means over the prompt weighted by the next token's entropy too; its "
        "tokens then all pass the output layer",
    )


def check_engine_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Choose the engine; refuse flags that it needs, or that it cannot have, in one line."""
    if not args.states:
        for name in ("state_layers", "state_every", "state_entropy"):
            if getattr(args, name):
                parser.error(f"--{name} is of --states DIR, which is not given")
    elif args.engine == "static":
        parser.error("--states: only --engine continuous reads hidden states")
    args.engine = args.engine or ("continuous" if args.states else "static")
    if args.engine == "static":
        return
    if args.do_sample and args.temperature <= 0:
        parser.error(f"--temperature must be above 0 with --do_sample, got {args.temperature}")
    placing = ("deployer", "num_gpus", "devices", "device_map")
    given = [name for name in placing if getattr(args, name)]
    if given:
        parser.error(
            f"--{given[0]} places replicas, and the continuous engine answers on one device here: "
            "leave it out, and say --device"
        )


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(single_start(argv))
    check_given(parser, vars(args), PLACING)
    check_engine_flags(parser, args)
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
