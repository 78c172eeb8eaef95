"""/v1/embeddings: the mean of a prompt's hidden states, by the served model. Free of torch."""

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as Http

from serving.server.access import ApiError
from serving.server.choices import Choice, Choices
from serving.server.fields import SAMPLING, Encoding, FieldTable, Prompts
from serving.server.generation import (
    GenerationRequest,
    PromptIds,
    longest_sizes,
    raw_prompt,
)
from serving.server.service import AnswerGroup, Service

if TYPE_CHECKING:
    from chatglm.family_tokenizer import FamilyTokenizer

EMBEDDING_TABLE = FieldTable(
    {
        "input": Prompts("A text, token ids, or a list of at most 128 of either."),
        "model": SAMPLING["model"],
        "encoding_format": Encoding("float: a list; base64: of little-endian float32."),
        "slo_s": SAMPLING["slo_s"],
        "priority": SAMPLING["priority"],
    },
    {"dimensions": ()},
    "input",
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(GenerationRequest):
    """A body of /v1/embeddings, checked.

    Attributes:
        inputs: each a text or token ids.
        as_base64: how the vectors are given.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    as_base64: bool = False
    max_tokens: int | None = 1  # the engine's one token is left out

    @property
    def prompt_count(self) -> int:
        return len(self.inputs)

    @property
    def embeds(self) -> bool:
        return True

    def sizes(self) -> tuple[int, int]:
        return longest_sizes(self.inputs)

    def encoded(
        self, tokenizer: "FamilyTokenizer", prompt_options: dict[str, Any]
    ) -> list[PromptIds]:
        return [raw_prompt(tokenizer, text) for text in self.inputs]


def parse_embedding(body: Any) -> EmbeddingRequest:
    """The request in a body's JSON.

    Raises:
        ValueError: in one line, where a field is refused.
    """
    fields_read = EMBEDDING_TABLE.read(body)
    fields_read["inputs"] = fields_read.pop("input")
    fields_read["as_base64"] = fields_read.pop("encoding_format", False)
    return EmbeddingRequest(**fields_read, unknown_fields=EMBEDDING_TABLE.unknown(body))


class EmbeddingResponse:
    """The response to an embedding request."""

    def __init__(
        self, service: Service, asked: EmbeddingRequest, group: AnswerGroup, http: Http
    ) -> None:
        self.service, self.asked = service, asked
        self.choices = Choices(service, asked, group, http)

    async def complete(self) -> dict[str, Any]:
        await self.choices.texts()
        vectors = [self.vector(choice) for choice in self.choices.all]
        tokens = self.choices.usage()["prompt_tokens"]
        model = self.asked.model or self.service.name
        return embedding_list(vectors, tokens, self.asked.as_base64, model)

    @staticmethod
    def vector(choice: Choice) -> np.ndarray:
        """(hidden_size,), of length 1. Raises ApiError where the states are no vector."""
        states = choice.active.answer.embedding
        assert states is not None  # the prompt was read before the answer could end
        vector = np.asarray(states.cpu(), np.float32)
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or not length:
            raise ApiError(500, "the model's hidden states are zero or not finite", "failed")
        return vector / length


def embedding_list(
    vectors: list[np.ndarray], tokens: int, as_base64: bool, model: str
) -> dict[str, Any]:
    """OpenAI's response of vectors (D,), for which so many tokens were read."""
    objects = []
    for index, vector in enumerate(vectors):
        values: Any = vector.tolist()
        if as_base64:
            values = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        objects.append({"object": "embedding", "index": index, "embedding": values})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": objects, "model": model, "usage": usage}
