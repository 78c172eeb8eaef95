"""Checkpoints, written atomically: to a temporary folder, flushed to disk, renamed.

output_dir/epoch-E-step-S/
    adapter_model.safetensors + adapter_config.json      LoRA
    model.safetensors (the prefix alone) + config.json   P-Tuning
    model*.safetensors + config.json                     freeze, all
    tokenizer files, generation_config.json
    train_config.json, manifest.json
    trainer/          DeepSpeed's shards: optimizer, schedule, trainable weights
    checksums.json    of all these files (chatglm/checksums.py)
A folder with a manifest is complete. The newest is found by its step, so no pointer file can go
stale.
"""

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatglm.checksums import CHECKSUMS, check_folder_files, write_checksums
from chatglm.families import Family
from chatglm.family_tokenizer import FamilyTokenizer
from chatglm.files import read_json
from chatglm.loading import read_tensors, stop_ids
from chatglm.runs import MANIFEST, check_not_run, committed_checkpoints, step_of
from chatglm.saving import check_disk, disk_errors, flush, flush_tree, set_modes
from finetune.config import RowsConfig, RunConfig
from finetune.contents import path_contents
from finetune.distributed import agree, rank, say, whole_size, without_prints, world_size
from finetune.ds_file import read_ds_file
from finetune.elastic import read_shards, restore, weights_only
from finetune.files import sha256, write_json
from finetune.lora import check_lora_start, on_original_base
from finetune.methods import Method
from finetune.record import RUN, is_better_value, versions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
PREDICTIONS = "predictions"  # of each evaluation, in the output folder
SET_ASIDE = "set-aside"  # folders of checkpoints that a resumed run makes again


class SavedTask(Protocol):
    """What a checkpoint needs to know of the task that is trained (finetune.task.FineTuning)."""

    @property
    def method(self) -> Method: ...

    @property
    def family(self) -> Family | None: ...

    @property
    def model_path(self) -> str: ...

    @property
    def eval_hash(self) -> str | None:
        """Of the evaluation rows; None without."""

    def data_hash(self) -> str:
        """Of the training rows: a resumed run must have the same."""

    def evaluation_id(self) -> str | None:
        """Text that is the same where two values of --metric_for_best are comparable."""

    def before_save(self, loss_module: nn.Module, *, evaluated: bool) -> None:
        """What of a save every rank must take part in.

        Args:
            evaluated: the task's evaluation has just seen these weights.
        """

    def export(self, model: Any, state: dict[str, Tensor], folder: Path) -> None:
        """Write what inference needs of the trained model; `state` as export_model takes it."""

    def extra_bytes(self, model: Any) -> int:
        """Estimated size of what `export` writes besides the model's weights."""

    def load_state(self, folder: Path) -> None:
        """Read what `export` wrote for a resumed run alone; raises ValueError."""


def read_manifest(folder: str | Path, verify: str | None = None) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where there is none.

    Args:
        verify: how it is compared with the folder's checksums, one of checksums.LEVELS.

    Raises:
        ValueError: it is not readable, damaged, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    check_folder_files(folder, verify, wanted=lambda name: name == MANIFEST)
    try:
        manifest = read_json(path)
        version = manifest["format_version"] + 0
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a checkpoint manifest") from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, this program reads up to {FORMAT_VERSION}"
        )
    return manifest


def read_committed(folder: Path, verify: str | None = None) -> dict[str, Any]:
    """As read_manifest, of a folder that must have a manifest.

    Raises:
        ValueError: also where there is none.
    """
    manifest = read_manifest(folder, verify)
    if manifest is None:
        raise ValueError(f"{folder}: no {MANIFEST}")
    return manifest


def check_checkpoint(folder: Path, verify: str | None = None) -> None:
    """Compare every file of a checkpoint with its checksums, by default with SHA-256.

    Raises:
        ValueError: one has changed; the message names it and the newest other checkpoint.
    """
    try:
        check_folder_files(folder, verify, default="full")
        if not (folder / CHECKSUMS).is_file() and verify != "off":
            check_old_sums(folder)
    except ValueError as error:
        checkpoints = committed_checkpoints(folder.parent)
        others = [other for other in checkpoints if other.resolve() != folder.resolve()]
        if not others:
            raise ValueError(str(error)) from None
        raise ValueError(f"{error}. The newest other checkpoint is {others[-1]}.") from None


def check_old_sums(folder: Path) -> None:
    """Compare exported files with the sums in the manifest, where earlier versions wrote them.

    Raises:
        ValueError: a file is missing or has changed.
    """
    manifest = read_manifest(folder) or {}
    sums = manifest.get("sha256") or {}
    for name, expected in sums.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(
                f"{folder / name}: changed since it was written (its SHA-256 is not the "
                f"manifest's); --verify off takes it as it is"
            )


def find_resume(resume: str, output_dir: str | Path) -> Path | None:
    """The folder --resume_from_checkpoint means; None for "auto" where there is none yet.

    Raises:
        FileNotFoundError: the named folder is no complete checkpoint with a trainer state.
    """
    if resume == "auto":
        checkpoints = committed_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    folder = Path(resume)
    check_not_run(folder, "--resume_from_checkpoint")
    if not (folder / MANIFEST).is_file() or not (folder / "trainer").is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint: {folder} is not a complete checkpoint "
            f"(manifest.json and trainer/)"
        )
    return folder


def remove_leftovers(output_dir: Path, replace: bool) -> None:
    """Delete what an interrupted save left; with `replace`, also an earlier run's checkpoints."""
    replaced = list(output_dir.glob("epoch-*-step-*")) if replace else []
    for folder in replaced:
        os.replace(folder, folder.with_name(f".{folder.name}.tmp"))
    for path in output_dir.glob(".epoch-*"):
        shutil.rmtree(path, ignore_errors=True)
    if replaced:
        for name in ("best.json", RUN):
            (output_dir / name).unlink(missing_ok=True)
        set_aside = output_dir.glob(f"{SET_ASIDE}-*")
        for path in [output_dir / "runs", output_dir / PREDICTIONS, *set_aside]:
            shutil.rmtree(path, ignore_errors=True)


def gathered_state(model: nn.Module, *, trainable_only: bool) -> dict[str, Tensor]:
    """{name: CPU tensor} on rank 0, empty elsewhere; tensors are whole under ZeRO-3 too.

    A collective operation: every rank must call it.

    Raises:
        RuntimeError: a tensor came out empty.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id") and not (trainable_only and is_halved(parameter)):
            from deepspeed import zero

            with zero.GatheredParameters([parameter]):
                if rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        else:
            values = trained_values(parameter, trainable_only)
            if rank() == 0:
                state[name] = values.cpu()
        if rank() == 0 and not state[name].numel():
            raise RuntimeError(f"{name} is empty: it was not gathered")
    return state


def is_halved(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's fp16 mode, which halves adapters too, may have halved a parameter."""
    return parameter.dtype == torch.float16


def trained_values(parameter: nn.Parameter, is_adapter: bool) -> Tensor:
    """A parameter's values, of a halved adapter its fp32 master: then all its ranks take part."""
    if is_adapter and is_halved(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor = safe_get_full_fp32_param(parameter)
        return master.detach()
    return parameter.detach()


def inner_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a network's tensors those of its `model`, by the model's own names."""
    prefix = "model."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def export_model(
    model: Any,
    method: Method,
    tokenizer: "PreTrainedTokenizerBase",
    state: dict[str, Tensor],
    folder: Path,
) -> None:
    """Write what inference needs of `model`: weights, config, tokenizer.

    Args:
        model: of transformers or peft, as `method.make_trainable` returns it.
        method: its `saves` says which weights: adapter, prefix or all.
        state: gathered trainable parameters, or all of them where method.saves is "model".
    """
    if method.saves == "adapter":
        with on_original_base(model, state) as adapter:
            model.save_pretrained(
                str(folder),
                state_dict=adapter,
                safe_serialization=True,
                save_embedding_layers=False,
            )
    elif method.saves == "prefix":
        export_prefix(model, state, folder)
    else:
        if model.config.tie_word_embeddings:
            drop_tied(model, state)
        model.save_pretrained(str(folder), state_dict=state, max_shard_size="2GB")
    generation = getattr(model, "generation_config", None)
    if generation is not None and isinstance(tokenizer, FamilyTokenizer):
        generation.eos_token_id = stop_ids(tokenizer)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def drop_tied(model: Any, state: dict[str, Tensor]) -> None:
    """Remove from `state` the tensors that are another name of one that it has."""
    for tied, source in (model._tied_weights_keys or {}).items():
        if source in state:
            state.pop(tied, None)


def export_prefix(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write the weights of a P-Tuning prefix and the config.json that names its base."""
    from safetensors.torch import save_file

    prefix = {name: t.contiguous() for name, t in state.items() if "prefix_encoder." in name}
    save_file(prefix, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(str(folder))
    path = folder / "config.json"
    config = read_json(path)
    config.pop("quantization_config", None)  # of the base in this run's memory
    # The base, as the official P-Tuning checkpoints name it.
    config["_name_or_path"] = model.config.name_or_path
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checkpoint_bytes(model: nn.Module, saves: str) -> int:
    """Estimated size of one checkpoint.

    The exported weights, and of each trainable one the fp32 master, two moments and a copy.
    """
    total = 10_000_000 + exported_bytes(model, saves)
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += whole_size(parameter) * (12 + parameter.element_size())
    return total


def exported_bytes(model: nn.Module, saves: str) -> int:
    """Size of the weights that `export_model` writes."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad or saves == "model":
            total += whole_size(parameter) * parameter.element_size()
    return total


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint's folder name, and its value of --metric_for_best."""

    name: str
    value: float

    def to_dict(self, metric: str) -> dict[str, Any]:
        """The content of best.json."""
        return {"checkpoint": self.name, "metric": metric, "value": self.value}


@dataclass(frozen=True)
class Progress:
    """How far a run has come when a checkpoint is saved.

    Attributes:
        epoch: from 1.
        step: number of optimizer steps.
        metrics: of the evaluation of this step, empty without one.
        patience: the state of early stopping.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    patience: dict[str, Any]


class Checkpointer:
    """Saves, finds again and prunes the checkpoints of one run."""

    def __init__(
        self,
        config: RunConfig,
        output_dir: Path,
        engine: "DeepSpeedEngine",
        model: nn.Module,
        task: SavedTask,
        *,
        base: dict[str, Any],
    ):
        """`base`: path and fingerprint of the base model."""
        self.config = config
        self.output_dir = output_dir
        self.engine = engine
        self.model = model
        self.task = task
        self.base = base
        self.needed = checkpoint_bytes(model, task.method.saves) + task.extra_bytes(model)
        self.data = agree(task.data_hash)
        self.eval_data = agree(task.evaluation_id)
        self.contents = agree(
            lambda: path_contents(
                config,
                fingerprint=base.get("fingerprint"),
                data=self.data,
                model_path=task.model_path,
            )
        )

    def save(self, progress: "Progress") -> Path:
        """Write output_dir/epoch-E-step-S on all ranks; when this returns it is committed.

        Raises:
            NoRoom: on every rank, before anything is written.
            OSError: on the rank that could not write.
        """
        final = self.output_dir / f"epoch-{progress.epoch}-step-{progress.step}"
        if agree((final / MANIFEST).is_file):
            return final
        aside = self.output_dir / f".{final.name}.tmp"
        agree(lambda: self.make_room(aside))
        try:
            with disk_errors(final):
                self.write(aside, final, progress)
        except OSError:
            if rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        barrier()
        return final

    def make_room(self, aside: Path) -> None:
        """Make the empty folder `aside`; raises NoRoom where a checkpoint would not fit."""
        shutil.rmtree(aside, ignore_errors=True)
        check_disk(self.output_dir, self.needed)
        aside.mkdir()

    def write(self, aside: Path, final: Path, progress: "Progress") -> None:
        """Every rank's part of `save`."""
        self.task.before_save(self.engine.module, evaluated=bool(progress.metrics))
        self.engine.save_checkpoint(
            str(aside / "trainer"), tag="state", save_latest=False, exclude_frozen_parameters=True
        )
        trainable_only = self.task.method.saves != "model"
        if self.config.stages > 1:
            state = self.engine.module.gathered_state(trainable_only=trainable_only)
        else:
            state = gathered_state(self.model, trainable_only=trainable_only)
        barrier()  # every rank's shards are there
        if rank() != 0:
            return
        self.task.export(self.model, state, aside)
        self.config.save(aside / "train_config.json")
        text = json.dumps(self.manifest(progress), indent=2, ensure_ascii=False)
        (aside / MANIFEST).write_text(text + "\n", "utf-8")
        set_modes(aside)
        write_checksums(aside)
        flush_tree(aside)
        if final.exists():  # it is no checkpoint, so it may be a merged model: do not replace it
            raise FileExistsError(
                f"{final} is in the way of a checkpoint and is none itself; move it away"
            )
        os.replace(aside, final)
        flush(self.output_dir)  # so that the rename survives a power cut
        self.warn_if_untrained(state)

    def manifest(self, progress: "Progress") -> dict[str, Any]:
        """The content of manifest.json."""
        return {
            "format_version": FORMAT_VERSION,
            "task": self.config.task,
            "family": self.task.family and self.task.family.name,
            "method": self.config.train_type,
            "base_model": self.base,
            "train_data": self.data,
            "eval_data": self.eval_data,
            "contents": self.contents,
            "epoch": progress.epoch,
            "step": progress.step,
            "world_size": world_size(),
            "zero_stage": self.engine.zero_optimization_stage(),
            "metrics": progress.metrics,
            "early_stopping": progress.patience,
            "versions": versions(),
        }

    def warn_if_untrained(self, state: dict[str, Tensor]) -> None:
        """Print a warning where no LoRA B has changed from zero."""
        lora_b = [t for name, t in state.items() if "lora_B" in name]
        if lora_b and not any(map(Tensor.any, lora_b)):
            say(
                "WARNING: every LoRA B is still zero, so this adapter changes nothing: "
                "is the learning rate 0, every answer empty, or every reward of a prompt the same?"
            )

    def resume(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into the engine; returns its manifest.

        Raises:
            ValueError: it was made by other flags, rows or base model, or in steps of other
                sizes, or its shards are damaged.
        """
        manifest = read_committed(folder, self.config.verify)
        saved = read_json(folder / "train_config.json")
        elastic = manifest["world_size"] != world_size()
        if elastic and self.config.stages > 1:
            raise ValueError(
                f"{folder} was made by {manifest['world_size']} ranks: a run with --num_stages "
                f"resumes on as many, this one has {world_size()}"
            )
        self.check_flags(folder, saved, manifest.get("contents", {}), elastic)
        if elastic:
            self.check_batch(folder, manifest["world_size"], saved)
        else:
            self.check_stage(folder, manifest)
        self.check_contents(folder, manifest)
        for module in self.model.modules():  # a predictor's backbone is a part of its model
            if "lora_start" in vars(module):
                check_lora_start(module, dict(read_tensors(folder / "adapter_model.safetensors")))
        self.load_trainer(folder, elastic)
        self.task.load_state(folder)
        made_by = f", made by {manifest['world_size']} rank(s), on {world_size()}"
        say(f"resumed from {folder}{made_by if elastic else ''}")
        return manifest

    def check_stage(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint's shards are of another ZeRO stage."""
        stage = self.engine.zero_optimization_stage()
        # Old manifests do not have the stage: it was the DeepSpeed file's.
        asked = read_ds_file(self.config.ds_file)[1].get("zero_optimization", {}).get("stage", 0)
        before = manifest.get("zero_stage", asked)
        if before != stage:
            raise ValueError(
                f"{folder} holds a ZeRO-{before} state, this run is on ZeRO-{stage}; "
                f"its weights can still be a new run's start"
            )

    def check_contents(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Raises ValueError where base model, rows or another file behind a flag has changed."""
        fingerprint = manifest["base_model"].get("fingerprint")
        if fingerprint and fingerprint != self.base.get("fingerprint"):
            raise ValueError(
                f"{folder} was trained on another base model than {self.base['name_or_path']}"
            )
        if manifest.get("train_data") not in (None, self.data):
            raise ValueError(
                f"--train_path: {self.config.train_path} has changed since {folder} was made"
            )
        for name, content in manifest.get("contents", {}).items():
            if self.contents.get(name) != content:
                path = getattr(self.config, name, "")
                raise ValueError(f"--{name}: {path} has changed since {folder} was made")

    def load_trainer(self, folder: Path, elastic: bool) -> None:
        """Load the shards into the engine, `elastic` where another number of ranks wrote them.

        Raises:
            ValueError: a shard is damaged, missing, or holds more than tensors.
        """
        try:
            if elastic:
                with weights_only():
                    restore(self.engine, read_shards(folder / "trainer" / "state"))
                return
            with weights_only(), without_prints():
                path, _ = self.engine.load_checkpoint(
                    str(folder / "trainer"), tag="state", load_module_strict=False
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            lines = str(error).splitlines()
            first = str(error).split("\n")[0]
            reason = next(filter(lambda line: "WeightsUnpickler" in line, lines), first)
            raise ValueError(
                f"{folder}/trainer: a shard is torn, or holds more than tensors ({reason[:200]})"
            ) from None
        if path is None:
            raise ValueError(f"{folder}/trainer: DeepSpeed could not load its shards")

    def check_flags(
        self, folder: Path, saved: dict[str, Any], contents: dict[str, str], elastic: bool
    ) -> None:
        """Raises ValueError where flags that shape training differ.

        Paths to the same content count as equal; with `elastic`, the batch sizes may differ.
        """
        same = [name for name, content in contents.items() if self.contents.get(name) == content]
        sizes = ["per_device_train_batch_size", "gradient_accumulation_steps"] if elastic else []
        changed = self.config.changed_since(saved, but=(*same, *sizes))
        if not changed:
            return
        advice = ""
        if all(text.startswith(("--max_steps:", "--num_train_epochs:")) for text in changed):
            advice = (
                ". The learning rates of all its steps follow from how many there are, "
                "so it cannot be made longer; train on from its result instead, "
                f"in another --output_dir: {self.next_start(folder)}"
            )
        raise ValueError(f"{folder} was made with other flags: {'; '.join(changed)}{advice}")

    def next_start(self, folder: Path) -> str:
        """The flags, and the merge before them, of a new run that starts from a checkpoint."""
        if self.task.method.saves == "adapter":
            if isinstance(self.config, RowsConfig):
                return f"--adapter {folder}"
            base = self.config.model_name_or_path
            return (
                f"merge_lora.py --ori_model_dir {base} --model_dir {folder} --save_dir MERGED, "
                f"then --model_name_or_path MERGED"
            )
        return f"--model_name_or_path {folder}"

    def set_later_aside(self, folder: Path) -> None:
        """Move later checkpoints, and their predictions, away: a run resumed from `folder` makes
        them again."""
        if rank() == 0:
            if folder.parent.resolve() == self.output_dir.resolve():
                done = step_of(folder)
            else:
                done = read_committed(folder, self.config.verify)["step"]
            checkpoints = committed_checkpoints(self.output_dir)
            later = [path for path in checkpoints if step_of(path) > done]
            if later:
                self.move_aside(later, done)
                self.rewrite_best()
        barrier()

    def move_aside(self, later: list[Path], done: int) -> None:
        """Move checkpoints, and the predictions after step `done`, to a new set-aside folder."""
        predictions = (self.output_dir / PREDICTIONS).glob("step-*.jsonl")
        answers = [path for path in predictions if int(path.stem.split("-")[1]) > done]
        earlier = self.output_dir.glob(f"{SET_ASIDE}-*")
        last = 0
        for path in earlier:
            last = max(last, int(path.name.rsplit("-", 1)[1]))
        aside = self.output_dir / f"{SET_ASIDE}-{last + 1}"
        (aside / PREDICTIONS).mkdir(parents=True)
        for path in later:
            os.replace(path, aside / path.name)
        for path in answers:
            os.replace(path, aside / PREDICTIONS / path.name)
        say(f"{len(later)} checkpoints of later steps are set aside: they lie in {aside}")

    def rewrite_best(self) -> None:
        """Make best.json name the best of the checkpoints that are left."""
        path = self.output_dir / "best.json"
        best = self.best()
        if best is None:
            path.unlink(missing_ok=True)
            return
        write_json(path, best.to_dict(self.config.metric_for_best))

    def check_batch(self, folder: Path, ranks: int, saved: dict[str, Any]) -> None:
        """Raises ValueError where another number of ranks would change how many rows a step has."""
        micro, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
        rows = ranks * saved[micro] * saved[accumulation]
        per_pass = world_size() * self.config.per_device_train_batch_size
        rows_here = per_pass * self.config.gradient_accumulation_steps
        if rows == rows_here:
            return
        if rows % per_pass == 0:
            fit = f"--{accumulation} {rows // per_pass}"
        else:
            fit = f"--{micro} x --{accumulation} = {rows / world_size():g}"
        raise ValueError(
            f"{folder} was made by {ranks} ranks in steps of {rows} rows, this run has "
            f"{world_size()} and steps of {rows_here}: go on with {fit}"
        )

    def record_best(self, folder: Path, metric: str, value: float) -> None:
        """Name the best checkpoint in best.json."""
        if rank() != 0:
            return
        path = self.output_dir / "best.json"
        try:
            write_json(path, BestCheckpoint(folder.name, value).to_dict(metric))
        except OSError as error:  # the manifests have it too
            say(f"WARNING: {path} cannot be written ({error.strerror or error}); going on")

    def best(self) -> "BestCheckpoint | None":
        """The best checkpoint by the evaluation rows of this run.

        Read from the manifests: after a kill best.json may be one save behind. Checkpoints come
        oldest first, and of equal ones the first is the best, as everywhere.
        """
        metric = self.config.metric_for_best
        best: BestCheckpoint | None = None
        for folder in committed_checkpoints(self.output_dir):
            try:
                manifest = read_committed(folder, self.config.verify)
            except ValueError as error:  # an old checkpoint's damage is no reason to end this run
                say(f"WARNING: {error}")
                continue
            if manifest.get("eval_data", self.eval_data) != self.eval_data:
                continue
            value = manifest["metrics"].get(metric)
            if value is not None and is_better_value(metric, value, best.value if best else None):
                best = BestCheckpoint(folder.name, value)
        return best

    def prune(self) -> None:
        """Keep the newest --save_total_limit checkpoints, and the best."""
        if rank() == 0 and self.config.save_total_limit:
            best = self.best()
            for folder in committed_checkpoints(self.output_dir)[: -self.config.save_total_limit]:
                if best is None or folder.name != best.name:
                    # Renamed first: a half-deleted folder must not look like a checkpoint.
                    aside = folder.with_name(f".{folder.name}.tmp")
                    os.replace(folder, aside)
                    shutil.rmtree(aside)
        barrier()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()
