"""A task whose rows are text, encoded once a node: what fine-tuning, pre-training and preferences
have in common.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.families import Family, family_of
from chatglm.folders import check_folder, position_limit
from chatglm.loading import check_vocabulary, load_model, load_tokenizer, resolve_mode
from finetune.checkpoint import export_model
from finetune.config import RowsConfig, RunConfig
from finetune.distributed import (
    first_of_node,
    local_rank,
    on_device,
    rank,
    say,
    sum_over_ranks,
    wait_for_all,
    world_size,
)
from finetune.epochs import EpochRows, RowSet, StepBatches
from finetune.methods import make_method
from finetune.rows.arrays import Dataset, RowArrays
from finetune.rows.batches import BatchLayout
from finetune.rows.encoding import Preparation, RowEncoder, prepare_rows
from finetune.rows.formats import parse_columns
from finetune.rows.sources import RowReader, Source, join_hashes, parse_sources, replay_count
from finetune.rows.streaming import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextRows(RowSet, Protocol):
    """The rows of a source; truncated, skipped: how many were cut, and how many do not count."""

    @property
    def truncated(self) -> int: ...

    @property
    def skipped(self) -> int: ...


Config = TypeVar("Config", bound=RowsConfig)
Rows = TypeVar("Rows", bound=TextRows)


class RowTask(Generic[Config, Rows]):
    """A language model that learns from rows of text.

    A task says which rows it makes of the encoded ones (choose, join, of_stream), and what a
    batch, the loss and the metrics are.
    """

    def __init__(self, config: Config):
        self.config = config
        mode = resolve_mode(config.model_name_or_path, config.mode)
        self.tokenizer = load_tokenizer(
            config.model_name_or_path, mode=mode, prompt_style=config.prompt_style
        )
        self.family = family_of(self.tokenizer)
        self.method = make_method(config)
        self.check_positions()
        self.model_path = config.model_name_or_path
        self.title = self.family.title
        self.default_output_dir = f"output-{self.family.name}-{config.train_type}"
        self.dtype = torch.float32
        self.hash = ""
        self.stream: Stream | None = None
        self.loaded: EpochRows[Rows] | None = None  # where no stream reads the rows
        self.eval_data: Rows | None = None
        self.eval_hash: str | None = None

    def check_positions(self) -> None:
        """Raises ValueError where rows of --max_len leave a model's table of positions."""
        config, options = self.config, self.method.model_options()
        limit = position_limit(check_folder(config.model_name_or_path))
        is_first = options.get("ptuning_version") == "v1"
        virtual = options["pre_seq_len"] if is_first else 0
        if limit is not None and config.max_len + virtual > limit:
            also = f" and {virtual} virtual tokens" if virtual else ""
            raise ValueError(
                f"--max_len {config.max_len}{also}: {self.family.title} has {limit} positions"
            )

    # ---- what a task says

    def choose(self, rows: RowArrays, *, is_evaluation: bool) -> Rows:
        """The rows of a source that count; raises ValueError where none does."""
        raise NotImplementedError

    def join(self, parts: Sequence[Rows]) -> Rows:
        """The rows of several sources, in this order."""
        raise NotImplementedError

    def of_stream(self, data: Dataset) -> Rows:
        """The rows of a step, of what a stream encoded for it."""
        raise NotImplementedError

    def collate(self, data: Rows, rows: list[int]) -> Mapping[str, Any]:
        """As in Task."""
        raise NotImplementedError

    def count_labels(self, batch: Any) -> float:
        """As in Task."""
        raise NotImplementedError

    # ---- rows

    @property
    def epochs(self) -> EpochRows[Rows]:
        """The loaded training rows; raises RuntimeError before load_rows, and with --streaming."""
        if self.loaded is None:
            raise RuntimeError("the training rows are not loaded")
        return self.loaded

    @property
    def data(self) -> Rows:
        return self.epochs.data

    def load_rows(self) -> None:
        """Raises ValueError, FileNotFoundError for rows that do not fit."""
        config = self.config
        sources = self.sources_of("train_path")
        replay = self.sources_of("replay_path") if config.replay_path else []
        held_out = self.sources_of("eval_path") if config.eval_path else []
        check_reading_flags(config, [*sources, *replay, *held_out])
        if config.streaming:
            self.stream = self.open_stream(sources, replay)
        else:
            self.load_training_rows(sources, replay)
        if held_out:
            self.load_eval_rows(held_out)

    def sources_of(self, name: str) -> list[Source]:
        """The sources of a flag; raises as parse_sources."""
        text: str = getattr(self.config, name)
        documents = getattr(self.config, "txt_documents", "")  # of --task pretrain
        return parse_sources(text, f"--{name}", weights=name != "eval_path", documents=documents)

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
        self.loaded = EpochRows(self.join(parts), self.config.seed, grouped, draws)

    def draws_of(
        self, sources: list[Source], parts: Sequence[Rows], own: int
    ) -> tuple[tuple[int, int], ...]:
        """(rows, rows that an epoch draws) of each source; the first `own` are --train_path's."""
        sizes = list(map(len, parts))
        shares = [size * source.weight for size, source in zip(sizes, sources)]
        counts = draw_counts(shares, own, self.config.replay_ratio)
        words = [f"{count} rows of {source.name}" for count, source in zip(counts, sources)]
        say("an epoch reads " + ", ".join(words))
        return tuple(zip(sizes, counts))

    def load_eval_rows(self, held_out: list[Source]) -> None:
        loaded = [self.load_source(source, "eval") for source in held_out]
        parts, _ = zip(*loaded)
        self.eval_data = self.join(parts)
        self.eval_hash = hash_of_sources(loaded)

    def evaluation_id(self) -> str | None:
        """The hash of the evaluation rows; None without."""
        return self.eval_hash

    def data_hash(self) -> str:
        """Of the training rows: a resumed run must have the same."""
        return self.stream.data_hash() if self.stream else self.hash

    @property
    def reader(self) -> RowReader:
        config = self.config
        return RowReader(
            config.prompt_text,
            config.data_format,
            parse_columns(config.columns, config.column_names),
            self.family.name,
        )

    @property
    def encoder(self) -> RowEncoder:
        config = self.config
        return RowEncoder(
            self.tokenizer, self.family, config.max_len, config.max_src_len, config.glm3_labels
        )

    def preparation(self, name: str) -> Preparation:
        """How rows of the set `name` ("train", "replay" or "eval") are read and encoded."""
        config = self.config
        limit = config.dataset_length if name == "train" else None
        # A test file may list several answers; the loss is of the first.
        return Preparation(
            self.reader, self.encoder, config.on_bad_row, limit, first_answer=name == "eval"
        )

    def load_source(self, source: Source, name: str) -> tuple[Rows, list[str]]:
        """(rows, hashes of the files): encoded by the first rank of each node, mapped by the
        others.
        """
        rows, hashes = self.read_source(source, self.preparation(name))
        data = self.choose(rows, is_evaluation=name == "eval")
        say(describe_rows(data, name, rows.facts["bad"]))
        return data, hashes

    def read_source(self, source: Source, preparation: Preparation) -> tuple[RowArrays, list[str]]:
        """As load_source, of all rows that `preparation` encodes."""
        config = self.config
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
        return rows, prepared.hashes

    # ---- which rows a step reads

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """With --streaming, what `steps` steps read, or where it is None, what one pass counts."""
        if self.stream:
            return steps * step_rows if steps else self.stream.count()
        return self.epochs.count()

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[Rows, np.ndarray, int]:
        """As in Task."""
        if self.stream:
            first = (epoch * steps_per_epoch + place) * step_rows
            data = self.of_stream(self.stream.rows(first, first + step_rows))
            return data, np.arange(step_rows), 0
        return self.epochs.of_step(epoch, place, step_rows)

    def dropped_rows(self) -> int:
        return len(self.stream.dropped) if self.stream else 0

    # ---- the model

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """The model, prepared by its method: what trains requires a gradient."""
        self.dtype = dtype
        options = self.method.model_options()
        model = load_model(self.model_path, mode=self.family.name, dtype=dtype, **options)
        check_vocabulary(model, self.tokenizer)
        return self.method.make_trainable(model)

    @cached_property
    def layout(self) -> BatchLayout:
        return layout_of(self.config, self.family, self.tokenizer, self.dtype)

    @torch.no_grad()
    def evaluation_sums(self, loss_module: nn.Module, measure: Any, data: Rows) -> list[float]:
        """The sums over all rows of what `measure(batch)`, a tensor of numbers, returns of each
        batch; its last number is followed by the sum of count_labels. The ranks share the work.
        """
        config = self.config
        size = config.per_device_eval_batch_size or config.per_device_train_batch_size
        order = data.row_lengths.argsort(kind="stable").tolist()
        device = next(loss_module.parameters()).device
        per_pass = size * world_size()
        sums: list[float] = []
        count = 0.0
        for start in range(0, len(order), per_pass):
            # A pass has the same rows on any number of ranks.
            mine = order[start : start + per_pass][rank() * size : (rank() + 1) * size]
            # ZeRO-3 needs every rank in every pass: without a row it takes an empty place.
            batch = self.collate(data, mine or [-1])
            values = measure(on_device(batch, device)).double().flatten().tolist()
            sums = [a + b for a, b in zip(sums or [0.0] * len(values), values)]
            count += self.count_labels(batch)
        return sum_over_ranks(*sums, count)

    def step_batches(self, loss_module: nn.Module, collated: StepBatches, step: int) -> StepBatches:
        """The batches themselves: they need no weights."""
        return collated

    def before_training(self, loss_module: nn.Module, output_dir: Path) -> None:
        """Nothing: a run needs only its weights."""

    def load_state(self, folder: Path) -> None:
        """Nothing: a checkpoint's weights are all that a run goes on with."""

    def before_save(self, loss_module: nn.Module, *, evaluated: bool) -> None:
        """Nothing: rank 0 alone exports."""

    def export(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        """Write what inference needs; `state` as checkpoint.export_model takes it."""
        export_model(model, self.method, self.tokenizer, state, folder)

    def extra_bytes(self, model: nn.Module) -> int:
        """None: `export` writes the model's weights alone."""
        return 0


def check_reading_flags(config: RowsConfig, sources: Sequence[Source]) -> None:
    """Raises ValueError for a flag of how texts are read where no source has texts."""
    changed = config.changed("prompt_text", "data_format", "columns", "on_bad_row")
    if changed and all(source.is_tokenised for source in sources):
        raise ValueError(f"--{changed[0]} has no effect: all rows are token ids already")


def hash_of_sources(loaded: Sequence[tuple[Any, list[str]]]) -> str:
    """One hash of all files; `loaded` as RowTask.load_source returns it."""
    hashes: list[str] = []
    for _, found in loaded:
        hashes += found
    return join_hashes(hashes)


def describe_rows(data: TextRows, name: str, bad: int) -> str:
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
    config: RowsConfig, family: Family, tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype
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
