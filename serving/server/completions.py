"""/v1/completions: texts, or token ids, that the model goes on with. Free of torch."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request as Http

from chatglm.families import RAW_FAMILIES
from serving.engines.answers import TokenLogprobs
from serving.server.access import ApiError
from serving.server.choices import (
    DONE,
    Choice,
    Choices,
    event,
    response_head,
)
from serving.server.fields import (
    MOST,
    REFUSED,
    SAMPLING,
    TOP_LOGPROBS,
    FieldTable,
    Flag,
    Number,
    Prompts,
)
from serving.server.generation import (
    GenerationRequest,
    PromptIds,
    longest_sizes,
    prompt_text,
    raw_prompt,
    settle_options,
)
from serving.server.service import AnswerGroup, Service

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

MAX_TOKENS = 16  # of an answer, where a request does not say: as OpenAI has it
MOST_PROMPT_LOGPROBS = 2_500_000  # of a request: each takes some hundred bytes until the reply
COMPLETION_TABLE = FieldTable(
    {
        "prompt": Prompts("A text, token ids, or a list of at most 128 of either."),
        **SAMPLING,
        "max_tokens": Number(
            int, 0, MOST, f"Tokens of the answer, at most; {MAX_TOKENS} without it; 0 with echo."
        ),
        "logprobs": Number(
            int, 0, TOP_LOGPROBS, "Log probabilities of each token and of so many likeliest ones."
        ),
        "echo": Flag("Give the prompt too, with its log probabilities where they are asked for."),
    },
    {name: neutral for name, neutral in REFUSED.items() if name != "echo"} | {"messages": ()},
    "prompt",
)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    """A body of /v1/completions, checked.

    Attributes:
        prompts: each a text or token ids.
        echo: the response begins with the prompt.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False

    @property
    def prompt_count(self) -> int:
        return len(self.prompts)

    @property
    def prompt_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.echo and self.logprobs else None

    @property
    def makes_nothing(self) -> bool:
        """Only the prompts are wanted; the engine's one token is left out."""
        return self.max_tokens == 0

    def sizes(self) -> tuple[int, int]:
        return longest_sizes(self.prompts)

    def encoded(
        self, tokenizer: "FamilyTokenizer", prompt_options: dict[str, Any]
    ) -> list[PromptIds]:
        family = RAW_FAMILIES[tokenizer.family]
        if family.infills and self.prompt_logprobs is not None:
            raise ValueError(
                f"echo with logprobs: {family.title} reads a prompt in both directions, so its "
                "tokens have no log probabilities"
            )
        prompts = [raw_prompt(tokenizer, prompt) for prompt in self.prompts]
        if self.prompt_logprobs is not None:
            tokens = self.n * sum(len(prompt.ids) for prompt in prompts)
            count = tokens * (1 + self.prompt_logprobs)
            if count > MOST_PROMPT_LOGPROBS:
                raise ValueError(
                    f"echo with logprobs {self.prompt_logprobs} of {tokens} prompt tokens: {count} "
                    f"log probabilities, and a reply has at most {MOST_PROMPT_LOGPROBS}; ask for "
                    "fewer prompts at once"
                )
        return prompts


def parse_completion(body: Any) -> CompletionRequest:
    """The request in a body's JSON.

    Raises:
        ValueError: in one line, where a field is refused.
    """
    fields_read = COMPLETION_TABLE.read(body)
    settle_options(fields_read)
    fields_read.setdefault("max_tokens", MAX_TOKENS)
    if not fields_read["max_tokens"] and not fields_read.get("echo"):
        raise ValueError("max_tokens must be at least 1, or 0 with echo")
    if "logprobs" in fields_read:
        fields_read |= {"logprobs": True, "top_logprobs": fields_read["logprobs"]}
    fields_read["prompts"] = fields_read.pop("prompt")
    return CompletionRequest(**fields_read, unknown_fields=COMPLETION_TABLE.unknown(body))


