"""What the loop trains: rows and how they are laid out, a model and its loss, metrics, and what is
saved of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from finetune.checkpoint import SavedTask
from finetune.config import TrainConfig
from finetune.distributed import agree, say
from finetune.epochs import RowSet, StepBatches
from finetune.evaluation.evaluate import answers_of_ranks, evaluation_loss, prediction_lines
from finetune.evaluation.metrics import overall_scores, score_rows
from finetune.files import write_aside
from finetune.loss import LossModule
from finetune.row_task import RowTask
from finetune.rows.arrays import Dataset, RowArrays, join_datasets
from finetune.rows.batches import Batch, collate, count_labels
from finetune.rows.encoding import choose_rows
from finetune.rows.formats import Row, single_questions
from finetune.rows.sources import Source, read_rows


class Task(SavedTask, Protocol):
    """What the loop trains: an entry of train.TASKS makes one."""

    @property
    def title(self) -> str:
        """Its name in the log."""

    @property
    def default_output_dir(self) -> str: ...

    def load_rows(self) -> None:
        """Raises ValueError, FileNotFoundError for rows that do not fit."""

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """The rows of an epoch, in a run of `steps` steps of `step_rows` rows."""

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[RowSet, np.ndarray, int]:
        """(rows, their order, number of the step in that order) for step `place` of an epoch: a
        pure function of these numbers.
        """

    def collate(self, data: Any, rows: list[int]) -> Mapping[str, Any]:
        """The batch of these rows of `data`, which rows_of_step returned; -1 is an empty place."""

    def count_labels(self, batch: Any) -> float:
        """What the summed loss of a batch of `collate` is divided by."""

    def dropped_rows(self) -> int:
        """The number of rows that were bad or too long, found while training."""

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """The model, prepared by its method: what trains requires a gradient."""

    def loss_module(self, model: nn.Module) -> nn.Module:
        """The module whose forward returns the loss of a batch, summed and scaled."""

    def step_batches(self, loss_module: nn.Module, collated: StepBatches, step: int) -> StepBatches:
        """What is trained on in step `step` (from 0): the batches of `collate`, which a task may
        complete by the weights as they are; every rank takes part.
        """

    def before_training(self, loss_module: nn.Module, output_dir: Path) -> None:
        """What of a start every rank must take part in: the weights are those that a run starts
        from, also where a checkpoint is loaded next.
        """

    def evaluate(
        self, loss_module: nn.Module, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """The metrics on the evaluation rows.

        Args:
            synced: ZeRO-3, ranks must step together.
            predictions: file that gets the answers, where there are any.
        """


class FineTuning(RowTask[TrainConfig, Dataset]):
    """A ChatGLM learns to answer."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.eval_rows: list[Row] = []

    def choose(self, rows: RowArrays, *, is_evaluation: bool) -> Dataset:
        """As in RowTask: all but those that were cut, where --is_skip says so."""
        return choose_rows(rows, self.encoder, self.config.is_skip and not is_evaluation)

    def join(self, parts: Sequence[Dataset]) -> Dataset:
        return join_datasets(parts)

    def of_stream(self, data: Dataset) -> Dataset:
        return data

    def load_eval_rows(self, held_out: list[Source]) -> None:
        config = self.config
        if config.answer_metrics:  # without them a conversation gives its loss
            rows = []
            for source in held_out:
                rows += read_rows(source, on_bad_row=config.on_bad_row, reader=self.reader)[0]
            self.eval_rows = single_questions(rows, "--eval_metrics")
        super().load_eval_rows(held_out)

    def evaluation_id(self) -> str | None:
        """The hash of the rows; for metrics of written answers also their longest length."""
        config = self.config
        if not config.eval_path:
            return None
        if config.metric_for_best == "loss":
            return self.eval_hash
        return f"{self.eval_hash} {config.eval_max_new_tokens}"

    def loss_module(self, model: nn.Module) -> nn.Module:
        config = self.config
        if config.stages > 1:
            from finetune.pipeline import StagedModel

            return StagedModel(model, config.stages, smoothing=config.label_smoothing)
        return LossModule(
            model, smoothing=config.label_smoothing, noise_alpha=config.neftune_noise_alpha
        )

    def collate(self, data: Dataset, rows: list[int]) -> Batch:
        return collate(data, rows, **self.layout)

    def count_labels(self, batch: Batch) -> int:
        return count_labels(batch)

    def evaluate(
        self, loss_module: nn.Module, model: Any, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Loss, and --eval_metrics of greedy answers, on the evaluation rows.

        Args:
            model: of transformers or peft.
            synced: ZeRO-3, ranks must step together.
            predictions: file that gets the answers, where there are any.
        """
        config = self.config
        if self.eval_data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        batch = config.per_device_eval_batch_size or config.per_device_train_batch_size
        loss = evaluation_loss(
            loss_module, self.eval_data, batch, stages=config.stages, **self.layout
        )
        metrics = {"loss": loss}
        if config.answer_metrics:
            answers = answers_of_ranks(
                model,
                self.tokenizer,
                self.eval_rows,
                batch_size=batch,
                max_src_len=config.max_src_len,
                max_new_tokens=config.eval_max_new_tokens,
                synced=synced,
            )
            metrics |= agree(lambda: self.score(answers, predictions))
        return metrics

    def score(self, answers: list[str], predictions: Path) -> dict[str, float]:
        """The --eval_metrics; answers and scores of every row go to `predictions`."""
        rows = self.eval_rows
        found = [[answer] for answer in answers]
        references = [row.answers for row in rows]
        scores = score_rows(self.config.answer_metrics, found, references)
        try:
            write_aside(predictions, prediction_lines(rows, answers, scores))
        except OSError as error:  # the scores are known all the same
            say(f"WARNING: {predictions} cannot be written ({error.strerror or error}); going on")
        return overall_scores(scores, found, references)
