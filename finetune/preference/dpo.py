"""train.py --task dpo: a model that prefers the better answer, by one of LOSSES."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatglm.loading import base_fingerprint
from finetune.contents import adapter_content, prefix_content
from finetune.distributed import agree, on_device, rank, say, sum_over_ranks, world_size
from finetune.preference.config import DpoConfig
from finetune.preference.losses import make_loss
from finetune.preference.policy_loss import DRIFT, PreferenceLoss
from finetune.preference.reference import (
    REFERENCE_FILE,
    can_switch_off,
    load_reference,
    reference_key,
    save_reference,
)
from finetune.preference.rows import PreferenceTask, rows_of_groups, sequence_counts
from finetune.rows.batches import collate, lay_end_to_end
from finetune.rows.groups import RowGroups


class PreferenceTraining(PreferenceTask[DpoConfig]):
    """The model learns from pairs, or from answers that are liked or not, against a reference."""

    def __init__(self, config: DpoConfig):
        super().__init__(config)
        self.loss = make_loss(config)
        self.title = f"{config.loss_type} preference of {self.family.title}"
        is_switched = can_switch_off(config, self.model_path)
        self.keeps_reference = self.loss.has_reference and not is_switched
        if self.keeps_reference and (config.streaming or self.loss.labelled):  # by its prefix
            raise ValueError(
                f"--model_name_or_path {self.model_path} has a prefix, which the reference keeps: "
                "no --streaming and no --loss_type kto"
            )
        self.references: dict[str, np.ndarray] = {}  # "train", "eval" -> (rows,)

    def loss_module(self, model: nn.Module) -> nn.Module:
        return PreferenceLoss(model, self.loss)

    # ---- batches

    def collate(self, data: RowGroups, rows: list[int]) -> dict[str, Any]:
        """The arguments of PreferenceLoss: every answer a sequence of one ragged row."""
        numbers, real = rows_of_groups(data, rows)
        batch: dict[str, Any] = {**collate(data.data, numbers, **self.layout), "real": real}
        batch["counts"] = sequence_counts(batch["lengths"], batch["keep"], len(numbers))
        if self.loss.labelled:
            batch["liked"] = torch.tensor([data.data.score(number) for number in numbers])
            for name, value in self.mismatched(data, numbers, real).items():
                batch[DRIFT + name] = value
        reference = self.references.get("eval" if data is self.eval_data else "train")
        if reference is not None:
            batch["reference"] = torch.from_numpy(reference[numbers])
        return batch

    def mismatched(self, data: RowGroups, numbers: list[int], real: Tensor) -> dict[str, Any]:
        """Each question of a pass with the next one's answer, as a batch of `log_probs`."""
        rows = data.data
        chosen = [number for number, is_real in zip(numbers, real.tolist()) if is_real]
        weight = 1.0
        if len(chosen) < 2:  # a single answer has no other question: the pass runs, but counts 0
            chosen = numbers
            weight = 0.0
        others = [*chosen[1:], chosen[0]]
        ids: list[np.ndarray] = []
        masked: list[int] = []
        for number, other in zip(chosen, others):
            question = rows.ids(number)[: rows.n_masked(number)]
            answer = rows.ids(other)[rows.n_masked(other) :]
            ids.append(np.concatenate([question, answer])[: self.config.max_len])
            masked.append(len(question))
        layout = self.layout
        batch: dict[str, Any] = dict(
            lay_end_to_end(ids, masked, layout["share"], layout["multiple"])
        )
        batch["counts"] = sequence_counts(batch["lengths"], batch["keep"], len(ids))
        batch["real"] = torch.full((len(ids),), weight)
        return batch

    # ---- the reference that is computed at first

    def before_training(self, loss_module: Any, output_dir: Path) -> None:
        """Compute, or read, the reference's log-probabilities where it cannot be switched on."""
        if not self.keeps_reference:
            return
        parts = {"train": self.data}
        if self.eval_data is not None:
            parts["eval"] = self.eval_data
        key, path = self.key(list(parts.values())), output_dir / REFERENCE_FILE
        stored = load_reference(path, key)
        [ranks_without] = sum_over_ranks(float(stored is None))
        if stored is not None and not ranks_without:
            self.references = stored
            return
        say("computing the reference's log-probabilities")
        loss_module.eval()
        computed = {name: self.row_log_probs(loss_module, data) for name, data in parts.items()}
        loss_module.train()
        agree(lambda: save_reference(path, computed, key))
        self.references = computed

    def key(self, parts: list[RowGroups]) -> str:
        """What the reference's log-probabilities depend on."""
        config = self.config
        fingerprint = base_fingerprint(self.model_path)
        adapter = adapter_content(config.adapter, fingerprint) if config.adapter else ""
        names = ("train_type", "init_lora_weights", "lora_dim", "quantization_bit", "precision")
        settings = [fingerprint, adapter, prefix_content(self.model_path)]
        settings += [getattr(config, name) for name in names]
        return reference_key(parts, settings)

    @torch.no_grad()
    def row_log_probs(self, loss_module: Any, data: RowGroups) -> np.ndarray:
        """(rows,) fp32 log-probabilities of all answers; the ranks share the work."""
        config = self.config
        size = config.per_device_eval_batch_size or config.per_device_train_batch_size
        device = next(loss_module.parameters()).device
        log_probs = torch.zeros(len(data.data), dtype=torch.float64)
        order = data.row_lengths.argsort(kind="stable").tolist()
        per_pass = size * world_size()
        for start in range(0, len(order), per_pass):
            first = start + rank() * size
            groups = order[first : first + size]
            # A rank that has no group left runs the pass too.
            batch = on_device(self.collate(data, groups or [-1]), device)
            values = loss_module(output="log_probs", **batch).double().cpu()
            if groups:
                rows, _ = rows_of_groups(data, groups)
                log_probs[rows] = values
        if world_size() > 1:
            total = log_probs.to(device)
            dist.all_reduce(total)
            log_probs = total.cpu()
        return log_probs.float().numpy()

    # ---- metrics

    def evaluate(
        self, loss_module: Any, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Loss, mean rewards of the better and the worse answers, and of pairs the accuracy."""
        if self.eval_data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        sums = self.evaluation_sums(
            loss_module, lambda batch: loss_module(output="sums", **batch), self.eval_data
        )
        loss, chosen_sum, chosen_count, rejected_sum, rejected_count, ordered, count = sums
        chosen_reward = chosen_sum / max(chosen_count, 1)
        rejected_reward = rejected_sum / max(rejected_count, 1)
        metrics = {
            "loss": loss / count,
            "margin": chosen_reward - rejected_reward,
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "accuracy": ordered / count,
        }
        return {name: metrics[name] for name in self.config.evaluated}


def train_dpo(config: DpoConfig) -> Path:
    """Train; returns the last checkpoint's folder. Raises: as finetune.engine.train_task."""
    from finetune.engine import train_task

    return train_task(config, PreferenceTraining)
