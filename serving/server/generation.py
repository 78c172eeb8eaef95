"""What every endpoint that runs the model asks of it: prompts, and how answers are sampled.

Free of torch and of HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from chatglm.families import RAW_FAMILIES
from serving.engines import Sampling
from serving.server.refusals import PromptTooLong
from serving.server.text_stream import TextStream

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer
    from predictor.prediction import LengthPrediction

TAIL_TOKENS = 8  # of a prompt, that the text of its answer is decoded with
SAMPLING_FIELDS = (  # those of a GenerationRequest that Sampling has under the same name
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)


class PromptIds(NamedTuple):
    """A prompt, and its text for the length predictor and the log."""

    ids: list[int]
    text: str


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A checked body. Attributes that are None were not given.

    Attributes:
        n: answers to each prompt; the seeds of later ones count up.
        max_length: tokens of prompt and answer together.
        logit_bias: (token id, what is added to its logit).
        bad_words: texts whose tokens the answer must not hold.
        logprobs: whether each token's log probability is given; top_logprobs: of so many
            likeliest tokens too.
        stop, stop_token_ids: texts and tokens that end the answer and are not part of it.
        priority: requests of a lower one leave the queue first.
        unknown_fields: names of unknown fields.
        parallel_tool_calls: whether the reply may have several calls of tools.
    """

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    do_sample: bool | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    stream: bool = False
    include_usage: bool = False
    slo_s: float | None = None
    priority: int = 0
    unknown_fields: tuple[str, ...] = ()
    parallel_tool_calls: bool = True

    @property
    def prompt_count(self) -> int:
        return 1

    @property
    def embeds(self) -> bool:
        """Whether the prompts' mean states are wanted, and no answer."""
        return False

    @property
    def prompt_logprobs(self) -> int | None:
        """As Sampling's."""
        return None

    @property
    def shown_tools(self) -> tuple[dict[str, Any], ...]:
        """Tools that the answer may call."""
        return ()

    @property
    def has_grammar(self) -> bool:
        """Whether an answer's text must have a form."""
        return False

    def grammar_source(self, tokenizer: "FamilyTokenizer") -> str:
        """The grammar of its answers, in llguidance's JSON, where it has one.

        Raises:
            ValueError: in one line, where it cannot be written.
        """
        raise NotImplementedError

    def sizes(self) -> tuple[int, int]:
        """(messages or tokens, characters) of the longest prompt, known before it is encoded."""
        raise NotImplementedError

    def encoded(
        self, tokenizer: "FamilyTokenizer", prompt_options: dict[str, Any]
    ) -> list[PromptIds]:
        """The prompts.

        Args:
            prompt_options: options of the family's encode_chat.
        Raises:
            ValueError: the family's prompt format has no place for them.
        """
        raise NotImplementedError

    def text_stream(self, tokenizer: "FamilyTokenizer", prompt: Sequence[int]) -> TextStream:
        """What makes an answer's tokens into text: one that goes on with the prompt's."""
        family = RAW_FAMILIES[tokenizer.family]
        return TextStream(tokenizer, family, self.stop, prompt[-TAIL_TOKENS:])


def raw_prompt(tokenizer: "FamilyTokenizer", prompt: str | tuple[int, ...]) -> PromptIds:
    """A text with the family's control tokens around it, or token ids as they are."""
    if isinstance(prompt, str):
        ids = RAW_FAMILIES[tokenizer.family].encode_chat(tokenizer, prompt)
        return PromptIds(ids, prompt)
    return PromptIds(list(prompt), prompt_text(tokenizer, prompt))


def prompt_text(tokenizer: "FamilyTokenizer", prompt: str | tuple[int, ...]) -> str:
    """The text of a prompt. Raises ValueError for ids beyond the vocabulary."""
    if isinstance(prompt, str):
        return prompt
    if max(prompt) >= len(tokenizer):
        raise ValueError(f"token ids must be below {len(tokenizer)}, got {max(prompt)}")
    return str(tokenizer.decode(list(prompt)))


def longest_sizes(prompts: Sequence[str | tuple[int, ...]]) -> tuple[int, int]:
    """(tokens of the longest ids, characters of the longest text) among prompts."""
    tokens = characters = 0
    for prompt in prompts:
        if isinstance(prompt, str):
            characters = max(characters, len(prompt))
        else:
            tokens = max(tokens, len(prompt))
    return tokens, characters


def settle_options(fields_read: dict[str, Any]) -> None:
    """Bring read fields into the form of a GenerationRequest.

    Raises:
        ValueError: best_of is not n.
    """
    fields_read["include_usage"] = fields_read.pop("stream_options", False)
    n = fields_read.get("n", 1)
    if fields_read.pop("best_of", n) != n:
        raise ValueError(f"best_of must be n, which is {n}: answers are not made and left out")


def request_sampling(
    asked: GenerationRequest, prompt_tokens: int, defaults: Mapping[str, float]
) -> Sampling:
    """Of a prompt's first answer, but for its bad words, grammar and adapter.

    Args:
        defaults: temperature and top_p of requests without them.
    Raises:
        PromptTooLong: max_length leaves no room for an answer.
    """
    token_limits = [asked.max_tokens] if asked.max_tokens is not None else []
    if asked.max_length is not None:
        if asked.max_length <= prompt_tokens:
            counts = f"counts the prompt too, which has {prompt_tokens} tokens"
            raise PromptTooLong(f"max_length ({asked.max_length}) {counts}; say max_tokens")
        token_limits.append(asked.max_length - prompt_tokens)
    options: dict[str, Any] = dict(defaults)
    for name in SAMPLING_FIELDS:
        if (value := getattr(asked, name)) is not None:
            options[name] = value
    if asked.do_sample is False or options.get("top_p") == 0:
        options |= {"temperature": 0.0, "top_p": 1.0}
    return Sampling(
        max_new_tokens=max(min(token_limits), 1) if token_limits else None,
        seed=asked.seed,
        top_k=max(asked.top_k or 0, 0),
        logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
        prompt_logprobs=asked.prompt_logprobs,
        embeds=asked.embeds,
        **options,
    )


def banned_sequences(
    tokenizer: "FamilyTokenizer", words: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words: at a line's beginning, after a space, and within a text."""
    sequences = set()
    newline = tokenizer.encode_text("\n")
    for word in words:
        sequences.add(tuple(tokenizer.encode_text(word)))
        sequences.add(tuple(tokenizer.encode_text(f" {word}")))
        within = tokenizer.encode_text(f"\n{word}")
        if within[: len(newline)] == newline:
            sequences.add(tuple(within[len(newline) :]))
    sequences.discard(())
    return tuple(sorted(sequences))


def reported_prediction(prediction: "LengthPrediction") -> dict[str, float]:
    """What a response says of an answer's predicted length, in tokens."""
    predicted = {
        "expected": prediction.expected_tokens,
        "median": prediction.median_tokens,
        "q90": prediction.quantile(0.9),
    }
    return {name: round(tokens, 1) for name, tokens in predicted.items()}
