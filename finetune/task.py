"""What the loop trains: rows and how they are laid out, a model and its loss, metrics, and what is
saved of it.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.families import Family, family_of
from chatglm.loading import load_model, load_tokenizer, resolve_mode
from finetune.checkpoint import SavedTask, export_model
from finetune.config import RunConfig, TrainConfig
from finetune.distributed import (
    agree,
    first_of_node,
    local_rank,
    rank,
    say,
    wait_for_all,
    world_size,
)
from finetune.epochs import EpochRows, RowSet
from finetune.evaluation.evaluate import answers_of_ranks, evaluation_loss, prediction_lines
from finetune.evaluation.metrics import score_rows
from finetune.files import write_aside
from finetune.loss import LossModule
from finetune.methods import make_method
from finetune.rows.arrays import Dataset, join_datasets
from finetune.rows.batches import Batch, BatchLayout, collate, count_labels
from finetune.rows.encoding import Preparation, RowEncoder, choose_rows, prepare_rows
from finetune.rows.formats import Row, parse_columns, single_questions
from finetune.rows.sources import (
    RowReader,
    Source,
    join_hashes,
    parse_sources,
    read_rows,
    replay_count,
)
from finetune.rows.streaming import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Task(SavedTask, Protocol):
    """What the loop trains: FineTuning here, predictor.training.LengthTraining."""

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

    def evaluate(
        self, loss_module: nn.Module, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """The metrics on the evaluation rows.

        Args:
            synced: ZeRO-3, ranks must step together.
            predictions: file that gets the answers, where there are any.
        """


class FineTuning:
    """A ChatGLM learns to answer. predictor/training.py has the other task: how long the answer
    will be.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        mode = resolve_mode(config.model_name_or_path, config.mode)
        self.tokenizer = load_tokenizer(
            config.model_name_or_path, mode=mode, prompt_style=config.prompt_style
        )
        self.family = family_of(self.tokenizer)
        self.method = make_method(config)
        self.model_path = config.model_name_or_path
        self.title = self.family.title
        self.default_output_dir = f"output-{self.family.name}-{config.train_type}"
        self.dtype = torch.float32
        self.hash = ""
        self.stream: Stream | None = None
        self.loaded: EpochRows[Dataset] | None = None  # where no stream reads the rows
        self.eval_data: Dataset | None = None
        self.eval_rows: list[Row] = []
        self.eval_hash: str | None = None

    @property
    def epochs(self) -> EpochRows[Dataset]:
        """The loaded training rows; raises RuntimeError before load_rows, and with --streaming."""
        if self.loaded is None:
            raise RuntimeError("the training rows are not loaded")
        return self.loaded

    @property
    def data(self) -> Dataset:
        return self.epochs.data

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
            replay=tuple(replay),
            replay_ratio=config.replay_ratio,
            workers=config.num_workers,
        )

    def load_training_rows(self, sources: list[Source], replay: list[Source]) -> None:
        """Read every source; where there are several, or one has a weight, an epoch draws rows."""
        loaded = [self.load_source(source, "train") for source in sources]
        loaded += [self.load_source(source, "replay") for source in replay]
        parts, _ = zip(*loaded)
        self.hash = hash_of_sources(loaded)
        draws: tuple[tuple[int, int], ...] = ()
        if len(loaded) > 1 or sources[0].weight != 1:
            draws = self.draws_of([*sources, *replay], parts, len(sources))
        grouped = self.config.batching == "grouped"
        self.loaded = EpochRows(join_datasets(parts), self.config.seed, grouped, draws)

    def draws_of(
        self, sources: list[Source], parts: Sequence[Dataset], own: int
    ) -> tuple[tuple[int, int], ...]:
        """(rows, rows that an epoch draws) of each source; the first `own` are --train_path's."""
        sizes = list(map(len, parts))
        shares = [size * source.weight for size, source in zip(sizes, sources)]
        counts = draw_counts(shares, own, self.config.replay_ratio)
        words = [f"{count} rows of {source.name}" for count, source in zip(counts, sources)]
        say("an epoch reads " + ", ".join(words))
        return tuple(zip(sizes, counts))

    def load_eval_rows(self, held_out: list[Source]) -> None:
        config = self.config
        if config.answer_metrics:  # without them a conversation gives its loss
            rows = []
            for source in held_out:
                rows += read_rows(source, on_bad_row=config.on_bad_row, reader=self.reader)[0]
            self.eval_rows = single_questions(rows, "--eval_metrics")
        loaded = [self.load_source(source, "eval") for source in held_out]
        parts, _ = zip(*loaded)
        self.eval_data = join_datasets(parts)
        self.eval_hash = hash_of_sources(loaded)

    def evaluation_id(self) -> str | None:
        """The hash of the rows; for metrics of written answers also their longest length."""
        config = self.config
        if not config.eval_path:
            return None
        if config.metric_for_best == "loss":
            return self.eval_hash
        return f"{self.eval_hash} {config.eval_max_new_tokens}"

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
    def encoder(self) -> RowEncoder:
        config = self.config
        return RowEncoder(
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
            lambda: prepare_rows(
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
        say(describe_rows(data, name, rows.facts["bad"]))
        return data, prepared.hashes

    # ---- which rows a step reads

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """With --streaming, what `steps` steps read, or where it is None, what one pass counts."""
        if self.stream:
            return steps * step_rows if steps else self.stream.count()
        return self.epochs.count()

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[Dataset, np.ndarray, int]:
        """As in Task."""
        if self.stream:
            first = (epoch * steps_per_epoch + place) * step_rows
            return self.stream.rows(first, first + step_rows), np.arange(step_rows), 0
        return self.epochs.of_step(epoch, place, step_rows)

    def dropped_rows(self) -> int:
        return len(self.stream.dropped) if self.stream else 0

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """The model, prepared by its method: what trains requires a gradient."""
        self.dtype = dtype
        options = self.method.model_options()
        model = load_model(self.model_path, mode=self.family.name, dtype=dtype, **options)
        return self.method.make_trainable(model)

    def loss_module(self, model: nn.Module) -> nn.Module:
        return LossModule(
            model,
            smoothing=self.config.label_smoothing,
            noise_alpha=self.config.neftune_noise_alpha,
        )

    @cached_property
    def layout(self) -> BatchLayout:
        return layout_of(self.config, self.family, self.tokenizer, self.dtype)

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
        found = [[answer] for answer in answers]
        scores = score_rows(self.config.answer_metrics, found, [row.answers for row in rows])
        try:
            write_aside(predictions, prediction_lines(rows, answers, scores))
        except OSError as error:  # the scores are known all the same
            say(f"WARNING: {predictions} cannot be written ({error.strerror or error}); going on")
        return {name: fmean(values) for name, values in scores.items()}

    def before_save(self, loss_module: nn.Module, *, evaluated: bool) -> None:
        """Nothing: rank 0 alone exports."""

    def export(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write what inference needs; `state` as checkpoint.export_model takes it."""
        export_model(model, self.method, self.tokenizer, state, folder)


def hash_of_sources(loaded: list[tuple[Dataset, list[str]]]) -> str:
    """One hash of all files; `loaded` as FineTuning.load_source returns it."""
    hashes: list[str] = []
    for _, found in loaded:
        hashes += found
    return join_hashes(hashes)


def describe_rows(data: Dataset, name: str, bad: int) -> str:
    """One line of how many rows there are, and how many were skipped or cut."""
    words = [f"{len(data)} {name} rows"]
    if bad:
        words.append(f"{bad} bad ones skipped")
    if data.skipped:
        words.append(f"{data.skipped} too long, skipped")
    elif data.truncated:
        words.append(f"{data.truncated} cut")
    return ", ".join(words)


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
) -> BatchLayout:
    """collate's options: how the rows of a pass are laid out."""
    share = family.shares_beginning and shares_prefix(config)
    return {
        "ragged": config.batching == "ragged",
        "share": share,
        "multiple": row_multiple(dtype),
        "pad_id": tokenizer.pad_token_id,
    }


def shares_prefix(config: RunConfig) -> bool:
    """A beginning that rows share is computed once where neither dropout nor NEFTune acts, which
    would tie the rows' noise.
    """
    return config.share_prefix and not config.has_noise


def row_multiple(dtype: torch.dtype) -> int:
    """What the length of a ragged row should be a multiple of.

    For half precision, oneDNN compiles its products anew for every shape, which takes longer than
    most products do.
    """
    return 64 if dtype != torch.float32 and not torch.cuda.is_available() else 1
