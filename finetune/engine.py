"""The training loop: each optimizer step is a pure function of (seed, step) and the weights."""

import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from chatglm.commands import describe
from chatglm.loading import base_fingerprint, read_config, stored_prefix
from chatglm.saving import NoRoom, check_disk, locked_folder
from finetune.checkpoint import (
    PREDICTIONS,
    Checkpointer,
    Progress,
    check_checkpoint,
    find_resume,
    remove_leftovers,
)
from finetune.config import RunConfig, TrainConfig
from finetune.distributed import (
    DTYPES,
    agree,
    check_stages,
    data_rank,
    data_world,
    deepspeed_config,
    device,
    fit_to_one_rank,
    init_distributed,
    make_optimizer,
    on_device,
    parameter_groups,
    rank,
    resolve_precision,
    say,
    sum_over_ranks,
    with_local_model,
    without_prints,
    world_size,
)
from finetune.epochs import StepBatches
from finetune.evaluation.metrics import check_packages
from finetune.files import LastingStream
from finetune.launched import ranks_restored
from finetune.lora import use_lean_lora
from finetune.memory_trace import MemoryTrace
from finetune.out_of_memory import explained, training_advice
from finetune.parameters import (
    ParameterSize,
    parameter_report,
    parameter_sizes,
    trained_size,
    whole_model_size,
)
from finetune.recompute import recompute
from finetune.record import RunLog, check_loggers, is_better_value, processor
from finetune.rows.batches import step_rows
from finetune.stopping import STOPPED, SignalWatch, StoppedBySignal
from finetune.task import FineTuning, Task

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class TrainingFailed(RuntimeError):
    """The run cannot go on, since its loss or gradient is not finite. The message says where."""


