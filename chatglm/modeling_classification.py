"""ChatGLM with a linear layer in the place of the output layer: classes, a number, a reward.

transformers' AutoModelForSequenceClassification gives the families' classes, so TRL's RewardTrainer
takes a folder's name. With `num_labels` 1 the layer's output is a score.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from .layers import visible_keys
from .modeling_base import ChatGLMPreTrainedModel
from .modeling_body import ChatGLMBody


class ChatGLMClassifier(ChatGLMPreTrainedModel):
    """`score`, a linear layer without bias, of the last token's hidden state."""

    body_class: type[ChatGLMBody]
    new_parts = (*ChatGLMPreTrainedModel.new_parts, "score.")

    def __init__(self, config: Any):  # transformers' types leave open how many labels there are
        super().__init__(config)
        self.transformer = self.body_class(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) of each row's last real token; a loss with `labels` (B,).

        The other arguments are the body's. Without a mask the last token is the last that is not
        `pad_token_id`; of inputs_embeds, the last of all.
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
        states = outputs.last_hidden_state
        last = self.last_places(states, input_ids, attention_mask)
        rows = torch.arange(len(states), device=states.device)
        logits = self.score(states[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def last_places(
        self, states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """(B,) places of the rows' last real tokens."""
        rows, length = states.shape[:2]
        if attention_mask is not None and attention_mask.dim() == 4:
            visible = visible_keys(attention_mask)[:, 0]
            real = visible.diagonal(visible.shape[-1] - length, -2, -1)
        elif attention_mask is not None:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None:
            real = input_ids != self.config.pad_token_id
        else:
            real = states.new_ones(rows, length, dtype=torch.bool)
        places = torch.arange(length, device=states.device)
        return (places * real).argmax(-1)
