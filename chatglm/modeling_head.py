"""The language-model head of the bodies: logits, loss, generation, chat."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .chat import ChatMethods
from .layers import visible_keys
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_body import ChatGLMBody
from .stopping import PositionsEnd


def kept_positions(hidden_states: Tensor, kept: int | Tensor) -> Tensor:
    """The states (B, S, H) that logits are wanted of: transformers' rule, which 5.19 has not yet.

    Args:
        kept: the last so many positions (0: all); or positions (K,) of every row, or (B, K) of
            each, or a bool mask (B, S), whose states are returned as (true, H).
    """
    if isinstance(kept, int):
        return hidden_states[:, -kept:]
    if kept.ndim == 1:
        return hidden_states[:, kept]
    if kept.dtype == torch.bool:
        return hidden_states[kept]
    return hidden_states.take_along_dim(kept[..., None], dim=1)


class ChatGLMCausalLM(ChatMethods, ChatGLMPreTrainedModel, GenerationMixin):
    """The head: logits, loss and generation over `self.transformer`.

    The classes list GenerationMixin themselves: transformers looks for it among direct bases only.
    """

    transformer: ChatGLMBody
    lm_head: nn.Module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, vocabulary) and, with `labels` (B, S), the mean loss of the next token.

        Labels of -100 carry no loss.

        The other arguments are the body's. `logits_to_keep` > 0 keeps the last so many positions.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = kept_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.get_output_embeddings()(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def create_masks_for_generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache,
        position_ids: Tensor,
        **_: Any,
    ) -> Tensor | None:
        """The mask of generate()'s next call, which it builds itself for a cache of fixed size.

        Returns:
            (B or 1, 1, Q, keys), of the embeddings' dtype, to be added to scores; None as
            `attention_visibility`.
        """
        body = self.transformer
        padding = None if attention_mask is None else attention_mask.bool()
        visible = body.visibility(inputs_embeds.shape[1], padding, position_ids, past_key_values)
        if visible is None:
            return None
        visible = visible[..., body.prefix_length :]  # the body adds its prefix to any mask
        zeros = torch.zeros(visible.shape, dtype=inputs_embeds.dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(zeros.dtype).min)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; takes a 4-D mask (see `visible_keys`) too.

        Answers end where the model has no more positions.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            # The last row of a prompt sees every real column, so it is the 2-D mask.
            kwargs["attention_mask"] = visible_keys(mask)[:, 0, -1].long()
        if limit := self.transformer.max_positions:
            end = PositionsEnd(limit - self.transformer.prompt_length)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), end]
        depth = self.config.num_layers
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            # assistant_early_exit sets it for a while, and an error would leave it so
            self.config.num_layers = depth
