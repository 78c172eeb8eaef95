"""What the bodies share: virtual tokens, masks, packed rows, and the run through the blocks."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .layers import (
    AttentionMask,
    Device,
    PrefixEncoder,
    PromptEncoder,
    attention_visibility,
    padding_mask,
    visible_keys,
)
from .modeling_base import ChatGLMPreTrainedModel
from .packing import (
    PackedMasks,
    Packing,
    consecutive_positions,
    find_sequences,
    positions_end_to_end,
)


class LayerInputs(NamedTuple):
    """What `run_layers` gives to the blocks, with virtual tokens added."""

    hidden_states: Tensor  # (B, S, hidden_size)
    position_ids: Tensor
    mask: AttentionMask
    prefixes: int  # how many copies of v2's prefix the rows or their sequences need
    keep: Tensor | None  # (N,) places that the last layer computes, None for all
    text: slice | Tensor  # the places that are no virtual tokens


class ChatGLMBody(ChatGLMPreTrainedModel):
    """How virtual tokens and masks reach a body.

    Callers never count virtual tokens: not in masks, not in positions.
    """

    prefix_encoder: PrefixEncoder | PromptEncoder | None
    max_positions: int | None = None  # the most tokens of a sequence; None: positions have no table

    def check_length(self, length: int, cache: Cache | None, position_ids: Tensor | None) -> None:
        """Raises ValueError where `length` more tokens leave the table of positions.

        Virtual tokens of P-Tuning v1 count as well.
        """
        limit, past = self.max_positions, self.cached_length(cache)
        if limit is None or not isinstance(past, int):
            return
        own = 0 if past else self.prompt_length
        wanted = past + length + own
        if wanted > limit and position_ids is not None:  # packed rows begin anew at 0
            wanted = int(position_ids.max()) + 1 + self.prompt_length
        if wanted > limit:
            raise ValueError(f"the model has {limit} positions, {wanted} are asked for")

    @property
    def blocks(self) -> Iterable[Any]:
        """The transformer blocks, in order."""
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block."""
        raise NotImplementedError

    def packed_positions(self, input_ids: Tensor, lengths: list[int], shared: list[int]) -> Tensor:
        """The positions, the sequence last, of sequences end to end in input_ids (1, S).

        Those that share a trunk count on from it.
        """
        return positions_end_to_end(input_ids, lengths, shared)

    def read_packing(self, position_ids: Tensor) -> Packing:
        """The sequences of one row of positions."""
        return Packing(*find_sequences(position_ids[0]))

    def rotary(self, position_ids: Tensor) -> Tensor:
        """The rotary turns of each position, complex64."""
        raise NotImplementedError

    def with_positions(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings with what positions add to them, what of positions each block is given).

        By default nothing is added, and blocks get rotary turns.
        """
        return embeds, self.rotary(position_ids)[:, :, None]

    def default_positions(
        self, padding: Tensor | None, past: int, length: int, device: Device
    ) -> Tensor:
        """(B or 1, length) positions after `past` cached ones; padding is not counted."""
        return consecutive_positions(padding, past, length, device)

    def token_positions(
        self,
        position_ids: Tensor | None,
        input_ids: Tensor | None,
        embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor | None:
        """The positions of forward's tokens; None for `default_positions`."""
        return position_ids

    def virtual_tokens(self, batch: int) -> Tensor:
        """The prefix encoder's output. Raises ValueError where the model has none."""
        if self.prefix_encoder is None:
            raise ValueError("the model was built without virtual tokens (pre_seq_len)")
        return self.prefix_encoder(batch)

    @property
    def prefix_length(self) -> int:
        """v2's key columns, which stand beside the sequence and its cache."""
        return (self.config.pre_seq_len or 0) if self.config.prefix_version == "v2" else 0

    @property
    def prompt_length(self) -> int:
        """v1's vectors, which are positions of the sequence and enter its cache."""
        return (self.config.pre_seq_len or 0) if self.config.prefix_version == "v1" else 0

    @staticmethod
    def cached_length(cache: Cache | None) -> int | Tensor:
        """Positions in a cache, v1's vectors included; 0 for None.

        A cache of fixed size counts them in a tensor, which compiled code does not read.
        """
        return 0 if cache is None else cache.get_seq_length()

    @staticmethod
    def has_fixed_size(cache: Cache | None) -> bool:
        """Whether a cache gives keys for all places that it will ever hold (StaticCache)."""
        return cache is not None and cache.is_compileable

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, S) or inputs_embeds (B, S, hidden_size), never with P-Tuning's virtual
                tokens.
            attention_mask: (B, cached + S), 1 = real token, padded on either side; or
                (B, 1, S, cached + S), as the originals or transformers build it
                (see layers.visible_keys).
            position_ids: (B, S), or (B, 2, S) of models that fill blanks (modeling_infilling.py);
                by default counted from the mask, or from 0. Without mask and cache another
                sequence begins where those of a single row fall back, and the two cannot see each
                other (see packing.py).
            keep: (N,) ascending places of a single row: the last layer computes these alone, and
                the result is (1, N, hidden_size).
        Raises:
            ValueError: there are more positions than the model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        position_ids = self.token_positions(
            position_ids, input_ids, embeds, attention_mask, past_key_values
        )
        self.check_length(embeds.shape[1], past_key_values, position_ids)
        packing = self.find_packing(
            position_ids, attention_mask, past_key_values, len(embeds), keep
        )
        hidden_states = self.run_layers(
            self.blocks, embeds, attention_mask, position_ids, past_key_values, packing, **kwargs
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )

    def prepend_prompt(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: int | Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Put v1's vectors before the first input and extend mask and positions; else no change.

        Positions have the sequence last; of ChatGLM-6B's (B, 2, S) positions the second row holds
        block positions. Returns the new embeds, attention_mask and position_ids.
        """
        count = self.prompt_length
        if not count:
            return embeds, attention_mask, position_ids
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError("with P-Tuning v1 give a 2-D attention_mask (1 = real token)")
            attention_mask = F.pad(attention_mask, (count, 0), value=1)
        if position_ids is not None:
            virtual_positions, shift = prompt_positions(position_ids, count)
            position_ids = position_ids + shift
            if past == 0:
                virtual_positions = virtual_positions.expand(*position_ids.shape[:-1], count)
                position_ids = torch.cat([virtual_positions, position_ids], dim=-1)
        if past == 0:
            virtual = self.virtual_tokens(embeds.shape[0]).to(embeds.dtype)
            embeds = torch.cat([virtual, embeds], dim=1)
        return embeds, attention_mask, position_ids

    def find_packing(
        self,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        batch: int,
        keep: Tensor | None,
    ) -> Packing | None:
        """The packing that positions imply or `keep` asks for; None where rows are one sequence.

        Positions imply several sequences only where neither mask nor cache came with them.

        Raises:
            ValueError: several rows that hold several sequences; `keep` without the positions of
                one row, or together with a mask or cache.
        """
        alone = attention_mask is None and not self.has_fixed_size(past_key_values)
        alone = alone and not self.cached_length(past_key_values)
        if keep is not None and (position_ids is None or batch > 1 or not alone):
            raise ValueError(
                "`keep` needs position_ids and one row, without attention_mask or cache"
            )
        if position_ids is None or not alone:
            return None
        if position_ids.shape[0] > 1:
            self.check_one_sequence_each(position_ids)
            return None
        packing = self.read_packing(position_ids)
        if len(packing.lengths) == 1 and keep is None:
            return None
        if batch > 1 and len(packing.lengths) > 1:
            raise ValueError("positions fall back: put the sequences in one row")
        return replace(packing, keep=keep)

    def check_one_sequence_each(self, position_ids: Tensor) -> None:
        """Raises ValueError where one of several rows holds several sequences."""
        for row in position_ids:
            if len(self.read_packing(row[None]).lengths) > 1:
                raise ValueError(
                    "positions fall back: put the sequences in one row, "
                    "or give an attention_mask for padded rows"
                )

    def prepend_prompts(
        self, embeds: Tensor, position_ids: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor, Packing, Tensor]:
        """`prepend_prompt` in a packed row: v1's vectors before each sequence that sees no trunk.

        Returns:
            embeds, position_ids and packing with the vectors in them, and (S,) the new places of
            the row's own tokens.
        """
        count = self.prompt_length
        virtual_positions, shift = prompt_positions(position_ids, count)
        virtual = self.virtual_tokens(1).to(embeds.dtype)
        rows, positions = [], []
        for i, row in enumerate(embeds.split(packing.lengths, dim=1)):
            if not packing.shared[i]:
                rows.append(virtual)
            rows.append(row)
        for i, part in enumerate((position_ids + shift).split(packing.lengths, dim=-1)):
            if not packing.shared[i]:
                positions.append(virtual_positions.expand(*part.shape[:-1], count))
            positions.append(part)
        packing, places = packing.with_prompt(count)
        return torch.cat(rows, dim=1), torch.cat(positions, dim=-1), packing, places

    def run_layers(
        self,
        layers: Iterable[Any],
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        packing: Packing | None,
        **kwargs: Any,
    ) -> Tensor:
        """Run embeddings (B, S, hidden_size) through all blocks, with virtual tokens added.

        `packing` is `find_packing`'s result, the other arguments are the body's. Returns
        (B, S, hidden_size), or (1, N, hidden_size) of the N places that the packing keeps.
        """
        if packing is not None and position_ids is not None:
            inputs = self.packed_inputs(hidden_states, position_ids, packing)
        else:
            inputs = self.padded_inputs(
                hidden_states, attention_mask, position_ids, past_key_values
            )
        hidden_states, position_ids, mask, prefixes, keep, text = inputs
        prefix = self.virtual_tokens(prefixes) if self.config.prefix_version == "v2" else None
        hidden_states, turns = self.with_positions(hidden_states, position_ids)
        blocks = list(layers)
        depth = min(len(blocks), self.config.num_layers)  # generate() may exit early by it
        for i, block in enumerate(blocks[:depth]):
            layer_prefix = prefix[2 * i : 2 * i + 2] if prefix is not None else None
            if keep is not None and i == depth - 1 and isinstance(mask, PackedMasks):
                mask, kwargs = mask.of_last_layer(keep), kwargs | {"keep": keep}
            hidden_states = block(
                hidden_states, mask, turns, layer_prefix, past_key_values=past_key_values, **kwargs
            )
        return hidden_states if keep is not None else hidden_states[:, text]

    def packed_inputs(self, embeds: Tensor, position_ids: Tensor, packing: Packing) -> LayerInputs:
        """The blocks' inputs of a packed row: v1's vectors before its sequences, their masks."""
        text: slice | Tensor = slice(-embeds.shape[1], None)
        if self.prompt_length:
            embeds, position_ids, packing, text = self.prepend_prompts(
                embeds, position_ids, packing
            )
        backend = self.config._attn_implementation
        mask = packing.masks(self.prefix_length, embeds.device, backend)
        return LayerInputs(embeds, position_ids, mask, len(packing.lengths), packing.keep, text)

    def padded_inputs(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> LayerInputs:
        """The blocks' inputs of rows of one sequence each, after those in the cache."""
        batch, text_length = embeds.shape[:2]
        past = self.cached_length(cache)
        embeds, attention_mask, position_ids = self.prepend_prompt(
            embeds, attention_mask, position_ids, past
        )
        length = embeds.shape[1]
        mask, padding = self.split_mask(attention_mask, past + length)
        if position_ids is None:
            position_ids = self.default_positions(padding, int(past), length, embeds.device)
        if mask is None:
            mask = self.visibility(length, padding, position_ids, cache)
        return LayerInputs(embeds, position_ids, mask, batch, None, slice(-text_length, None))

    def visibility(
        self, length: int, padding: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """`attention_visibility` of `length` new positions, which the cache does not hold yet.

        Raises:
            ValueError: the cache has a fixed size, which P-Tuning v1's vectors would not fit.
        """
        past = self.cached_length(cache)
        first, keys, context = None, past + length, None
        if cache is not None and self.has_fixed_size(cache):
            if self.prompt_length:
                raise ValueError("P-Tuning v1 needs a cache that grows, such as DynamicCache")
            first, keys = past, cache.get_mask_sizes(length, 0)[0]
            if padding is not None:
                padding = F.pad(padding, (0, keys - padding.shape[-1]), value=True)
        if first is None or length > 1:
            context = self.seen_by_all(position_ids, int(past))
        if context is not None:
            context = F.pad(context, (0, int(keys) - context.shape[-1]))
        return attention_visibility(
            q_len=length,
            kv_len=int(keys),
            device=position_ids.device,
            padding=padding,
            context=context,
            prefix_len=self.prefix_length,
            backend=self.config._attn_implementation,
            first=first,
        )

    def seen_by_all(self, position_ids: Tensor, past: int) -> Tensor | None:
        """(B, past + S) bool: keys that every row sees, later ones too; None if all is causal."""
        return None

    def split_mask(
        self, attention_mask: Tensor | None, kv_len: int | Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(4-D visibility, 2-D padding), one of them None.

        The first where the caller gave a 4-D mask (see `visible_keys`), else the second.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            if "flash" in self.config._attn_implementation:
                raise ValueError(
                    "flash attention takes a 2-D attention_mask (1 = real token), got a 4-D one"
                )
            visible = visible_keys(attention_mask)
            return F.pad(visible, (self.prefix_length, 0), value=True), None
        if attention_mask is None:
            return None, None
        return None, padding_mask(attention_mask, int(kv_len), self.prompt_length)


def prompt_positions(position_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of `count` virtual tokens at the front, and what they add to those after them.

    For `position_ids` (B, S): (count,) and (1,). For ChatGLM-6B's (B, 2, S): (2, count) and (2, 1);
    block positions of virtual tokens are 0 and do not shift the others.
    """
    device = position_ids.device
    positions = torch.arange(count, device=device)
    if position_ids.dim() != 3:
        return positions, torch.tensor([count], device=device)
    positions = torch.stack([positions, torch.zeros_like(positions)])
    return positions, torch.tensor([[count], [0]], device=device)
