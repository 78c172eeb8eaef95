"""train.py --task pretrain: the loop of fine-tuning over packed documents."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from finetune.loss import LossModule
from finetune.pretraining.config import PretrainConfig
from finetune.pretraining.stream import PackedStream
from finetune.pretraining.texts import (
    DocumentEncoder,
    DocumentReader,
    Windows,
    cut_windows,
    join_windows,
    pack_documents,
    whole_text,
)
from finetune.row_task import RowTask
from finetune.rows.arrays import Dataset, EncodedRow, Place, RowArrays, RowWriter
from finetune.rows.batches import Batch, collate, count_labels
from finetune.rows.encoding import Preparation
from finetune.rows.formats import parse_columns
from finetune.rows.groups import RowGroups, join_groups
from finetune.rows.sources import Source, read_rows


class PreTraining(RowTask[PretrainConfig, RowGroups | Windows]):
    """A language model goes on learning from whole texts: every token is a label.

    With --objective infilling only a blank of each row is (DocumentEncoder.blanks).
    """

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        if config.objective == "infilling" and not self.family.infills:
            raise ValueError(
                "--objective infilling needs ChatGLM-6B or GLM-10B, whose context is read on both "
                f"sides; {config.model_name_or_path} is {self.family.title}"
            )
        self.default_output_dir = f"output-{self.family.name}-pretrain-{config.train_type}"
        self.eval_bytes = 0

    # ---- rows

    @property
    def reader(self) -> DocumentReader:
        columns = parse_columns(self.config.columns, self.config.column_names)
        return DocumentReader(columns=columns)

    @property
    def encoder(self) -> DocumentEncoder:
        config = self.config
        return DocumentEncoder(
            self.tokenizer,
            self.family,
            config.max_len,
            config.max_src_len,
            packing=config.packing,
            objective=config.objective,
            gmask_share=config.gmask_share,
            seed=config.seed,
        )

    def preparation(self, name: str) -> Preparation:
        """As RowTask's; evaluation texts are read causally, so that every byte of them counts."""
        config = self.config
        encoder = self.encoder
        if name == "eval":
            encoder = DocumentEncoder(
                self.tokenizer,
                self.family,
                config.max_len,
                config.max_src_len,
                packing=config.packing,
            )
        limit = config.dataset_length if name == "train" else None
        return Preparation(self.reader, encoder, config.on_bad_row, limit)

    def choose(self, rows: RowArrays, *, is_evaluation: bool) -> RowGroups | Windows:
        """As in RowTask."""
        if self.config.packing == "concatenated":
            return cut_windows(rows, self.encoder)
        return pack_documents(rows, self.config.max_len)

    def join(self, parts: Sequence[RowGroups | Windows]) -> RowGroups | Windows:
        """As in RowTask: no row has documents of two sources."""
        windows = [part for part in parts if isinstance(part, Windows)]
        if windows:
            return join_windows(windows)
        return join_groups([part for part in parts if isinstance(part, RowGroups)])

    def load_eval_rows(self, held_out: list[Source]) -> None:
        """Also counts the bytes of the texts."""
        for source in held_out:
            rows, _ = read_rows(source, on_bad_row=self.config.on_bad_row, reader=self.reader)
            self.eval_bytes += sum(len(whole_text(row).encode()) for row in rows)
        super().load_eval_rows(held_out)

    def open_stream(self, sources: list[Source], replay: list[Source]) -> PackedStream:
        config = self.config
        return PackedStream(
            sources,
            self.reader,
            self.encoder,
            pack=self.pack_block,
            seed=config.seed,
            block=config.shuffle_buffer,
            skip_bad=config.on_bad_row == "skip",
            replay=tuple(replay),
            replay_ratio=config.replay_ratio,
            workers=config.num_workers,
        )

    def pack_block(self, rows: RowArrays) -> RowGroups:
        """The rows of a stream's block."""
        made = self.choose(rows, is_evaluation=False)
        if isinstance(made, RowGroups):
            return made
        writer = RowWriter()
        for row in range(len(made)):
            encoded = EncodedRow(made.ids(row).tolist(), made.n_masked(row), False)
            writer.add(Place(0, made.place(row)), encoded)
        count = len(made)
        data = Dataset((writer.in_memory(("",), {}),), (np.arange(count, dtype=np.int32),))
        return RowGroups(data, np.arange(count + 1, dtype=np.int64))

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[RowGroups | Windows, np.ndarray, int]:
        """As in Task."""
        if isinstance(self.stream, PackedStream):
            first = (epoch * steps_per_epoch + place) * step_rows
            return self.stream.groups(first, first + step_rows), np.arange(step_rows), 0
        return self.epochs.of_step(epoch, place, step_rows)

    def collate(self, data: RowGroups | Windows, rows: list[int]) -> Batch:
        """As in Task: every document of every pack is a sequence of its own."""
        layout = self.layout
        if isinstance(data, Windows):
            return collate(data, rows, **layout)
        documents: list[int] = []
        for row in rows:
            documents += [row] if row < 0 else data.rows(row)
        return collate(data.data, documents, **layout)

    def count_labels(self, batch: Batch) -> int:
        return count_labels(batch)

    # ---- loss and metrics

    def loss_module(self, model: nn.Module) -> nn.Module:
        return LossModule(model)

    def evaluate(
        self, loss_module: nn.Module, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Loss a token, its perplexity, and bits a byte of the evaluation texts in UTF-8.

        End tokens count as tokens; a document's first token counts where the family's control
        tokens stand before it.
        """
        if self.eval_data is None:
            raise RuntimeError("the evaluation rows are not loaded")
        total, count = self.evaluation_sums(
            loss_module, lambda batch: loss_module(**batch), self.eval_data
        )
        loss = total / count
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": total / math.log(2) / self.eval_bytes,
        }


def pretrain(config: PretrainConfig) -> Path:
    """Train; returns the last checkpoint's folder. Raises: as finetune.engine.train_task."""
    from finetune.engine import train_task

    return train_task(config, PreTraining)
