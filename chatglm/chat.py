"""The methods of a model that chat: one answer, a stream, a batch; the originals' parts of them.

Their sources are the modeling files of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, and UELLM's
`chat_batch`.
"""

import copy
from collections.abc import Generator, Iterator
from contextlib import closing
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchEncoding, Cache, DynamicCache

from .families import FAMILIES, family_of
from .files import shorten
from .histories import Answer, History, history_rounds, new_round
from .prompts import split_at

if TYPE_CHECKING:
    from .tokenization_base import ChatGLMTokenizer


class ChatMethods:
    """What `ChatGLMCausalLM` has for chats, over its `generate`."""

    config: Any
    device: Any
    generate: Any

    @torch.inference_mode()
    def chat(
        self,
        tokenizer: "ChatGLMTokenizer",
        query: str,
        history: History | None = None,
        role: str = "user",
        **options: Any,
    ) -> tuple[Answer, History]:
        """One turn of a conversation: (answer, new history), sampled as the originals sample.

        Args:
            history: (query, answer) pairs or message dicts with role, content and, for ChatGLM3's
                system, tools.
            role: ChatGLM3 only: whose turn `query` is (user, observation, system).
            options: generate()'s; the defaults are the family's (`chat_defaults`). `max_length`
                counts the prompt.
        Returns:
            ChatGLM3's answer is a dict where it calls a tool or the code interpreter, and its
            history is messages; the others' history has the form of the given one, pairs where
            none is given.
        Raises:
            ValueError: the history has another form, or says what the family cannot.
        """
        inputs, options = self.prepare_chat(tokenizer, query, history, role, options)
        prompt_length = inputs["input_ids"].shape[1]
        ids = self.generate(**inputs, **options)[0, prompt_length:].tolist()
        # Decoding would write ChatGLM3's role tokens out by name.
        ids = [i for i in ids if i not in options["eos_token_id"]]
        return self.finish_chat(tokenizer, ids, query, history, role)

    @torch.inference_mode()
    def stream_chat(
        self,
        tokenizer: "ChatGLMTokenizer",
        query: str,
        history: History | None = None,
        role: str = "user",
        past_key_values: Cache | None = None,
        return_past_key_values: bool = False,
        **options: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """As `chat`, but yields (answer so far, history so far), and chat's result at the end.

        With `return_past_key_values` a third item is the cache: given with the next turn, it saves
        recomputing what the turns share. Not for ChatGLM-6B, whose context is bidirectional, nor
        for P-Tuning v1.
        """
        inputs, options = self.prepare_chat(tokenizer, query, history, role, options)
        prompt = inputs["input_ids"][0].tolist()
        cache = past_key_values
        if return_past_key_values or cache is not None:
            cache = options["past_key_values"] = self.shared_cache(tokenizer, prompt, cache)

        def result() -> tuple[Any, ...]:
            answer = self.finish_chat(tokenizer, ids, query, history, role)
            return (*answer, cache) if return_past_key_values else answer

        ids: list[int] = []
        try:
            # closing: a caller who stops reading cancels the generation
            with closing(self.stream_steps(inputs | options)) as steps:
                for step in steps:
                    token = int(step[0])
                    if token in options["eos_token_id"]:
                        continue
                    ids.append(token)
                    text = decode_text(tokenizer, ids)
                    if text and not text.endswith("\ufffd"):  # half of a character
                        yield result()
        finally:
            if cache is not None:
                remember_ids(cache, prompt + ids)
        yield result()

    def shared_cache(
        self, tokenizer: "ChatGLMTokenizer", prompt: list[int], cache: Cache | None
    ) -> Cache:
        """A cache of what the last turn's ids and the prompt share; a new one for None.

        Raises:
            ValueError: the family or P-Tuning v1 cannot reuse a cache.
        """
        family = family_of(tokenizer)
        if family.infills or self.config.prefix_version == "v1":
            title = family.title if family.infills else "P-Tuning v1"
            raise ValueError(f"{title} cannot go on from another turn's cache")
        cache = cache or DynamicCache(config=self.config)
        shared = shared_length(prompt[:-1], getattr(cache, "token_ids", []))
        unshared = cache.get_seq_length() - shared
        if unshared:
            cache.crop(-unshared)
        remember_ids(cache, prompt[:shared])
        return cache

    def stream_steps(self, options: dict[str, Any]) -> Generator[Tensor, None, None]:
        """The ids (B,) of each step of generate(**options), in a thread; raises what it raises.

        Closing the generator cancels the generation.
        """
        streamer = StepStreamer()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self.generate(**options, streamer=streamer)
            except BaseException as error:  # a thread must not swallow what its caller should see
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.abandoned = True
            thread.join()  # it may be within a step, which writes into the cache
        if failure:
            raise failure[0]

    @torch.inference_mode()
    def stream_generate(
        self, input_ids: Tensor, return_past_key_values: bool = False, **options: Any
    ) -> Iterator[Any]:
        """Yields ids (B, S + n), the prompt's included, after generate's step n = 1, 2, ...

        Args:
            input_ids: (B, S).
            options: generate()'s.
        Yields:
            the ids, with `return_past_key_values` also the cache.
        """
        if return_past_key_values and options.get("past_key_values") is None:
            options["past_key_values"] = DynamicCache(config=self.config)
        ids = input_ids
        with closing(self.stream_steps(options | {"inputs": input_ids})) as steps:
            for step in steps:
                ids = torch.cat([ids, step.to(ids.device)[:, None]], dim=1)
                yield (ids, options["past_key_values"]) if return_past_key_values else ids

    @torch.inference_mode()
    def chat_batch(
        self,
        tokenizer: "ChatGLMTokenizer",
        queries: list[str],
        histories: list[History] | None = None,
        **options: Any,
    ) -> tuple[list[Answer], Tensor, BatchEncoding]:
        """One turn of several conversations in one batch. Source: UELLM's modified ChatGLM2.

        UELLM writes a prompt of its own (a bare query, English labels); here each row is the prompt
        of `chat`.

        Args:
            queries, histories: one of each per conversation; no histories: none has any.
            options: as `chat`'s.
        Returns:
            (answers, ids (B, S + n) that generate returned, the padded inputs (B, S)).
        Raises:
            ValueError: there are no queries, or not as many histories.
        """
        if isinstance(queries, str):
            raise ValueError(f"chat_batch takes a list of queries, got one: {shorten(queries)}")
        histories = [[] for _ in queries] if histories is None else histories
        if not queries or len(histories) != len(queries):
            raise ValueError(
                f"chat_batch needs a history per query; got {len(queries)} queries and "
                f"{len(histories)} histories"
            )
        rows = []
        for query, history in zip(queries, histories):
            rows.append(self.chat_ids(tokenizer, query, history, "user"))
        inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device)
        options = self.chat_options(tokenizer, options)
        output = self.generate(**inputs, **options)
        answers = []
        for row, query, history in zip(output, queries, histories):
            ids = row[inputs["input_ids"].shape[1] :].tolist()
            ids = [i for i in ids if i not in options["eos_token_id"]]
            answers.append(self.finish_chat(tokenizer, ids, query, history, "user")[0])
        return answers, output, inputs

    def build_inputs(
        self, tokenizer: "ChatGLMTokenizer", query: str, history: History | None = None
    ) -> BatchEncoding:
        """The model's inputs (1, S) for a chat: history, then the query."""
        ids = self.chat_ids(tokenizer, query, history, "user")
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self.device)

    def build_stream_inputs(
        self, tokenizer: "ChatGLMTokenizer", query: str, history: History | None = None
    ) -> BatchEncoding:
        """What a chat's newest turn (1, S) adds to a cache of the turns before it.

        Raises ValueError for ChatGLM-6B and GLM-10B, whose context is bidirectional.
        """
        family = family_of(tokenizer)
        if family.infills:
            raise ValueError(f"{family.title} cannot go on from another turn's cache")
        # build_inputs refuses a history of families that know none
        if not history or family.raw or not (family.roles or family.name == "glm2"):
            return self.build_inputs(tokenizer, query, history)
        if family.roles:
            ids = self.chat_ids(tokenizer, query, None, "user")[2:]  # without [gMASK] sop
        else:
            turn = history_rounds(history, query, "ChatGLM2-6B")[0]
            text = f"\n\n[Round {len(turn) + 1}]\n\n问：{query}\n\n答："
            ids = tokenizer.encode_text(text)[1:]  # without SentencePiece's leading space
        inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
        del inputs["position_ids"]  # they count on from the cache
        del inputs["attention_mask"]
        return inputs.to(self.device)

    def process_response(self, response: str, history: History | None = None) -> Any:
        """An answer's text, as `chat` returns it.

        Args:
            history: with roles: the messages up to the query; (answer, new history) is returned.
        """
        family = FAMILIES[self.config.glm_family or ("glm2" if history is None else "glm3")]
        if family.roles:
            return family.process_response(response, history)
        return family.process_response(response)

    def prepare_chat(
        self,
        tokenizer: "ChatGLMTokenizer",
        query: str,
        history: History | None,
        role: str,
        options: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(model inputs, generate options) of one turn."""
        ids = self.chat_ids(tokenizer, query, history, role)
        inputs = {"input_ids": torch.tensor([ids], device=self.device)}
        return inputs, self.chat_options(tokenizer, options)

    def chat_ids(
        self, tokenizer: "ChatGLMTokenizer", query: str, history: History | None, role: str
    ) -> list[int]:
        """The prompt's ids of one turn."""
        # A fine-tuned ChatGLM-6B counts rounds as its training prompts do.
        counts_rounds = getattr(self.config, "chat_prompt", None) == "rounds"
        form = {"rounds": True} if counts_rounds else {}
        return family_of(tokenizer).encode_chat(tokenizer, query, history, role, **form)

    def chat_options(
        self, tokenizer: "ChatGLMTokenizer", options: dict[str, Any]
    ) -> dict[str, Any]:
        """generate's options of a chat: the family's, then those given."""
        stops = tokenizer.stop_ids
        defaults = family_of(tokenizer).chat_defaults | {
            "eos_token_id": stops,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if "max_new_tokens" in options:
            del defaults["max_length"]
        options = defaults | options
        refuse_other_outputs(options)
        if isinstance(options["eos_token_id"], int):
            options["eos_token_id"] = [options["eos_token_id"]]
        options["eos_token_id"] = options["eos_token_id"] or stops
        if not options["do_sample"]:
            options |= {"top_p": None, "temperature": None, "top_k": None}
        return options

    def finish_chat(
        self,
        tokenizer: "ChatGLMTokenizer",
        ids: list[int],
        query: str,
        history: History | None,
        role: str,
    ) -> tuple[Answer, History]:
        """(answer, new history) from the generated ids."""
        family = family_of(tokenizer)
        history = copy.deepcopy(list(history or []))
        if family.roles:
            # An answer of several messages: the role token between them is told by its id, since
            # its name may also be text, and decoding leaves it out.
            parts = split_at(ids, tokenizer.get_command("<|assistant|>"))
            texts = [decode_text(tokenizer, part) for part in parts]
            return family.process_response(texts, [*history, {"role": role, "content": query}])
        answer = family.process_response(decode_text(tokenizer, ids))
        return answer, history + new_round(history, query, answer)


def decode_text(tokenizer: "ChatGLMTokenizer", ids: list[int]) -> str:
    """The text of one row of ids, without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)  # a list only for several rows
    return text


def remember_ids(cache: Cache, ids: list[int]) -> None:
    """Note in a cache which ids its positions hold: a field of ours, which shared_cache reads."""
    cache.token_ids = ids[: cache.get_seq_length()]  # type: ignore[attr-defined]


def refuse_other_outputs(options: dict[str, Any]) -> None:
    """Raises ValueError for options of generate() by which a chat would have other outputs."""
    if options.get("num_return_sequences", 1) != 1 or options.get("return_dict_in_generate"):
        raise ValueError(
            "a chat has one answer, as text: num_return_sequences and return_dict_in_generate are "
            "for generate()"
        )


def shared_length(a: list[int], b: list[int]) -> int:
    """The length of the beginning that two sequences of ids have in common."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


class StepStreamer:
    """generate()'s streamer as an iterator of each step's ids (B,), without the prompt's.

    `put` raises RuntimeError once `abandoned` is set, which ends the generation.
    """

    def __init__(self) -> None:
        self.steps: Queue[Tensor | None] = Queue()
        self.prompt_seen = False
        self.abandoned = False

    def put(self, value: Tensor) -> None:
        if self.abandoned:
            raise RuntimeError("the reader of this stream has stopped")
        if self.prompt_seen:
            self.steps.put(value.flatten())
        self.prompt_seen = True

    def end(self) -> None:
        self.steps.put(None)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.steps.get, None)
