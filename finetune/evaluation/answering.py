"""Answers to the prompts of a file: in batches, by one model here or several replicas, resumed."""

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from chatglm.hub import resolve_folder
from finetune.evaluation.generation import (
    AnswerOptions,
    Generated,
    PromptBatch,
    answer_batch,
    decoded_text,
    encode_prompts,
    longest_first,
    make_batches,
    model_fingerprint,
)
from finetune.evaluation.inference import (
    InferenceFlags,
    InferenceSetup,
    load_ready,
    load_replica,
    loading_options,
    prepare_inference,
)
from finetune.evaluation.replicas import OfflineReplicas
from finetune.files import KeptLines
from finetune.placing import plan_replicas

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer

PREDICTOR = "predictor.runtime"  # stands above this package, and is imported when asked for

AnsweredBatches = Iterable[tuple[PromptBatch, list[Generated]]]
AnsweredPart = TypeVar("AnsweredPart")


class Answerer(Protocol):
    """What answers batches: a model in this process, or several in others."""

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model, once it is loaded."""

    def answers(self, batches: Sequence[PromptBatch]) -> AnsweredBatches:
        """(batch, its answers) of all batches, in any order."""


class LocalAnswerer:
    """The answers of a model in this process, in the order of the batches."""

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "FamilyTokenizer", settings: AnswerOptions
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings

    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    def answers(
        self, batches: Sequence[PromptBatch]
    ) -> Iterator[tuple[PromptBatch, list[Generated]]]:
        for batch in batches:
            yield batch, answer_batch(self.model, self.tokenizer, batch, self.settings)


class PromptLoad(NamedTuple):
    """What prompts will ask of a model, for the planning of its replicas.

    Attributes:
        prompts: how many.
        longest_prompt, mean_prompt, mean_answer: in tokens. The mean answer is the predicted one,
            or the longest that may come.
        kv_tokens: of a batch, its longest prompts with their longest answers.
    """

    prompts: int
    longest_prompt: int
    mean_prompt: int
    mean_answer: int
    kv_tokens: int


def measure_prompts(
    encoded: Sequence[list[int]], predicted: Sequence[float], flags: InferenceFlags
) -> PromptLoad:
    """The workload of prompts; `predicted` are the tokens of their answers, or empty."""
    lengths = [len(ids) for ids in encoded]
    longest = max(lengths)
    if flags.max_new_tokens:
        room = longest + flags.max_new_tokens
        most = flags.max_new_tokens
    else:
        room = flags.max_length
        most = max(flags.max_length - round(fmean(lengths)), 1)
    mean_answer = min(round(fmean(predicted)), most) if predicted else most
    batch = min(flags.batch_size, len(encoded))
    return PromptLoad(
        len(encoded), longest, round(fmean(lengths)), max(mean_answer, 1), batch * room
    )


@contextmanager
def open_answerer(
    flags: InferenceFlags, setup: InferenceSetup, settings: AnswerOptions, work: PromptLoad
) -> Iterator[Answerer]:
    """The model on the one device of --device, or the replicas that the flags place.

    The placement is printed to stderr before its models are loaded, and what each took at the end.
    """
    if not flags.is_placed:
        model = load_ready(setup.folder, device=flags.device, **loading_options(flags))
        yield LocalAnswerer(model, setup.tokenizer, settings)
        return
    plan = plan_replicas(
        flags,
        str(setup.folder),
        kv_tokens=work.kv_tokens,
        batch=min(flags.batch_size, work.prompts),
        prompt_tokens=work.mean_prompt,
        output_tokens=work.mean_answer,
        precision=flags.precision,
        base=flags.base_model,
        keep_quantized=flags.keep_quantized,
    )
    print(plan.describe(), file=sys.stderr, flush=True)
    batches = -(-work.prompts // flags.batch_size)
    specs = list(plan.replicas)[:batches]
    if len(specs) < len(plan.replicas):
        print(
            f"{len(specs)} of {len(plan.replicas)} replicas are started, for there are no more "
            f"batches: {work.prompts} prompts, --batch_size {flags.batch_size}",
            file=sys.stderr,
        )
    with OfflineReplicas(specs, flags, setup, settings) as replicas:
        yield replicas
        for line in replicas.summary(plan.stages):
            print(line, file=sys.stderr)


def load_placed(flags: InferenceFlags, setup: InferenceSetup) -> "PreTrainedModel":
    """The one model of a placement in this process, for single prompts.

    Raises:
        ValueError: the placement has several replicas; or as `plan_replicas` and `load_ready`.
    """
    room = flags.max_length
    if flags.max_new_tokens:
        room = setup.max_src_len + flags.max_new_tokens
    plan = plan_replicas(
        flags,
        str(setup.folder),
        kv_tokens=room,
        batch=1,
        precision=flags.precision,
        base=flags.base_model,
        keep_quantized=flags.keep_quantized,
    )
    print(plan.describe(), file=sys.stderr, flush=True)
    if len(plan.replicas) > 1:
        raise ValueError(
            f"single prompts are answered by one replica, this placement has {len(plan.replicas)}: "
            "give --device, or --device_map auto to split the model"
        )
    return load_replica(setup.folder, plan.replicas[0], **loading_options(flags))


def predict_lengths(folder: str, prompts: Sequence[str], tokenizer_folder: str) -> list[float]:
    """Expected tokens of the answer to each prompt, by the length predictor of --predictor.

    Raises:
        FileNotFoundError, ValueError: as `LengthPredictor.from_pretrained`.
    """
    runtime = importlib.import_module(PREDICTOR)
    predictor = runtime.LengthPredictor.from_pretrained(folder, served_model=tokenizer_folder)
    distinct = list(dict.fromkeys(prompts))
    expected = {}
    for prompt, prediction in zip(distinct, predictor.predict(distinct)):
        expected[prompt] = prediction.expected_tokens
    return [expected[prompt] for prompt in prompts]


def batch_counts(batch: tuple[PromptBatch, list[Generated]]) -> tuple[int, int]:
    """(rows, tokens) of an answered batch."""
    _, answers = batch
    return len(answers), sum(len(ids) for ids, _ in answers)


def with_progress(
    answered: Iterable[AnsweredPart], rows: int, count: Callable[[AnsweredPart], tuple[int, int]]
) -> Iterator[AnsweredPart]:
    """The same parts, with a progress bar of rows and tokens per second on stderr.

    Args:
        count: (rows, tokens) of a part.
    """
    from tqdm import tqdm

    tokens = 0
    start_s = time.monotonic()
    with tqdm(total=rows, desc="answering", unit="row") as bar:
        for part in answered:
            part_rows, part_tokens = count(part)
            tokens += part_tokens
            rate = tokens / max(time.monotonic() - start_s, 1e-9)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            bar.update(part_rows)
            yield part


class KeptAnswers(KeptLines):
    """Answers that are kept, by the numbers of their prompts."""

    def __init__(self, final: Path, depends_on: dict[str, Any]) -> None:
        super().__init__(final, depends_on)
        self.found: dict[int, str] = dict(map(json.loads, self.lines))

    def is_whole(self, line: str) -> bool:
        return super().is_whole(line) and list(map(type, json.loads(line))) == [int, str]

    def add(self, batch: dict[int, str]) -> None:
        """Keep the answers of a batch."""
        self.found |= batch
        self.keep(*batch.items())


def dependencies(
    flags: InferenceFlags, prompts: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    """What answers depend on: the model's files and how they are loaded, the prompts, and the
    options of generation."""
    stamps = []
    for path in sorted(resolve_folder(flags.model_path, weights=True).iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            stamps.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
    return {
        "model": stamps,
        "base_model": flags.base_model,
        "mode": flags.mode,
        "prompt_style": flags.prompt_style,
        "precision": flags.precision,
        "quantization_bit": flags.quantization_bit,
        "keep_quantized": flags.keep_quantized,
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "options": options,
    }


class AnsweredPrompts(NamedTuple):
    """Answers in the order of their prompts, and the seconds that they took.

    kept: the answers on disk, where they are for a file.
    """

    answers: list[str]
    seconds: float
    kept: KeptAnswers | None


def answer_prompts(
    flags: InferenceFlags, prompts: list[str], final: Path | None
) -> AnsweredPrompts:
    """Answer prompts with a progress bar; those that an interrupted command has kept stay.

    Args:
        final: the file that the answers are for; they are kept beside it as they come.
    Raises:
        ValueError, OSError, MemoryError: as loading, planning and answering.
    """
    setup = prepare_inference(flags)
    encoded = []
    for encoding in encode_prompts(setup.tokenizer, prompts, setup.max_src_len):
        encoded.append(encoding.input_ids)
    predicted: list[float] = []
    if flags.predictor:
        predicted = predict_lengths(flags.predictor, prompts, setup.tokenizer.name_or_path)
    order = longest_first(encoded, predicted)
    kept = None
    if final:
        depends_on = dependencies(flags, prompts, setup.options | batching(flags, setup, order))
        kept = KeptAnswers(final, depends_on)
    by_number = dict(kept.found) if kept else {}
    if by_number:
        print(f"{len(by_number)} of {len(prompts)} answers are there from before", flush=True)
    batches = make_batches(encoded, order, flags.batch_size, done=by_number, seed=flags.seed)
    seconds = 0.0
    if batches:
        left: list[int] = []
        for batch in batches:
            left += batch.numbers
        lengths = [predicted[i] for i in left] if predicted else []
        work = measure_prompts([encoded[i] for i in left], lengths, flags)
        with open_answerer(flags, setup, AnswerOptions(setup.options), work) as answerer:
            answerer.fingerprint()  # the clock starts when a model is loaded
            start_s = time.perf_counter()
            for batch, answers in with_progress(answerer.answers(batches), len(left), batch_counts):
                texts = {}
                for i, (ids, _) in zip(batch.numbers, answers):
                    texts[i] = decoded_text(setup.tokenizer, ids)
                by_number |= texts
                if kept:
                    kept.add(texts)
            seconds = time.perf_counter() - start_s
    return AnsweredPrompts([by_number[i] for i in range(len(prompts))], seconds, kept)


def batching(flags: InferenceFlags, setup: InferenceSetup, order: list[int]) -> dict[str, Any]:
    """What sampled answers depend on beside the model and generate()'s options."""
    found: dict[str, Any] = {
        "batch_size": flags.batch_size,
        "max_src_len": setup.max_src_len,
        "seed": flags.seed,
    }
    if flags.predictor:
        found["order"] = hashlib.sha256(json.dumps(order).encode()).hexdigest()
    return found
