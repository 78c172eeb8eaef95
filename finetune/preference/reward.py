"""train.py --task reward: a model that scores answers, trained on pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.checkpoint import export_model, inner_state
from finetune.files import write_json
from finetune.loss import ragged_states
from finetune.preference.config import RewardConfig
from finetune.preference.rows import PreferenceTask, rows_of_groups
from finetune.rows.batches import lay_end_to_end
from finetune.rows.groups import RowGroups

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VALUE_HEAD = "value_head.safetensors"
REWARD_CARD = "reward.json"


class RewardNetwork(nn.Module):
    """A language model's last hidden state -> one linear layer without bias -> a score.

    Attributes:
        model: with its output layer, which no score needs.
    """

    def __init__(self, model: nn.Module, hidden_size: int):
        super().__init__()
        self.model = model
        self.value_head = nn.Linear(hidden_size, 1, bias=False)
        # arXiv 2009.01325, appendix B.1.
        nn.init.normal_(self.value_head.weight, std=1 / (hidden_size + 1) ** 0.5)

    @property
    def config(self) -> "PretrainedConfig":
        model: Any = self.model  # torch types a submodule as Tensor | Module
        return model.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        model: Any = self.model
        model.gradient_checkpointing_enable(**options)

    def forward(
        self, input_ids: Tensor, lengths: list[int], shared: list[int], keep: Tensor
    ) -> Tensor:
        """(N,) fp32 scores at the places `keep` (N,) of a ragged row; as nll_sum's arguments."""
        states = ragged_states(self.model, input_ids, lengths, shared, keep)
        return self.value_head(states.to(self.value_head.weight.dtype))[:, 0].float()


def answer_ends(ids: list[Any], *, share: bool, multiple: int) -> dict[str, Any]:
    """The arguments of RewardNetwork for the last tokens of sequences of ids.

    More places may follow those of the sequences, which make up a `multiple`.
    """
    # As rows whose last token predicts one more, which is never read.
    sequences, masked = [], []
    for row in ids:
        sequences.append([*row, 0])
        masked.append(len(row))
    packed = lay_end_to_end(sequences, masked, share, multiple)
    return {
        "input_ids": packed["input_ids"],
        "lengths": packed["lengths"],
        "shared": packed["shared"],
        "keep": packed["keep"],
    }


class RewardLoss(nn.Module):
    """-log sigmoid(s(w) - s(l) - margin) + center (s(w) + s(l))^2, summed over pairs.

    The first term is that of arXiv 2203.02155 eq. 1 with the margin of arXiv 2307.09288 eq. 2, the
    second that of arXiv 2312.09244 section 3; w is the better answer and s a score.
    """

    def __init__(self, network: RewardNetwork, *, center: float):
        super().__init__()
        self.network = network
        self.center = center

    def scores(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, 2) fp32 of a batch of RewardTraining.collate."""
        names = ("input_ids", "lengths", "shared", "keep")
        scores = self.network(**{name: batch[name] for name in names})
        return scores[: 2 * len(batch["real"])].view(-1, 2)

    def losses(self, scores: Tensor, margins: Tensor) -> Tensor:
        """(B,) of scores (B, 2) and margins (B,)."""
        difference = scores[:, 0] - scores[:, 1] - margins
        losses = -F.logsigmoid(difference)
        if self.center:
            losses = losses + self.center * scores.sum(1) ** 2
        return losses

    def forward(self, scale: float = 1.0, *, output: str = "loss", **batch: Any) -> Tensor:
        """`scale` times the loss, or where `output` is "sums", those.

        Both go through the module's call, at whose ends ZeRO-3 gives its gathered weights back.
        """
        if output == "sums":
            return self.sums(batch)
        losses = self.losses(self.scores(batch), batch["margins"])
        return scale * torch.sum(losses * batch["real"])

    def sums(self, batch: Mapping[str, Any]) -> Tensor:
        """(3,): loss, pairs whose better answer has the higher score, and score differences."""
        scores = self.scores(batch)
        difference = scores[:, 0] - scores[:, 1]
        columns = [self.losses(scores, batch["margins"]), (difference > 0).float(), difference]
        return (torch.stack(columns) * batch["real"]).sum(1)


class RewardTraining(PreferenceTask[RewardConfig]):
    """The better answer of a pair gets the higher score (Bradley and Terry, 1952)."""

    def __init__(self, config: RewardConfig):
        super().__init__(config)
        self.title = f"reward model on {self.family.title}"

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """A RewardNetwork; its output layer gets no gradient."""
        model: Any = super().build_model(dtype)
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().requires_grad_(False)
        return RewardNetwork(model, model.config.hidden_size)

    def loss_module(self, model: Any) -> nn.Module:
        """RewardLoss of the network that build_model returned."""
        return RewardLoss(model, center=self.config.center)

    def collate(self, data: RowGroups, rows: list[int]) -> dict[str, Any]:
        """The arguments of RewardLoss: both answers of each pair, each read to its last token."""
        numbers, real = rows_of_groups(data, rows)
        layout = self.layout
        ids = [data.data.ids(number) for number in numbers]
        batch = answer_ends(ids, share=layout["share"], multiple=layout["multiple"])
        scores = torch.tensor([data.data.score(number) for number in numbers]).view(-1, 2)
        config = self.config
        margins = config.margin + config.score_margin * (scores[:, 0] - scores[:, 1])
        return batch | {"real": real, "margins": margins}

    def evaluate(
        self, loss_module: Any, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Loss, share of pairs in the right order, and mean difference of scores."""
        if self.eval_data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        loss, ordered, margin, count = self.evaluation_sums(
            loss_module, lambda batch: loss_module(output="sums", **batch), self.eval_data
        )
        return {"loss": loss / count, "accuracy": ordered / count, "margin": margin / count}

    def export(self, model: Any, state: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that finetune.preference.scorer loads: model, value head and card."""
        from safetensors.torch import save_file

        export_model(model.model, self.method, self.tokenizer, inner_state(state), folder)
        head = {"weight": state["value_head.weight"].float().contiguous()}
        save_file(head, folder / VALUE_HEAD, {"format": "pt"})
        config = self.config
        card = {
            "format_version": 1,
            "max_len": config.max_len,
            "max_src_len": config.max_src_len,
            "glm3_labels": config.glm3_labels,
            "prompt_style": self.tokenizer.prompt_style,
        }
        write_json(folder / REWARD_CARD, card)


def train_reward(config: RewardConfig) -> Path:
    """Train; returns the last checkpoint's folder. Raises: as finetune.engine.train_task."""
    from finetune.engine import train_task

    return train_task(config, RewardTraining)