class CompletionResponse:
    """The response to a completion request."""

    def __init__(
        self, service: Service, asked: CompletionRequest, group: AnswerGroup, http: Http
    ) -> None:
        self.service, self.asked = service, asked
        self.choices = Choices(service, asked, group, http)
        self.head = response_head("cmpl", service, asked.model) | {"object": "text_completion"}
        self.offsets = [0] * len(self.choices.all)  # characters of tokens that have been given

    def prompt_of(self, choice: Choice) -> str:
        """The text of its prompt."""
        prompt = self.asked.prompts[choice.place // self.asked.n]
        return prompt_text(self.service.tokenizer, prompt)

    async def complete(self) -> dict[str, Any]:
        texts = await self.choices.texts()
        entries = []
        for choice, text in zip(self.choices.all, texts):
            whole = "" if self.asked.makes_nothing else text
            logprobs = self.logprobs(choice, with_prompt=self.asked.echo)
            if self.asked.echo:
                whole = self.prompt_of(choice) + whole
            entries.append(self.entry(choice, whole, choice.finish_reason(), logprobs))
        return self.head | {
            "choices": entries,
            "usage": self.usage(),
            "glm_foundry": self.choices.report(),
        }

    def usage(self) -> dict[str, int]:
        usage = self.choices.usage()
        if self.asked.makes_nothing:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    @staticmethod
    def entry(
        choice: Choice, text: str, reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "index": choice.place,
            "text": text,
            "finish_reason": reason,
            "logprobs": logprobs,
        }

    def logprobs(self, choice: Choice, with_prompt: bool) -> dict[str, Any] | None:
        """OpenAI's object for the tokens not given yet; None where not asked for.

        The end token counts, as in vLLM: lm-evaluation-harness leaves out the last token.

        Args:
            with_prompt: those of the prompt are first among them.
        """
        if not self.asked.logprobs:
            return None
        found: list[tuple[int, TokenLogprobs | None]] = []
        if with_prompt:
            answer = choice.active.answer
            found += zip(answer.prompt, answer.prompt_logprobs)
        if not self.asked.makes_nothing:
            found += choice.next_logprobs(with_end=True)
        tokens, values, offsets = [], [], []
        likeliest: list[dict[str, float] | None] = []
        for token, logprobs in found:
            text = self.token_text(token)
            tokens.append(text)
            offsets.append(self.offsets[choice.place])
            self.offsets[choice.place] += len(text)
            values.append(None if logprobs is None else logprobs.chosen)
            if logprobs is None:
                likeliest.append(None)
                continue
            alternatives = {text: logprobs.chosen}
            for other, value in logprobs.top:
                name = self.token_text(other)  # two tokens may have one: the likelier counts
                alternatives[name] = max(value, alternatives.get(name, value))
            likeliest.append(alternatives)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def token_text(self, token: int) -> str:
        """A token as text; another for each token."""
        return token_text(self.service.tokenizer, token)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: pieces of text, each answer's finish reason, the usage, [DONE]."""
        left = len(self.choices.all)
        begun = [not self.asked.echo] * left
        async with aclosing(self.choices.pieces()) as pieces:
            async for choice, new in pieces:
                text = "" if self.asked.makes_nothing else new
                is_first = not begun[choice.place]
                if is_first:
                    text, begun[choice.place] = self.prompt_of(choice) + text, True
                if not choice.ended:
                    if text:
                        yield self.chunk(choice, text, None, is_first)
                    continue
                left -= 1
                try:
                    choice.check_ended()
                except ApiError as error:
                    yield event(error.body())
                    return
                more = {} if left else {"glm_foundry": self.choices.report()}
                yield self.chunk(choice, text, choice.finish_reason(), is_first, **more)
        if self.choices.disconnected:
            return
        if self.asked.include_usage:
            yield event(self.head | {"choices": [], "usage": self.usage()})
        yield DONE

    def chunk(
        self, choice: Choice, text: str, reason: str | None, with_prompt: bool, **more: Any
    ) -> str:
        entry = self.entry(choice, text, reason, self.logprobs(choice, with_prompt))
        usage = {"usage": None} if self.asked.include_usage else {}
        return event(self.head | {"choices": [entry]} | usage | more)


def token_text(tokenizer: "FamilyTokenizer", token: int) -> str:
    """A token's own text, its leading space too; its name where it is no text."""
    text = str(tokenizer.decode([token]))
    name = str(tokenizer.convert_ids_to_tokens(token))
    if name.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"
    if not text or "\ufffd" in text:
        return name or f"<{token}>"
    return text
