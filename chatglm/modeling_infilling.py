"""What models that fill blanks share: ChatGLM-6B, and GLM-350M and GLM-10B before it.

Layout of a row: context, <sop>, answer, <eop>. The context holds the mask token that the answer
fills, and is seen by every position; the answer is causal. Positions are pairs: (place, 0) in the
context, (place of the mask token, 1, 2, ...) from <sop> on.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from .layers import visible_keys
from .modeling_body import ChatGLMBody
from .modeling_head import ChatGLMCausalLM
from .packing import Packing


class InfillingMarks(NamedTuple):
    """Ids of the tokens that positions depend on.

    Attributes:
        sop: begins what fills a blank.
        eop: ends it, where a row may fill several; else None.
        masks: the blanks, in the order in which they are asked for where a row has several kinds.
        whole: that of `masks` which stands for a whole text.
        names: of `masks`, for errors.
    """

    sop: int
    eop: int | None
    masks: tuple[int, ...]
    whole: int
    names: str


class InfillingBody(ChatGLMBody):
    """The body of a model that fills blanks."""

    title = ""  # of the family, for errors
    word_embeddings: nn.Module

    @property
    def marks(self) -> InfillingMarks:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def read_packing(self, position_ids: Tensor) -> Packing:
        """The sequences of one row of positions (1, 2, S).

        One begins where place and block position are both 0.
        """
        place, block = position_ids[0]
        starts = ((place == 0) & (block == 0)).nonzero().flatten().tolist()
        starts = [0, *(s for s in starts if s)]
        lengths = [b - a for a, b in zip(starts, [*starts[1:], len(place)])]
        context = [int((part == 0).sum()) for part in block.split(lengths)]
        return Packing(lengths, [0] * len(lengths), context)

    def packed_positions(self, input_ids: Tensor, lengths: list[int], shared: list[int]) -> Tensor:
        """(1, 2, S) positions of sequences end to end in input_ids (1, S).

        Raises:
            ValueError: a shared trunk, which a context that looks ahead cannot have.
        """
        if any(shared):
            raise ValueError(
                f"{self.title}'s context looks ahead: sequences cannot share a beginning"
            )
        positions = [self.count_positions(ids) for ids in input_ids.split(lengths, dim=1)]
        return torch.cat(positions, dim=-1)

    def seen_by_all(self, position_ids: Tensor, past: int) -> Tensor:
        return F.pad(position_ids[:, 1] == 0, (past, 0))

    def count_positions(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, 2, S) places and block positions of whole rows. `padding` (B, S): True = real token.

        Raises:
            ValueError: a row has no <sop>, or no mask token.
        """
        raise NotImplementedError

    def real_tokens(self, input_ids: Tensor, padding: Tensor | None) -> Tensor:
        """(B, S) 1 = real token, 0 = padding.

        Raises:
            ValueError: `padding` has another length.
        """
        length = input_ids.shape[1]
        if padding is not None and padding.shape[-1] != length:
            raise ValueError(
                f"attention_mask must cover all {length} positions, got {padding.shape[-1]}"
            )
        return torch.ones_like(input_ids) if padding is None else padding.long()

    def check_marks(self, is_sop: Tensor, is_mask: Tensor) -> None:
        """Raises ValueError where a row of (B, S) has no <sop>, or no mask token."""
        marks = self.marks
        ids = " or ".join(map(str, marks.masks))
        check_every_row(is_sop, f"<sop> (id {marks.sop})", self.title)
        check_every_row(is_mask, f"{marks.names} (id {ids})", self.title)

    def token_positions(
        self,
        position_ids: Tensor | None,
        input_ids: Tensor | None,
        embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """(B, 2, S): by default found from the mask token and <sop>, continued from the cache.

        Another sequence of a packed row begins where both of its are 0. Of other programs' (B, S)
        count only the places where they begin anew, as sequences do.
        """
        if position_ids is None or position_ids.dim() != 3:
            ids = self.marks_of(embeds) if input_ids is None else input_ids
            position_ids = self.find_positions(ids, attention_mask, cache, position_ids)
        if cache is not None:
            # a field of ours, which find_positions reads
            cache.last_positions = last_positions(position_ids)  # type: ignore[attr-defined]
        return position_ids

    def marks_of(self, embeds: Tensor) -> Tensor:
        """(B, S) ids of the tokens that positions depend on, -1 for all others.

        embeds: (B, S, hidden_size); a token is known by its embedding.
        """
        found = self.marks
        names = [*found.masks, found.sop, *([] if found.eop is None else [found.eop])]
        marks = torch.tensor(names, device=embeds.device)
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for mark, vector in zip(marks, self.word_embeddings(marks)):
            ids[(embeds == vector).all(-1)] = mark
        return ids

    def find_positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Positions (B, 2, S): counted in a new row, or continued after the cache's last.

        Args:
            places: another program's (B, S) positions; a single row without mask holds a sequence
                from each 0 on.
        Raises:
            ValueError: the cache has no last positions for these rows, or `places` another shape.
        """
        if places is not None and places.shape[-1:] != input_ids.shape[-1:]:
            raise ValueError(
                f"{self.title}'s position_ids are (B, 2, S), got {list(places.shape)} "
                f"of {input_ids.shape[-1]} tokens"
            )
        if not self.cached_length(cache):
            if places is not None and len(input_ids) == 1 and attention_mask is None:
                starts = [0, *(places.flatten()[1:] == 0).nonzero().flatten().add(1).tolist()]
                ends = [*starts[1:], input_ids.shape[1]]
                lengths = [end - start for start, end in zip(starts, ends)]
                return self.packed_positions(input_ids, lengths, [0] * len(lengths))
            if attention_mask is not None and attention_mask.dim() == 4:
                attention_mask = visible_keys(attention_mask)[:, 0, -1]
            padding = None if attention_mask is None else attention_mask.bool()
            return self.count_positions(input_ids, padding)
        last = getattr(cache, "last_positions", None)
        if last is None or last.shape[0] not in (1, input_ids.shape[0]):
            raise ValueError(
                f"{self.title}: this cache does not know its positions; give position_ids (B, 2, S)"
            )
        return advance_positions(last, input_ids.shape[1]).expand(input_ids.shape[0], -1, -1)


def check_every_row(found: Tensor, name: str, title: str) -> None:
    """Raises ValueError where a row of `found` (B, S) bool has no True; `name` is what it lacks."""
    if not bool(found.any(-1).all()):
        row = int((~found.any(-1)).nonzero()[0])
        raise ValueError(f"{title}: row {row} of input_ids has no {name}; give position_ids")


def last_positions(position_ids: Tensor) -> Tensor:
    """(B, 2, 1) positions of each row's last real token, of position_ids (B, 2, S).

    Its block position is above 0; that of padding, on either side, is 0.
    """
    in_answer = (position_ids[:, 1] > 0).long()
    last = position_ids.shape[-1] - 1 - in_answer.flip(-1).argmax(-1)
    return position_ids.gather(-1, last[:, None, None].expand(-1, 2, 1))


def advance_positions(last: Tensor, count: int) -> Tensor:
    """(B, 2, count) positions after `last` (B, 2, 1): one place, block positions that count on."""
    steps = torch.arange(1, count + 1, device=last.device)
    return last + torch.stack([torch.zeros_like(steps), steps])


class InfillingCausalLM(ChatGLMCausalLM):
    """A body that fills blanks with its output layer, for generate()."""

    transformer: InfillingBody

    # generate() counts positions in one dimension; these methods give it pairs.

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{self.transformer.title} cannot extend a cache with a new prompt: "
                "its context is bidirectional"
            )
        padding = None if mask is None else mask.bool()
        if inputs_tensor.dim() == 3:
            inputs_tensor = self.transformer.marks_of(inputs_tensor)
        return self.transformer.count_positions(inputs_tensor, padding)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ChatGLMCausalLM.generate; without negative_prompt_ids guidance is against no text."""
        scale = self.generation_option("guidance_scale", kwargs)
        given: Any = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        given = given if inputs is None else inputs
        is_guided = scale not in (None, 1) and given is not None
        if is_guided and kwargs.get("negative_prompt_ids") is None:
            beams = self.generation_option("num_beams", kwargs) or 1
            answers = self.generation_option("num_return_sequences", kwargs) or 1
            marks = [self.transformer.marks.whole, self.transformer.marks.sop]
            no_text = torch.tensor([marks], device=given.device)
            kwargs["negative_prompt_ids"] = no_text.expand(len(given) * max(beams, answers), -1)
        return super().generate(inputs, *args, **kwargs)

    def generation_option(self, name: str, kwargs: dict[str, Any]) -> Any:
        """What a call of generate() with `kwargs` means by an option."""
        config = kwargs.get("generation_config") or self.generation_config
        return kwargs.get(name, getattr(config, name))

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        positions = model_kwargs.pop("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        following = advance_positions(positions[..., -1:], num_new_tokens)
        return model_kwargs | {"position_ids": torch.cat([positions, following], dim=-1)}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        position_ids = model_kwargs.pop("position_ids", None)
        # transformers types self as a class of its own, of which no model is
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs
