"""The training loop: one optimizer step at a time, each a pure function of (seed, step) and the weights."""

import math
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM

import numpy as np
import torch
from tqdm import tqdm

from chatglm.loading import base_fingerprint, read_config, stored_prefix
from finetune.checkpoint import (
    PREDICTIONS,
    Checkpointer,
    NoRoom,
    check_checkpoint,
    check_disk,
    find_resume,
    remove_leftovers,
)
from finetune.commands import describe
from finetune.config import TrainConfig
from finetune.distributed import (
    DTYPES,
    agree,
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
    without_prints,
    world_size,
)
from finetune.evaluation.metrics import check_packages
from finetune.files import LastingStream, locked_folder
from finetune.lora import use_lean_lora
from finetune.out_of_memory import explained, training_advice
from finetune.recompute import recompute
from finetune.record import RunLog, check_loggers, is_better, processor
from finetune.rows.batches import step_rows
from finetune.stopping import STOPPED, SignalWatch, StoppedBySignal
from finetune.task import FineTuning, RowSet


class TrainingFailed(RuntimeError):
    """The run cannot go on: the loss is not a number, or the like. The message says where."""


def seed_step(seed: int, step: int, stream: int) -> None:
    """Set every generator that a step may draw from, so that a resumed step draws the same."""
    number = int(np.random.SeedSequence([seed, step, stream]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps there are, and which epoch a step belongs to."""

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


def train(config: TrainConfig, make_task: Callable[[TrainConfig], FineTuning] = FineTuning) -> Path:
    """Run a whole training of what `make_task(config)` says; returns the last checkpoint's folder.

    Raises:
        ValueError, FileNotFoundError: flags, files or rows that do not fit, before anything is written.
        TrainingFailed: the loss became nan or infinite; names step and rows.
        StoppedBySignal: SIGTERM, SIGHUP or SIGINT came before the last step; what was done is saved.
        MemoryError: says what is needed, what there is, and what would make it fit.
    """
    with explained(lambda: training_advice(config)):
        return run_training(config, make_task)


def run_training(config: TrainConfig, make_task: Callable[[TrainConfig], FineTuning]) -> Path:
    """As `train`, but what runs out of memory raises what it raises."""
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


def train_locked(config: TrainConfig, task: FineTuning, output_dir: Path) -> Path:
    """`train` in an output folder that is this run's alone."""
    agree(lambda: check_output_dir(config, output_dir))
    folder = None
    if config.resume_from_checkpoint:
        folder = agree(lambda: find_resume(config.resume_from_checkpoint, output_dir))
        if folder:
            agree(lambda: check_checkpoint(folder, config.verify))
    task.load_rows()
    global_batch = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    )
    schedule = Schedule(
        task.rows_per_epoch(config.max_steps, global_batch),
        global_batch,
        config.num_train_epochs,
        config.max_steps,
    )
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
    resumed = {}
    if folder:
        resumed = checkpointer.resume(folder)
        checkpointer.set_later_aside(folder)
    elif config.resume_from_checkpoint:
        say("no checkpoint to resume from: starting anew")
    facts = {
        "title": task.title,
        "base_model": base,
        "data": data_facts(config, task, checkpointer.data),
        "world_size": world_size(),
        "device": torch.cuda.get_device_name(device())
        if torch.cuda.is_available()
        else processor(),
        "precision": precision,
        "rows": schedule.rows,
        "rows_per_step": schedule.global_batch,
        "total_steps": schedule.total_steps,
        "parameters": {
            "trainable": sum(size for _, size, yes in sizes if yes),
            "all": sum(size for _, size, _ in sizes),
        },
    }
    loop = Loop(config, engine, model, task, schedule, checkpointer, resumed, facts)
    say(
        f"{task.title}, {config.train_type}, {precision}, {world_size()} rank(s), {schedule.rows} rows, "
        f"{schedule.total_steps} steps of {schedule.global_batch} rows"
    )
    last = loop.run()
    if task.stream and task.stream.dropped:
        say(f"{len(task.stream.dropped)} rows of the stream were bad or too long, and dropped")
    return last


def check_start(config: TrainConfig, base: Path) -> None:
    """Refuse what would be lost or misread, or fail later; raises ValueError."""
    check_loggers(config.loggers)
    check_packages(config.answer_metrics)
    if (base / "adapter_config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {base} is a LoRA adapter: merge it first (merge_lora.py --save_dir), then train on the result"
        )
    if config.train_type != "ptuning" and (stored := stored_prefix(base)) and stored["only"]:
        raise ValueError(
            f"--model_name_or_path {base} holds a P-Tuning prefix alone: only --train_type ptuning can go on from it"
        )


def check_output_dir(config: TrainConfig, output_dir: Path) -> None:
    """Raises ValueError where an earlier run's checkpoints lie and no flag says what becomes of them."""
    there = sorted(output_dir.glob("epoch-*-step-*"), key=lambda p: p.stat().st_mtime)
    if there and not (config.resume_from_checkpoint or config.overwrite_output_dir):
        raise ValueError(
            f"--output_dir {output_dir} already holds {there[-1].name} of an earlier run: go on with "
            f"--resume_from_checkpoint auto, replace it with --overwrite_output_dir, or name another folder"
        )


def build_engine(
    config: TrainConfig, task: FineTuning, total_steps: int
) -> tuple["DeepSpeedEngine", nn.Module, str]:
    """(DeepSpeed engine, model, precision): the model prepared by its method and wrapped with the loss."""
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
        world=world_size(),
    )
    if ds["zero_optimization"].get("stage") == 3:
        # While this object lives, from_pretrained builds the model partitioned. It reads the frozen weights' dtype here.
        partitioned_loading = HfDeepSpeedConfig(ds | {"bf16": {"enabled": precision == "bf16"}})  # noqa: F841
    seed_step(config.seed, 0, stream=0)  # new weights are equal on every rank
    model = task.build_model(DTYPES[precision])
    if adapters and precision == "bf16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's share is what counts
                    parameter.ds_tensor.data = parameter.ds_tensor.data.float()
    use_lean_lora(model)
    recompute(model, config.gradient_checkpointing, config.gradient_checkpointing_layers)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(model, config)
    optimizer = make_optimizer(groups, ds)
    with without_prints():
        engine, *_ = deepspeed.initialize(
            model=task.loss_module(model), model_parameters=groups, optimizer=optimizer, config=ds
        )
    fit_to_one_rank(engine, trainable)
    return engine, model, precision


def parameter_sizes(model: nn.Module) -> list[tuple[str, int, bool]]:
    """(name, count, whether it is trained) of each parameter."""
    return [(n, full_size(p), p.requires_grad) for n, p in model.named_parameters()]


def parameter_report(sizes: list[tuple[str, int, bool]]) -> str:
    """Names, counts and share of the trainable parameters."""
    trainable = [(name, size) for name, size, yes in sizes if yes]
    part, total = sum(size for _, size in trainable), sum(size for _, size, _ in sizes)
    shown = [f"  {name} {size:,}" for name, size in trainable]
    if len(shown) > 8:
        shown = [*shown[:4], f"  ... {len(shown) - 8} more ...", *shown[-4:]]
    return "\n".join(
        [f"trainable: {part:,} of {total:,} parameters ({100 * part / total:.4f} %)", *shown]
    )


def full_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter; of the whole where ZeRO-3 has taken it apart or 4 bits have packed it."""
    if hasattr(parameter, "ds_id"):
        return parameter.ds_numel
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed else parameter.numel()


def data_facts(config: TrainConfig, task: FineTuning, train_hash: str) -> dict:
    """Paths and hashes of a run's rows."""
    found = {"train": {"path": config.train_path, "sha256": train_hash}}
    if config.eval_path:
        found["eval"] = {"path": config.eval_path, "sha256": agree(lambda: task.eval_hash)}
    return found


class Loop:
    """The state of a run between its steps."""

    def __init__(
        self,
        config: TrainConfig,
        engine: "DeepSpeedEngine",
        model: nn.Module,
        task: FineTuning,
        schedule: Schedule,
        checkpointer: Checkpointer,
        resumed: dict,
        facts: dict,
    ):
        """`resumed`: the manifest of the checkpoint that was loaded, if one was; `facts`: what run.json says of the run."""
        self.config, self.engine, self.model, self.task = config, engine, model, task
        self.schedule, self.checkpointer, self.facts = schedule, checkpointer, facts
        self.done = resumed.get("step", 0)
        same_rows = resumed.get("eval_data", checkpointer.eval_data) == checkpointer.eval_data
        self.patience = Patience(
            config.metric_for_best,
            config.early_stopping_min_delta,
            resumed.get("early_stopping") if same_rows else None,
        )
        self.signals = SignalWatch()
        self.last_metrics: dict = {}
        self.workers = ThreadPoolExecutor(config.num_workers) if config.num_workers else None
        self.ahead: dict[int, Future] = {}  # the batches of the steps to come, in the making

    def run(self) -> Path:
        with self.signals:
            return self.run_whole()

    def run_whole(self) -> Path:
        config, schedule, checkpointer = self.config, self.schedule, self.checkpointer
        writer = (
            RunLog(config, checkpointer.output_dir, self.done, self.facts, checkpointer.eval_data)
            if rank() == 0
            else None
        )
        bar = tqdm(
            total=schedule.total_steps,
            initial=self.done,
            desc="training",
            unit="step",
            disable=rank() != 0,
            file=LastingStream(sys.stderr),
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        status = "failed"
        try:
            folder, status = self.run_steps(bar, writer)
            if folder is None:
                folder = self.save(improved=False)
        finally:  # so that an error gets a line of its own
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
        """The steps that are left; returns the last checkpoint written, and how it ended, as run.json says it."""
        config, schedule = self.config, self.schedule
        folder = None
        while self.done < schedule.total_steps and not self.patience.ended(
            config.early_stopping_patience
        ):
            started = time.perf_counter()
            self.last_metrics = {}  # a checkpoint carries the evaluation of its own step or none
            lr = self.engine.optimizer.param_groups[0][
                "lr"
            ]  # of this step; the scheduler moves on inside
            loss, norm, tokens, stop = self.step()
            seconds = time.perf_counter() - started
            bar.set_postfix(
                refresh=False, loss=f"{loss:.4f}", **{"tokens/s": f"{tokens / seconds:.0f}"}
            )
            bar.update()
            values = {
                "train_loss": loss,
                "learning_rate": lr,
                "grad_norm": norm,
                "tokens_per_second": tokens / seconds,
            }
            if writer:
                writer.add(self.done, values | {"memory_gb": peak_memory_gb()})
            if self.done % config.show_loss_step == 0 or self.done == schedule.total_steps:
                self.tell(
                    f"epoch {schedule.epoch_of(self.done)} step {self.done} loss {loss:.6f} lr {lr:.3e} "
                    f"grad_norm {norm:.4f} tokens/s {tokens / seconds:.0f}"
                )
            epoch_end = schedule.ends_epoch(self.done)
            improved = False
            if config.has_evaluation and (
                epoch_end or (config.eval_step and self.done % config.eval_step == 0)
            ):
                improved = self.evaluate(writer)
            ended = self.patience.ended(config.early_stopping_patience)
            saves = (
                epoch_end
                or improved
                or stop
                or ended
                or (config.save_model_step and self.done % config.save_model_step == 0)
            )
            if saves:
                folder = (
                    self.save(improved, needed=stop or ended or self.done == schedule.total_steps)
                    or folder
                )
            if writer and (saves or self.last_metrics):
                writer.write()
            if stop and self.done < schedule.total_steps:
                say(
                    f"stopped by signal after step {self.done}; saved {folder}. Go on with --resume_from_checkpoint auto"
                )
                return folder, STOPPED
        if self.done < schedule.total_steps:
            say(
                f"stopped early after step {self.done}: {self.patience.metric} has not been better than {self.patience.best} "
                f"by more than {self.patience.min_delta:g} for {self.patience.since} evaluations"
            )
            return folder, "stopped early"
        return folder, "finished"

    def step(self) -> tuple[float, float, int, bool]:
        """One optimizer step: (mean loss over its labelled tokens on all ranks, norm of its gradient before clipping, real
        tokens read, stop wanted).
        """
        config, engine = self.config, self.engine
        data, rows, tokens, batches = self.batches()
        labelled, tokens, stop = sum_over_ranks(
            sum(map(self.task.count_labels, batches)), tokens, bool(self.signals.number)
        )

        engine.train()
        seed_step(config.seed, self.done + 1, stream=1 + rank())
        # backward() divides by the passes and DeepSpeed averages over ranks; both undone, so the sum is divided once.
        scale = len(batches) * world_size() / labelled
        total = 0.0
        for batch in batches:
            loss = engine(scale=scale, **on_device(batch, engine.device))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / scale
        self.done += 1
        loss = sum_over_ranks(total)[0] / labelled
        norm = float(engine.get_global_grad_norm() or 0)
        # DeepSpeed skips a step of infinite gradients without a word; only fp16 with its loss scale means it so.
        if not math.isfinite(loss) or not (math.isfinite(norm) or engine.fp16_enabled()):
            places = [data.place(row) for row in rows]
            raise TrainingFailed(
                f"the loss is {loss}, the norm of its gradient {norm} at step {self.done} (rank {rank()} read {', '.join(places)}); "
                f"nothing was saved of this step. Try a lower --learning_rate or --precision bf16 or fp32"
            )
        return loss, norm, int(tokens), stop > 0

    def batches(self) -> tuple[RowSet, list[int], int, list[dict]]:
        """What make_batches makes of the step to come; workers begin with those after it."""
        last = min(self.done + self.config.num_workers, self.schedule.total_steps - 1)
        for step in range(self.done + 1, last + 1):
            if step not in self.ahead:
                self.ahead[step] = self.workers.submit(self.make_batches, step)
        made = self.ahead.pop(self.done, None)
        return made.result() if made else self.make_batches(self.done)

    def make_batches(self, step: int) -> tuple[RowSet, list[int], int, list[dict]]:
        """The rows and which are this rank's, their tokens, and its collated batches: a pure function of the step, whoever calls it."""
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
            rank=rank(),
            world=world_size(),
        )
        rows = [row for chosen in passes for row in chosen if row >= 0]
        return (
            data,
            rows,
            int(data.row_lengths[rows].sum()),
            [self.task.collate(data, chosen) for chosen in passes],
        )

    def evaluate(self, writer: RunLog | None) -> bool:
        """The task's metrics; True where the chosen one is the best so far."""
        config = self.config
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
        self.tell(
            f"step {self.done} evaluation: "
            + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )
        best = agree(self.checkpointer.best)
        return is_better(
            config.metric_for_best, metrics[config.metric_for_best], best and best["value"]
        )

    def save(self, improved: bool, needed: bool = True) -> Path | None:
        """The checkpoint of this step. Where the disk has no room for it and the run goes on without (not `needed`), None.

        Raises:
            OSError: it cannot be written; always where only this rank of several failed.
        """
        try:
            folder = self.checkpointer.save(
                epoch=self.schedule.epoch_of(max(self.done, 1)),
                step=self.done,
                metrics=self.last_metrics,
                patience=self.patience.state(),
            )
        except OSError as error:
            if (
                needed
                or not (isinstance(error, NoRoom) or world_size() == 1)
                or isinstance(error, FileExistsError)
            ):
                raise
            self.tell(
                f"WARNING: no checkpoint of step {self.done}: {describe(error)}; training goes on, the next save tries again"
            )
            return None
        if improved:
            self.checkpointer.record_best(
                folder, self.config.metric_for_best, self.last_metrics[self.config.metric_for_best]
            )
        self.checkpointer.prune()
        return folder

    def tell(self, text: str) -> None:
        """A line above the progress bar, on rank 0."""
        if rank() == 0:
            tqdm.write(text, file=LastingStream(sys.stdout))


class Patience:
    """Early stopping: the best value of a metric, and how many evaluations came since without one better by more than `min_delta`."""

    def __init__(self, metric: str, min_delta: float, saved: dict | None):
        """`saved`: the `state()` of a checkpoint; of another metric it says nothing."""
        self.metric, self.min_delta = metric, min_delta
        same = saved and saved["metric"] == metric
        self.best, self.since = (saved["best"], saved["since"]) if same else (None, 0)

    def see(self, metrics: dict[str, float]) -> None:
        value = agree(lambda: metrics[self.metric])
        if is_better(self.metric, value, self.best, self.min_delta):
            self.best, self.since = value, 0
        else:
            self.since += 1

    def ended(self, patience: int | None) -> bool:
        return bool(patience) and self.since >= patience

    def state(self) -> dict:
        return {"metric": self.metric, "best": self.best, "since": self.since}


def peak_memory_gb() -> float:
    """Peak memory of this rank: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device()) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