def seed_step(seed: int, step: int, stream: int) -> None:
    """Seed every generator that a step may use, so that a resumed step draws the same numbers."""
    number = int(np.random.SeedSequence([seed, step, stream]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@dataclass(frozen=True)
class Schedule:
    """The number of optimizer steps, and the epoch of a step."""

    rows: int
    global_batch: int
    epochs: int
    max_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.global_batch)

    @property
    def total_steps(self) -> int:
        return min(self.steps_per_epoch * self.epochs, self.max_steps or 2**62)

    def ends_epoch(self, done: int) -> bool:
        return done % self.steps_per_epoch == 0 or done == self.total_steps

    def epoch_of(self, done: int) -> int:
        """Epoch, from 1, that the last of `done` steps belonged to."""
        return (done - 1) // self.steps_per_epoch + 1


Config = TypeVar("Config", bound=RunConfig)


def train(config: TrainConfig) -> Path:
    """Fine-tune; returns the last checkpoint's folder. Raises: as train_task."""
    return train_task(config, FineTuning)


def train_task(config: Config, make_task: Callable[[Config], Task]) -> Path:
    """Train the task that `make_task(config)` makes; returns the last checkpoint's folder.

    Raises:
        ValueError, FileNotFoundError: flags, files or rows that do not fit, before anything is
            written.
        TrainingFailed: the loss became nan or infinite; names step and rows.
        StoppedBySignal: SIGTERM, SIGHUP or SIGINT came before the last step; a checkpoint is saved.
        MemoryError: says what is needed, what there is, and what would make it fit.
    """
    with ranks_restored(), explained(lambda: training_advice(config)):
        config = with_local_model(config)
        task = make_task(config)
        output_dir = Path(config.output_dir or task.default_output_dir)
        check_start(config, Path(task.model_path))
        init_distributed()
        lock = locked_folder(output_dir, "--output_dir") if rank() == 0 else nullcontext()
        agree(lock.__enter__)
        try:
            return train_locked(config, task, output_dir)
        finally:
            lock.__exit__(None, None, None)


def train_locked(config: RunConfig, task: Task, output_dir: Path) -> Path:
    """`train_task` once the output folder is locked."""
    agree(lambda: check_output_dir(config, output_dir))
    folder = find_start(config, output_dir)
    task.load_rows()
    schedule = make_schedule(config, task)
    engine, model, precision = build_engine(config, task, schedule.total_steps)
    sizes = parameter_sizes(model)
    say(parameter_report(sizes))
    fingerprint = agree(lambda: base_fingerprint(task.model_path))
    base = {"name_or_path": str(Path(task.model_path).resolve()), "fingerprint": fingerprint}

    checkpointer = Checkpointer(config, output_dir, engine, model, task, base=base)
    if rank() == 0:
        remove_leftovers(
            output_dir, replace=config.overwrite_output_dir and not config.resume_from_checkpoint
        )
    agree(lambda: check_disk(output_dir, checkpointer.needed))
    task.before_training(engine.module, output_dir)
    resumed: dict[str, Any] = {}
    if folder:
        resumed = checkpointer.resume(folder)
        checkpointer.set_later_aside(folder)
    elif config.resume_from_checkpoint:
        say("no checkpoint to resume from: starting anew")
    facts = run_facts(config, task, schedule, checkpointer, precision, sizes)
    loop = Loop(config, engine, model, task, schedule, checkpointer, resumed, facts)
    say(
        f"{task.title}, {config.train_type}, {precision}, {world_size()} rank(s), "
        f"{schedule.rows} rows, {schedule.total_steps} steps of {schedule.global_batch} rows"
    )
    last = loop.run()
    if dropped := task.dropped_rows():
        say(f"{dropped} rows of the stream were bad or too long, and dropped")
    return last


def find_start(config: RunConfig, output_dir: Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means, its files compared with their sums."""
    resume = config.resume_from_checkpoint
    if not resume:
        return None
    folder = agree(lambda: find_resume(resume, output_dir))
    if folder:
        agree(lambda: check_checkpoint(folder, config.verify))
    return folder


def make_schedule(config: RunConfig, task: Task) -> Schedule:
    """The steps of a run whose rows are loaded."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    global_batch = micro * accumulation * data_world(config)
    rows = task.rows_per_epoch(config.max_steps, global_batch)
    return Schedule(rows, global_batch, config.num_train_epochs, config.max_steps)


def run_facts(
    config: RunConfig,
    task: Task,
    schedule: Schedule,
    checkpointer: Checkpointer,
    precision: str,
    sizes: list[ParameterSize],
) -> dict[str, Any]:
    """What run.json says of a run besides its flags."""
    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name(device())
    else:
        device_name = processor()
    return {
        "title": task.title,
        "base_model": checkpointer.base,
        "data": data_facts(config, task, checkpointer.data),
        "world_size": world_size(),
        "device": device_name,
        "precision": precision,
        "rows": schedule.rows,
        "rows_per_step": schedule.global_batch,
        "total_steps": schedule.total_steps,
        "parameters": {"trainable": trained_size(sizes), "all": whole_model_size(sizes)},
    }


def check_start(config: RunConfig, base: Path) -> None:
    """Raises ValueError for a missing package, ranks that do not fit, or a base that does not."""
    check_loggers(config.loggers)
    check_stages(config)
    if isinstance(config, TrainConfig):
        check_packages(config.answer_metrics)
    if (base / "adapter_config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {base} is a LoRA adapter: merge it first "
            f"(merge_lora.py --save_dir), then train on the result; or train the adapter on: its "
            f"base here, and --adapter {base}"
        )
    stored = None if config.train_type == "ptuning" else stored_prefix(base)
    if stored and stored["only"]:
        raise ValueError(
            f"--model_name_or_path {base} holds a P-Tuning prefix alone: "
            f"only --train_type ptuning can go on from it"
        )


def check_output_dir(config: RunConfig, output_dir: Path) -> None:
    """Raises ValueError where an earlier run's checkpoints would be neither used nor replaced."""
    earlier = sorted(output_dir.glob("epoch-*-step-*"), key=lambda path: path.stat().st_mtime)
    if earlier and not (config.resume_from_checkpoint or config.overwrite_output_dir):
        raise ValueError(
            f"--output_dir {output_dir} already holds {earlier[-1].name} of an earlier run: "
            f"go on with --resume_from_checkpoint auto, replace it with --overwrite_output_dir, "
            f"or name another folder"
        )


def build_engine(
    config: RunConfig, task: Task, total_steps: int
) -> tuple["DeepSpeedEngine", nn.Module, str]:
    """(DeepSpeed engine, model, precision).

    The model is prepared by its method; the engine's module wraps it with the loss.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    precision = resolve_precision(config.precision)
    adapters = task.method.saves != "model"
    hidden_size = read_config(task.model_path).hidden_size
    ds = deepspeed_config(
        config,
        precision=precision,
        adapters=adapters,
        total_steps=total_steps,
        hidden_size=hidden_size,
        world=data_world(config),
    )
    partitioned_loading = None
    if ds["zero_optimization"].get("stage") == 3:
        # While this object exists, from_pretrained builds the model partitioned, with the dtype of
        # the frozen weights that it reads here.
        bf16 = {"enabled": precision == "bf16"}
        partitioned_loading = HfDeepSpeedConfig(ds | {"bf16": bf16})
    seed_step(config.seed, 0, stream=0)  # new weights are equal on every rank
    model = task.build_model(DTYPES[precision])
    # DeepSpeed keeps the traceback of an extension that it cannot build, and so this frame.
    del partitioned_loading
    if adapters and precision == "bf16":
        convert_trained_to_fp32(model)
    use_lean_lora(model)
    recompute(model, config.gradient_checkpointing, config.gradient_checkpointing_layers)
    with without_prints():
        loss_module: Any = task.loss_module(model)
        # Of a pipeline's model only one stage is here.
        own = loss_module if config.stages > 1 else model
        groups = parameter_groups(own, config)
        optimizer = make_optimizer(groups, ds)
        engine, *_ = deepspeed.initialize(
            model=loss_module, model_parameters=groups, optimizer=optimizer, config=ds
        )
    if config.stages > 1:
        loss_module.attach(engine)
    else:
        fit_to_one_rank(engine, [p for p in model.parameters() if p.requires_grad])
    return engine, model, precision


def convert_trained_to_fp32(model: nn.Module) -> None:
    """Convert the trainable parameters to fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            share = getattr(parameter, "ds_tensor", None)
            if share is not None:  # ZeRO-3: this rank's share is what counts
                share.data = share.data.float()


def data_facts(config: RunConfig, task: Task, train_hash: str) -> dict[str, Any]:
    """Paths and hashes of a run's rows."""
    facts: dict[str, Any] = {"train": {"path": config.train_path, "sha256": train_hash}}
    if config.eval_path:
        facts["eval"] = {"path": config.eval_path, "sha256": agree(lambda: task.eval_hash)}
    return facts


class Loop:
    """The state of a run between its steps."""

    def __init__(
        self,
        config: RunConfig,
        engine: "DeepSpeedEngine",
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        checkpointer: Checkpointer,
        resumed: dict[str, Any],
        facts: dict[str, Any],
    ):
        """`resumed`: the manifest of the loaded checkpoint, or {}; `facts`: as run_facts."""
        self.config = config
        self.engine = engine
        self.model = model
        self.task = task
        self.schedule = schedule
        self.checkpointer = checkpointer
        self.facts = facts
        self.done = resumed.get("step", 0)
        same_rows = resumed.get("eval_data", checkpointer.eval_data) == checkpointer.eval_data
        self.patience = Patience(
            config.metric_for_best,
            config.early_stopping_min_delta,
            resumed.get("early_stopping") if same_rows else None,
        )
        self.signals = SignalWatch()
        self.last_metrics: dict[str, float] = {}
        self.memory = MemoryTrace()
        self.workers = ThreadPoolExecutor(config.num_workers) if config.num_workers else None
        self.ahead: dict[int, Future[StepBatches]] = {}  # step -> what a worker is making

    def run(self) -> Path:
        """Run the steps that are left; returns the last checkpoint's folder.

        Raises:
            StoppedBySignal: a signal came before the last step.
        """
        with self.signals:
            return self.run_whole()

    def run_whole(self) -> Path:
        """As `run`, while signals are recorded."""
        writer = None
        if rank() == 0:
            eval_data = self.checkpointer.eval_data
            output_dir = self.checkpointer.output_dir
            writer = RunLog(self.config, output_dir, self.done, self.facts, eval_data)
        bar = tqdm(
            total=self.schedule.total_steps,
            initial=self.done,
            desc="training",
            unit="step",
            disable=rank() != 0,
            file=LastingStream(sys.stderr),
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        status = "failed"
        try:
            saved, status = self.run_steps(bar, writer)
            folder = saved or self.save_needed()
        finally:  # so that an error is printed on a new line
            bar.close()
            if self.workers:
                self.workers.shutdown(cancel_futures=True)
            if writer:
                writer.close(status)
        say(f"last checkpoint: {folder}")
        if status == STOPPED:
            raise StoppedBySignal(folder, self.signals.number or SIGTERM)
        return folder

    def run_steps(self, bar: tqdm, writer: RunLog | None) -> tuple[Path | None, str]:
        """Run the steps that are left; returns the last checkpoint and run.json's status."""
        config = self.config
        total_steps = self.schedule.total_steps
        folder = None
        self.memory.begin(self.done + 1)
        while self.done < total_steps and not self.patience.ended(config.early_stopping_patience):
            self.last_metrics = {}  # a checkpoint has the evaluation of its own step or none
            stop = self.measured_step(bar, writer)
            epoch_end = self.schedule.ends_epoch(self.done)
            improved = False
            if config.has_evaluation and (epoch_end or self.is_due(config.eval_step)):
                improved = self.evaluate(writer)
            ended = self.patience.ended(config.early_stopping_patience)
            must_save = stop or ended or self.done == total_steps
            saves = must_save or epoch_end or improved or self.is_due(config.save_model_step)
            if saves:
                folder = self.save(improved, needed=must_save) or folder
            if epoch_end or stop or ended:
                self.note_memory(writer)
            if writer and (saves or self.last_metrics):
                writer.write()
            if stop and self.done < total_steps:
                say(
                    f"stopped by signal after step {self.done}; saved {folder}. "
                    f"Go on with --resume_from_checkpoint auto"
                )
                return folder, STOPPED
        if self.done < total_steps:
            say(
                f"stopped early after step {self.done}: {self.patience.metric} has not been better "
                f"than {self.patience.best} by more than {self.patience.min_delta:g} "
                f"for {self.patience.since} evaluations"
            )
            return folder, "stopped early"
        return folder, "finished"

    def note_memory(self, writer: RunLog | None) -> None:
        """Record the memory of the epoch that the last step was of, with its evaluation and its
        checkpoint, and begin the next one's."""
        found = self.memory.end(self.schedule.epoch_of(self.done), self.done)
        self.memory.begin(self.done + 1)
        self.print_line(found.text)
        if writer:
            writer.add_memory(found.to_dict())

    def save_needed(self) -> Path:
        """`save` of a checkpoint that the run cannot go on without."""
        folder = self.save(improved=False)
        if folder is None:
            raise RuntimeError("a needed checkpoint is saved, or save raises")
        return folder

    def is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps (None: never) happens now."""
        return interval is not None and self.done % interval == 0

    def measured_step(self, bar: tqdm, writer: RunLog | None) -> bool:
        """Run one optimizer step, show and log it; True where a signal wants a stop."""
        started = time.perf_counter()
        # Read before the step, in which the scheduler sets the next one.
        lr = self.engine.optimizer.param_groups[0]["lr"]
        loss, norm, tokens, stop, found = self.step()
        speed = tokens / (time.perf_counter() - started)
        bar.set_postfix({"loss": f"{loss:.4f}", "tokens/s": f"{speed:.0f}"}, refresh=False)
        bar.update()
        if writer:
            values = {
                "train_loss": loss,
                "learning_rate": lr,
                "grad_norm": norm,
                "tokens_per_second": speed,
                "memory_gb": self.memory.see(),
                **found,
            }
            writer.add(self.done, values)
        if self.is_due(self.config.show_loss_step) or self.done == self.schedule.total_steps:
            self.print_line(
                f"epoch {self.schedule.epoch_of(self.done)} step {self.done} loss {loss:.6f} "
                f"lr {lr:.3e} grad_norm {norm:.4f} tokens/s {speed:.0f}"
            )
        return stop

    def step(self) -> tuple[float, float, int, bool, dict[str, float]]:
        """One optimizer step.

        Returns:
            (mean loss over the step's labelled tokens on all ranks, norm of its gradient before
            clipping, number of tokens without padding, whether a signal wants a stop, what the
            task measured).
        """
        engine = self.engine
        made = self.task.step_batches(engine.module, self.batches(), self.done)
        labelled_here = sum(map(self.task.count_labels, made.batches))
        stop_here = bool(self.signals.number)
        stages = self.config.stages  # which all count the same rows
        labelled, tokens, stop = sum_over_ranks(labelled_here, made.tokens, stop_here)
        labelled, tokens = labelled / stages, tokens / stages

        engine.train()
        seed_step(self.config.seed, self.done + 1, stream=1 + rank())
        # backward() divides by the number of passes and DeepSpeed averages over ranks. The scale
        # undoes both, so that the sum is divided once.
        scale = len(made.batches) * data_world(self.config) / labelled
        if stages > 1:
            mean = engine.module.train_step(made.batches, scale)
        else:
            mean = sum_over_ranks(self.run_passes(made.batches, scale))[0] / labelled
        self.done += 1
        norm = float(engine.get_global_grad_norm() or 0)
        self.check_finite(mean, norm, made)
        return mean, norm, int(tokens), stop > 0, made.metrics

    def run_passes(self, batches: list[Mapping[str, Any]], scale: float) -> float:
        """Forward, backward and the update; returns the loss of this rank without `scale`."""
        engine = self.engine
        total = 0.0
        for batch in batches:
            loss = engine(scale=scale, **on_device(batch, engine.device))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / scale
        return total

    def check_finite(self, loss: float, norm: float, made: StepBatches) -> None:
        """Raises TrainingFailed where the loss or the norm of its gradient is not finite."""
        # DeepSpeed silently skips a step of infinite gradients; only with the loss scale of fp16
        # is that a normal event.
        norm_fits = math.isfinite(norm) or self.engine.fp16_enabled()
        if math.isfinite(loss) and norm_fits:
            return
        places = ", ".join(map(made.data.place, made.rows))
        raise TrainingFailed(
            f"the loss is {loss}, the norm of its gradient {norm} at step {self.done} "
            f"(rank {rank()} read {places}); nothing was saved of this step. "
            f"Try a lower --learning_rate or --precision bf16 or fp32"
        )

    def batches(self) -> StepBatches:
        """The result of make_batches for the next step; workers start on the steps after it."""
        if self.workers:
            last = min(self.done + self.config.num_workers, self.schedule.total_steps - 1)
            for step in range(self.done + 1, last + 1):
                if step not in self.ahead:
                    self.ahead[step] = self.workers.submit(self.make_batches, step)
        made = self.ahead.pop(self.done, None)
        return made.result() if made else self.make_batches(self.done)

    def make_batches(self, step: int) -> StepBatches:
        """The batches of a step on this rank.

        A pure function of the step, safe to call in a worker thread.
        """
        epoch, place = divmod(step, self.schedule.steps_per_epoch)
        data, order, place = self.task.rows_of_step(
            epoch, place, self.schedule.steps_per_epoch, self.schedule.global_batch
        )
        passes = step_rows(
            order,
            place,
            data.row_lengths,
            micro=self.config.per_device_train_batch_size,
            accumulation=self.config.gradient_accumulation_steps,
            rank=data_rank(self.config),
            world=data_world(self.config),
        )
        rows: list[int] = []
        for chosen in passes:
            rows += [row for row in chosen if row >= 0]
        tokens = int(data.row_lengths[rows].sum())
        batches = [self.task.collate(data, chosen) for chosen in passes]
        return StepBatches(data, rows, tokens, batches)

    def evaluate(self, writer: RunLog | None) -> bool:
        """Compute the task's metrics; True where --metric_for_best is the best so far."""
        self.engine.eval()
        metrics = self.task.evaluate(
            self.engine.module,
            self.model,
            synced=self.engine.zero_optimization_stage() == 3,
            predictions=self.checkpointer.output_dir / PREDICTIONS / f"step-{self.done}.jsonl",
        )
        self.engine.train()
        self.last_metrics = metrics
        self.patience.see(metrics)
        if writer:
            writer.add(self.done, {f"eval_{name}": value for name, value in metrics.items()})
        words = [f"{name} {value:.4f}" for name, value in metrics.items()]
        self.print_line(f"step {self.done} evaluation: {', '.join(words)}")
        best = agree(self.checkpointer.best)
        metric = self.config.metric_for_best
        return is_better_value(metric, metrics[metric], best.value if best else None)

    def save(self, improved: bool, needed: bool = True) -> Path | None:
        """Save the checkpoint of this step; returns its folder.

        Args:
            improved: it is the best one so far.
            needed: the run cannot go on without it. Otherwise a disk without room for it is a
                warning, and None is returned.

        Raises:
            OSError: it cannot be written; always where only this rank of several failed.
        """
        try:
            epoch = self.schedule.epoch_of(max(self.done, 1))
            folder = self.checkpointer.save(
                Progress(epoch, self.done, self.last_metrics, self.patience.state())
            )
        except OSError as error:
            on_all_ranks = isinstance(error, NoRoom) or world_size() == 1
            if needed or not on_all_ranks or isinstance(error, FileExistsError):
                raise
            self.print_line(
                f"WARNING: no checkpoint of step {self.done}: {describe(error)}; "
                f"training goes on, the next save tries again"
            )
            return None
        if improved:
            metric = self.config.metric_for_best
            self.checkpointer.record_best(folder, metric, self.last_metrics[metric])
        self.checkpointer.prune()
        return folder

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if rank() == 0:
            tqdm.write(text, file=LastingStream(sys.stdout))


class Patience:
    """Early stopping: counts evaluations since a metric was last better by more than `min_delta`.

    Attributes:
        best: the value of that evaluation, None before the first.
        since: number of evaluations after it.
    """

    def __init__(self, metric: str, min_delta: float, saved: dict[str, Any] | None):
        """`saved`: the `state()` of a checkpoint; it is ignored where it is of another metric."""
        self.metric = metric
        self.min_delta = min_delta
        self.best: float | None = None
        self.since = 0
        if saved and saved["metric"] == metric:
            self.best = saved["best"]
            self.since = saved["since"]

    def see(self, metrics: dict[str, float]) -> None:
        """Count an evaluation."""
        value = agree(lambda: metrics[self.metric])
        if is_better_value(self.metric, value, self.best, self.min_delta):
            self.best = value
            self.since = 0
        else:
            self.since += 1

    def ended(self, patience: int | None) -> bool:
        """Whether `patience` evaluations (None or 0: any number) brought nothing better."""
        return bool(patience) and self.since >= (patience or 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint's manifest stores of it."""
        return {"metric": self.metric, "best": self.best, "since": self.since}
