"""What a loaded model generates for encoded prompts, batch by batch."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chatglm.families import family_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from chatglm.family_tokenizer import FamilyTokenizer
    from chatglm.prompts import EncodedPrompt


@dataclass(frozen=True)
class PromptBatch:
    """Encoded prompts that are answered together.

    Attributes:
        numbers: of the prompts, by which their answers are known.
        prompts: their ids, of each length.
        seed: of torch, set before the batch; None leaves torch's state.
        row_seeds: of each row's own draws (RowDraws); None: generate() draws for the whole batch.
    """

    numbers: list[int]
    prompts: list[list[int]]
    seed: int | None = None
    row_seeds: list[int] | None = None


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are generated.

    Attributes:
        options: generate()'s, e.g. max_new_tokens, do_sample, top_p.
        draws: temperature and top_p of batches with row_seeds.
    """

    options: dict[str, Any]
    draws: dict[str, float] = field(default_factory=dict)


# (ids of an answer without the end token, whether an end token came)
Generated = tuple[list[int], bool]


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    prompts: list[str],
    *,
    batch_size: int = 8,
    max_src_len: int = 1024,
    progress: bool = False,
    synced: bool = False,
    seed: int | None = None,
    **options: Any,
) -> list[str]:
    """Answers in the order of `prompts`; the longest prompts are answered first.

    Args:
        max_src_len: longest prompt in tokens; use training's, so that prompts are truncated as
            they were there.
        synced: ZeRO-3: every rank keeps stepping until the slowest one has finished.
        seed: set anew for each batch, so that sampled answers depend on their batch alone.
        options: generate()'s, e.g. max_new_tokens, do_sample, top_p.
    """
    from tqdm import tqdm

    if synced:
        options["synced_gpus"] = True
    encoded = [encoding.input_ids for encoding in encode_prompts(tokenizer, prompts, max_src_len)]
    batches = make_batches(encoded, longest_first(encoded), batch_size, seed=seed)
    settings = AnswerOptions(options)
    answers = [""] * len(prompts)
    for batch in tqdm(batches, desc="answering", unit="batch", disable=not progress):
        for i, (ids, _) in zip(batch.numbers, answer_batch(model, tokenizer, batch, settings)):
            answers[i] = decoded_text(tokenizer, ids)
    return answers


def encode_prompts(
    tokenizer: "FamilyTokenizer", prompts: Sequence[str], max_src_len: int
) -> list["EncodedPrompt"]:
    """The prompts as the model gets them, of at most `max_src_len` tokens."""
    family = family_of(tokenizer)
    return [family.encode_prompt(tokenizer, prompt, max_src_len) for prompt in prompts]


def longest_first(encoded: Sequence[list[int]], predicted: Sequence[float] = ()) -> list[int]:
    """Numbers of prompts in the order in which they are answered.

    Args:
        predicted: tokens of each answer. The longest answers then come first, and of equal ones
            the longest prompts; without it the longest prompts.
    """
    if predicted:
        return sorted(range(len(encoded)), key=lambda i: (-predicted[i], -len(encoded[i])))
    return sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))


def make_batches(
    encoded: Sequence[list[int]],
    order: Sequence[int],
    batch_size: int,
    *,
    done: Collection[int] = (),
    seed: int | None = None,
) -> list[PromptBatch]:
    """The prompts in batches, in the order in which they are answered.

    Args:
        order: numbers of the prompts.
        done: numbers of prompts that have an answer already. A batch of only such prompts is left
            out; this does not change the other batches.
        seed: of the first batch; that of another is larger by the number of prompts before it.
    """
    answered = set(done)
    batches = []
    for start in range(0, len(order), batch_size):
        numbers = list(order[start : start + batch_size])
        if answered.issuperset(numbers):
            continue
        own_seed = None if seed is None else seed + start
        batches.append(PromptBatch(numbers, [encoded[i] for i in numbers], own_seed))
    return batches


def answer_batch(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    batch: PromptBatch,
    settings: AnswerOptions,
) -> list[Generated]:
    """The answers to a batch's prompts, by its seeds."""
    import torch

    options = dict(settings.options)
    if batch.seed is not None:
        torch.manual_seed(batch.seed)
    if batch.row_seeds is not None:
        draws = RowDraws(batch.row_seeds, **settings.draws, device=model.device)
        options["logits_processor"] = [draws]
    return generate_batch(model, tokenizer, batch.prompts, **options)


def decoded_text(tokenizer: "FamilyTokenizer", ids: list[int]) -> str:
    """The text of an answer's ids, without control tokens and what a chat template writes first.

    What fills several blanks is a line for each.
    """
    texts = []
    for piece in tokenizer.split_pieces(ids):
        texts.append(str(tokenizer.decode(piece, skip_special_tokens=True)))
    text = "\n".join(texts)
    header = tokenizer.answer_header_text
    return text.removeprefix(header) if header.strip() else text


def generate_batch(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    encoded: list[list[int]],
    **options: Any,
) -> list[Generated]:
    """(ids of the answer without the end token, whether an end token came) of each encoded prompt.

    The prompts are padded on the left. `options` are generate()'s; without do_sample decoding is
    greedy. Of GLM-10B's prompts with several blanks one is filled after the other, each in sight of
    those before (tokenizer.split_pieces gives them).
    """
    answers = generate_pieces(model, tokenizer, encoded, **options)
    wanted = list(map(tokenizer.count_pieces, encoded))
    pieces = [[ids] for ids, _ in answers]
    for number in range(1, max(wanted)):
        rows = [row for row, count in enumerate(wanted) if count > number and answers[row][1]]
        prompts = []
        for row in rows:
            prompts.append(encoded[row] + tokenizer.join_pieces([*pieces[row], []]))
        for row, made in zip(rows, generate_pieces(model, tokenizer, prompts, **options)):
            pieces[row].append(made[0])
            answers[row] = (tokenizer.join_pieces(pieces[row]), made[1])
    return answers


def generate_pieces(
    model: "PreTrainedModel",
    tokenizer: "FamilyTokenizer",
    encoded: list[list[int]],
    **options: Any,
) -> list[Generated]:
    """As generate_batch, of the next piece alone."""
    import torch

    from chatglm.loading import stop_ids

    options = {
        "do_sample": False,
        "eos_token_id": stop_ids(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    } | options
    if not options["do_sample"]:
        options |= {"top_p": None, "top_k": None, "temperature": None}
    if not encoded:
        return []
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


def model_fingerprint(model: "PreTrainedModel") -> str:
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
