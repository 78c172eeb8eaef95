"""What the loop trains: rows and how they are laid out, a model and its loss, metrics, and what is
saved of it.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.families import FAMILIES, Family
from chatglm.loading import load_model, load_tokenizer, resolve_mode
from finetune.checkpoint import export
from finetune.config import TrainConfig
from finetune.distributed import (
    agree,
    first_of_node,
    local_rank,
    rank,
    say,
    wait_for_all,
    world_size,
)
from finetune.evaluation.evaluate import answers_of_ranks, evaluation_loss, prediction_lines
from finetune.evaluation.metrics import mean, score_rows
from finetune.files import write_aside
from finetune.loss import LossModule
from finetune.methods import make_method
from finetune.rows.arrays import Dataset, join
from finetune.rows.batches import collate, count_labels, epoch_order
from finetune.rows.encoding import Encoder, Preparation, choose_rows, prepare
from finetune.rows.formats import parse_columns, single_questions
from finetune.rows.sources import (
    RowReader,
    Source,
    draw_rows,
    join_hashes,
    parse_sources,
    read_rows,
    replay_count,
)
from finetune.rows.streaming import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowSet(Protocol):
    """What the loop asks of its rows: a Dataset has it, and the prompts of a length predictor."""

    @property
    def row_lengths(self) -> np.ndarray:
        """(rows,) tokens of each."""

    def __len__(self) -> int: ...

    def place(self, row: int) -> str:
        """ "file:line", for messages."""


class FineTuning:
    """A ChatGLM learns to answer. predictor/training.py has the other task: how long the answer
    will be.

    Attributes:
        data: the training rows; None where `stream` reads them.
        count_labels(batch) -> int: what a batch's summed loss is divided by.
    """

    count_labels = staticmethod(count_labels)

    def __init__(self, config: TrainConfig):
        self.config = config
        self.family = FAMILIES[resolve_mode(config.model_name_or_path, config.mode)]
        self.tokenizer = load_tokenizer(config.model_name_or_path, mode=self.family.name)
        self.method = make_method(config)
        self.model_path = config.model_name_or_path
        self.title = self.family.title
        self.default_output_dir = f"output-{self.family.name}-{config.train_type}"
        self.dtype = torch.float32

    def load_rows(self) -> None:
        """Raises ValueError, FileNotFoundError for rows that do not fit."""
        config = self.config
        sources = parse_sources(config.train_path)
        replay = parse_sources(config.replay_path, "--replay_path") if config.replay_path else []
        held_out = (
            parse_sources(config.eval_path, "--eval_path", weights=False)
            if config.eval_path
            else []
        )
        if config.streaming:
            self.stream = self.open_stream(sources, replay)
        else:
            self.load_training_rows(sources, replay)
        if held_out:
            self.load_eval_rows(held_out)

    def open_stream(self, sources: list[Source], replay: list[Source]) -> Stream:
        config = self.config
        return Stream(
            sources,
            self.reader,
            self.encoder,
            seed=config.seed,
            block=config.shuffle_buffer,
            skip_bad=config.on_bad_row == "skip",
            skip_long=config.is_skip,
            replay=replay,
            replay_ratio=config.replay_ratio,
            workers=config.num_workers,
        )

    def load_training_rows(self, sources: list[Source], replay: list[Source]) -> None:
        """Read every source; where there are several, or one has a weight, an epoch draws rows."""
        loaded = [self.load_source(source, "train") for source in sources]
        loaded += [self.load_source(source, "replay") for source in replay]
        self.data = join([data for data, _ in loaded])
        self.hash = join_hashes([found for _, hashes in loaded for found in hashes])
        if len(loaded) == 1 and sources[0].weight == 1:
            return
        together = [*sources, *replay]
        sizes = [len(data) for data, _ in loaded]
        shares = [size * source.weight for size, source in zip(sizes, together)]
        counts = draw_counts(shares, len(sources), self.config.replay_ratio)
        self.draws = tuple(zip(sizes, counts))
        words = [f"{count} rows of {source.name}" for count, source in zip(counts, together)]
        say("an epoch reads " + ", ".join(words))

    def load_eval_rows(self, held_out: list[Source]) -> None:
        config = self.config
        if config.answer_metrics:  # without them a conversation gives its loss
            rows = []
            for source in held_out:
                rows += read_rows(source, on_bad_row=config.on_bad_row, reader=self.reader)[0]
            self.eval_rows = single_questions(rows, "--eval_metrics")
        loaded = [self.load_source(source, "eval") for source in held_out]
        self.eval_data = join([data for data, _ in loaded])
        self.eval_hash = join_hashes([found for _, hashes in loaded for found in hashes])

    def data_hash(self) -> str:
        """Of the training rows: a resumed run must have the same."""
        return self.stream.data_hash() if self.stream else self.hash

    @property
    def reader(self) -> RowReader:
        config = self.config
        return RowReader(
            config.prompt_text, config.data_format, parse_columns(config.columns), self.family.name
        )

    @property
    def encoder(self) -> Encoder:
        config = self.config
        return Encoder(
            self.tokenizer, self.family, config.max_len, config.max_src_len, config.glm3_labels
        )

    def load_source(self, source: Source, name: str) -> tuple[Dataset, list[str]]:
        """(rows, hashes of the files): encoded by the first rank of each node, mapped by the
        others.
        """
        config = self.config
        limit = config.dataset_length if name == "train" else None
        # A test file may list several answers; the loss is of the first.
        preparation = Preparation(
            self.reader, self.encoder, config.on_bad_row, limit, first_answer=name == "eval"
        )
        cache = Path(config.data_cache).expanduser() if config.data_cache else None
        prepared = first_of_node(
            lambda: prepare(
                source,
                preparation,
                cache=cache,
                workers=config.preprocessing_num_workers,
                progress=rank() == 0,
                shared=world_size() > 1,
            )
        )
        try:
            rows = prepared.load(source)
            wait_for_all()
        finally:
            if local_rank() == 0:
                prepared.release(config.data_cache_gb)
        data = choose_rows(rows, preparation.encoder, config.is_skip and name != "eval")
        bad = rows.facts["bad"]
        words = [f"{len(data)} {name} rows"]
        words += [f"{bad} bad ones skipped"] if bad else []
        words += (
            [f"{data.skipped} too long, skipped"]
            if data.skipped
            else [f"{data.truncated} cut"]
            if data.truncated
            else []
        )
        say(", ".join(words))
        return data, prepared.hashes

    # ---- which rows a step reads

    data: Dataset | None = None
    stream: Stream | None = None
    draws: tuple[
        tuple[int, int], ...
    ] = ()  # (rows, rows drawn an epoch) of each source; none: every row once

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """With --streaming, what `steps` steps read, or where it is None, what one pass counts."""
        if self.stream:
            return steps * step_rows if steps else self.stream.count()
        return sum(drawn for _, drawn in self.draws) or len(self.data)

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[Dataset, np.ndarray, int]:
        """(rows, their order, number of the step in that order) for step `place` of an epoch: a
        pure function of these numbers.
        """
        if self.stream:
            first = (epoch * steps_per_epoch + place) * step_rows
            return self.stream.rows(first, first + step_rows), np.arange(step_rows), 0
        return (
            self.data,
            self.order(epoch, step_rows if self.config.batching == "grouped" else 0),
            place,
        )

    @cached_property
    def order(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(2)(self.make_order)

    def make_order(self, epoch: int, group: int) -> np.ndarray:
        if not self.draws:
            return epoch_order(self.data.row_lengths, self.config.seed, epoch, group=group).astype(
                np.int32
            )
        starts = np.cumsum([0, *(rows for rows, _ in self.draws)])
        drawn = np.concatenate(
            [
                start + draw_rows(rows, count, self.config.seed, number, epoch)
                for number, (start, (rows, count)) in enumerate(zip(starts, self.draws))
            ]
        )
        return drawn[
            epoch_order(self.data.row_lengths[drawn], self.config.seed, epoch, group=group)
        ].astype(np.int32)

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """The model, prepared by its method: what trains requires a gradient."""
        self.dtype = dtype
        return self.method.prepare(
            load_model(
                self.model_path, mode=self.family.name, dtype=dtype, **self.method.model_options()
            )
        )

    def loss_module(self, model: nn.Module) -> nn.Module:
        return LossModule(
            model,
            smoothing=self.config.label_smoothing,
            noise_alpha=self.config.neftune_noise_alpha,
        )

    @cached_property
    def layout(self) -> dict:
        return layout_of(self.config, self.family, self.tokenizer, self.dtype)

    def collate(self, data: Dataset, rows: list[int]) -> dict:
        return collate(data, rows, **self.layout)

    def evaluate(
        self, loss_module: nn.Module, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Loss, and --eval_metrics of greedy answers, on the evaluation rows.

        Args:
            synced: ZeRO-3, ranks must step together.
            predictions: file that gets the answers, where there are any.
        """
        config = self.config
        batch = config.per_device_eval_batch_size or config.per_device_train_batch_size
        metrics = {"loss": evaluation_loss(loss_module, self.eval_data, batch, **self.layout)}
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
        """The means of --eval_metrics; answers and scores of every row go to `predictions`."""
        rows = self.eval_rows
        scores = score_rows(
            self.config.answer_metrics,
            [[answer] for answer in answers],
            [row.answers for row in rows],
        )
        try:
            write_aside(predictions, prediction_lines(rows, answers, scores))
        except OSError as error:  # the scores are known all the same
            say(f"WARNING: {predictions} cannot be written ({error.strerror or error}); going on")
        return {name: mean(values) for name, values in scores.items()}

    def before_save(self, loss_module: nn.Module, *, evaluated: bool) -> None:
        """What of a save every rank must take part in; rank 0 alone exports. `evaluated`:
        `evaluate` has just seen these weights.
        """

    def export(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write what inference needs; `state` as checkpoint.export takes it."""
        export(model, self.method, self.tokenizer, state, folder)


def draw_counts(shares: list[float], own: int, replay_ratio: float) -> list[int]:
    """Rows that an epoch draws of each source, at least 1 of each.

    Args:
        shares: rows x weight of each source. The first `own` are --train_path's and count as they
            are; the others are --replay_path's and share what --replay_ratio gives them.
    """
    counts = [max(1, round(share)) for share in shares[:own]]
    replayed = shares[own:]
    wanted, given = replay_count(sum(counts), replay_ratio), sum(replayed)
    return counts + [max(1, round(wanted * share / given)) for share in replayed]


def layout_of(
    config: TrainConfig, family: Family, tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype
) -> dict:
    """collate's options: how the rows of a pass are laid out."""
    share = family.name != "glm" and shares_prefix(config)
    return {
        "ragged": config.batching == "ragged",
        "share": share,
        "multiple": row_multiple(dtype),
        "pad_id": tokenizer.pad_token_id,
    }


def shares_prefix(config: TrainConfig) -> bool:
    """A beginning that rows share is computed once where neither dropout nor NEFTune acts, which
    would tie the rows' noise.
    """
    drops = {
        "lora": config.lora_dropout,
        "ptuning": config.prefix_dropout if config.resolved_ptuning_version == "v2" else 0,
    }
    return (
        config.share_prefix and not drops.get(config.train_type) and not config.neftune_noise_alpha
    )


def row_multiple(dtype: torch.dtype) -> int:
    """What the length of a ragged row should be a multiple of.

    For half precision, oneDNN compiles its products anew for every shape, which takes longer than
    most products do.
    """
    return 64 if dtype != torch.float32 and not torch.cuda.is_available() else 1
