"""Checkpoints that are there or not there: written aside, flushed to disk, renamed.

output_dir/epoch-E-step-S/
    adapter_model.safetensors + adapter_config.json      LoRA
    model.safetensors (the prefix alone) + config.json   P-Tuning
    model*.safetensors + config.json                     freeze, all
    tokenizer files, generation_config.json
    train_config.json, manifest.json
    trainer/                                             DeepSpeed's shards: optimizer, schedule, trainable weights
    checksums.json                                       of all these files (chatglm/checksums.py)
A folder with a manifest is complete; the newest is found by its step, so there is no pointer file to go stale.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from chatglm.checksums import CHECKSUMS, check_folder_files, write_checksums
from chatglm.files import read_json
from chatglm.loading import PREFIX, read_tensors, stop_ids
from chatglm.runs import MANIFEST, check_not_run, committed_checkpoints, step_of
from finetune.config import TrainConfig
from finetune.contents import path_contents
from finetune.distributed import agree, rank, say, without_prints, world_size
from finetune.ds_file import read_ds_file
from finetune.elastic import read_shards, restore, weights_only
from finetune.files import flush, flush_tree, set_modes, sha256, write_json
from finetune.lora import check_lora_start, on_original_base
from finetune.record import RUN, is_better, versions

FORMAT_VERSION = 1
PREDICTIONS = "predictions"  # of each evaluation, in the output folder
SET_ASIDE = "set-aside"  # folders of checkpoints that a resumed run makes again


class NoRoom(OSError):
    """A checkpoint would not fit on the disk; every rank gets it."""


def read_manifest(folder: str | Path, verify: str | None = None) -> dict | None:
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
        found = manifest["format_version"] + 0
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a checkpoint manifest") from None
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {found}, this program reads up to {FORMAT_VERSION}"
        )
    return manifest


def check_checkpoint(folder: Path, verify: str | None = None):
    """Compare every file of a checkpoint with its checksums, by default with SHA-256.

    Raises:
        ValueError: one has changed; the message names it and the newest other checkpoint.
    """
    try:
        check_folder_files(folder, verify, default="full")
        if not (folder / CHECKSUMS).is_file() and verify != "off":
            check_old_sums(folder)
    except ValueError as error:
        others = [
            other
            for other in committed_checkpoints(folder.parent)
            if other.resolve() != folder.resolve()
        ]
        hint = f" The newest other checkpoint is {others[-1]}." if others else ""
        raise ValueError(f"{error}.{hint}" if hint else str(error)) from None


def check_old_sums(folder: Path):
    """Checkpoints of earlier versions have the sums of their exported files in the manifest alone."""
    for name, expected in ((read_manifest(folder) or {}).get("sha256") or {}).items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(
                f"{folder / name}: changed since it was written (its SHA-256 is not the manifest's); --verify off takes it as it is"
            )


def find_resume(resume: str, output_dir: str | Path) -> Path | None:
    """The folder --resume_from_checkpoint means; None for "auto" where there is none yet.

    Raises:
        FileNotFoundError: the named folder is no complete checkpoint with a trainer state.
    """
    if resume == "auto":
        found = committed_checkpoints(output_dir)
        return found[-1] if found else None
    folder = Path(resume)
    check_not_run(folder, "--resume_from_checkpoint")
    if not (folder / MANIFEST).is_file() or not (folder / "trainer").is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint: {folder} is not a complete checkpoint (manifest.json and trainer/)"
        )
    return folder


def remove_leftovers(output_dir: Path, replace: bool):
    """Delete what an interrupted save left behind and, with `replace`, the checkpoints of an earlier run."""
    replaced = list(output_dir.glob("epoch-*-step-*")) if replace else []
    for folder in replaced:
        os.replace(folder, folder.with_name(f".{folder.name}.tmp"))
    for path in output_dir.glob(".epoch-*"):
        shutil.rmtree(path, ignore_errors=True)
    if replaced:
        for name in ("best.json", RUN):
            (output_dir / name).unlink(missing_ok=True)
        for name in ("runs", PREDICTIONS, *(p.name for p in output_dir.glob(f"{SET_ASIDE}-*"))):
            shutil.rmtree(output_dir / name, ignore_errors=True)


def gathered_state(model: nn.Module, *, trainable_only: bool) -> dict[str, Tensor]:
    """name -> CPU tensor, whole also under ZeRO-3, on rank 0 (empty elsewhere). Every rank must call it.

    Raises:
        RuntimeError: a tensor came out empty.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        if trainable_only and parameter.dtype == torch.float16:
            # DeepSpeed's fp16 mode halves adapters too; what is kept of them is the fp32 master.
            from deepspeed.utils import safe_get_full_fp32_param

            master = safe_get_full_fp32_param(parameter)
            if rank() == 0:
                state[name] = master.detach().cpu()
        elif hasattr(parameter, "ds_id"):
            from deepspeed import zero

            with zero.GatheredParameters([parameter]):
                if rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
        elif rank() == 0:
            state[name] = parameter.detach().cpu()
        if rank() == 0 and not state[name].numel():
            raise RuntimeError(f"{name} is empty: it was not gathered")
    return state


def export(model, method, tokenizer, state: dict[str, Tensor], folder: Path):
    """Write what inference needs of `model`: adapter, prefix or all weights by `method.saves`; tokenizer, config.

    `state`: gathered trainable parameters, or all of them where method.saves is "model".
    """
    from safetensors.torch import save_file

    if method.saves == "adapter":
        with on_original_base(model, state) as state:
            model.save_pretrained(
                str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False
            )
    elif method.saves == "prefix":
        save_file(
            {k: v.contiguous() for k, v in state.items() if k.startswith(PREFIX)},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        model.config.save_pretrained(str(folder))
        config = read_json(folder / "config.json")
        config.pop("quantization_config", None)  # how this run held the base
        config["_name_or_path"] = (
            model.config.name_or_path
        )  # the base, as the official P-Tuning checkpoints name it
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    else:
        if model.config.tie_word_embeddings:
            for tied, source in (model._tied_weights_keys or {}).items():
                if source in state:
                    state.pop(tied, None)
        model.save_pretrained(str(folder), state_dict=state, max_shard_size="2GB")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = (
            stop_ids(tokenizer),
            tokenizer.pad_token_id,
        )
        generation.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def check_disk(folder: Path, needed: int, what: str = "a checkpoint"):
    """Raises NoRoom naming the bytes wanted and free when `needed` bytes would not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(
            f"{folder}: {what} takes about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


def checkpoint_bytes(model: nn.Module, saves: str) -> int:
    """About how much one checkpoint takes: exported weights, and fp32 master, two moments and a copy per trainable."""
    sizes = [
        (p.ds_numel if hasattr(p, "ds_id") else p.numel(), p.element_size(), p.requires_grad)
        for p in model.parameters()
    ]
    exported = sum(n * size for n, size, trainable in sizes if trainable or saves == "model")
    return exported + sum(n * (12 + size) for n, size, trainable in sizes if trainable) + 10_000_000


@contextmanager
def one_kind_of_error(folder: Path) -> Iterator[None]:
    """A disk's errors as OSError: torch and safetensors have others of their own for them."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if (
            isinstance(error, SafetensorError)
            or "PytorchStreamWriter" in text
            or "iostream" in text
        ):
            raise OSError(f"{folder}: cannot be written ({text[:200]})") from error
        raise


class Checkpointer:
    """Saves, finds again and prunes the checkpoints of one run."""

    def __init__(self, config: TrainConfig, output_dir: Path, engine, model, task, *, base: dict):
        self.config, self.output_dir, self.engine, self.model, self.task, self.base = (
            config,
            output_dir,
            engine,
            model,
            task,
            base,
        )
        self.needed = checkpoint_bytes(model, task.method.saves)
        self.data = agree(task.data_hash)
        self.eval_data = agree(self.identify_evaluation)
        self.contents = agree(
            lambda: path_contents(
                config,
                fingerprint=base.get("fingerprint"),
                data=self.data,
                model_path=task.model_path,
            )
        )

    def identify_evaluation(self) -> str | None:
        """What makes two values of --metric_for_best comparable: the rows, and for written answers their longest."""
        config = self.config
        if not config.eval_path:
            return None
        return (
            self.task.eval_hash
            if config.metric_for_best == "loss"
            else f"{self.task.eval_hash} {config.eval_max_new_tokens}"
        )

    def save(self, *, epoch: int, step: int, metrics: dict, patience: dict) -> Path:
        """Write output_dir/epoch-E-step-S on all ranks; when this returns it is committed.

        Metrics, and the state of early stopping, go into its manifest.

        Raises:
            NoRoom: on every rank, before anything is written. OSError: on the rank that could not write.
        """
        final = self.output_dir / f"epoch-{epoch}-step-{step}"
        if agree((final / MANIFEST).is_file):
            return final
        aside = self.output_dir / f".{final.name}.tmp"
        agree(lambda: self.make_room(aside))
        try:
            with one_kind_of_error(final):
                self.write(aside, final, epoch=epoch, step=step, metrics=metrics, patience=patience)
        except OSError:
            if rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        barrier()
        return final

    def make_room(self, aside: Path):
        shutil.rmtree(aside, ignore_errors=True)
        check_disk(self.output_dir, self.needed)
        aside.mkdir()

    def write(
        self, aside: Path, final: Path, *, epoch: int, step: int, metrics: dict, patience: dict
    ):
        """Every rank's part of `save`."""
        self.task.before_save(self.engine.module, evaluated=bool(metrics))
        self.engine.save_checkpoint(
            str(aside / "trainer"), tag="state", save_latest=False, exclude_frozen_parameters=True
        )
        state = gathered_state(self.model, trainable_only=self.task.method.saves != "model")
        barrier()  # every rank's shards are there
        if rank() != 0:
            return
        self.task.export(self.model, state, aside)
        self.config.save(aside / "train_config.json")
        manifest = {
            "format_version": FORMAT_VERSION,
            "task": self.config.task,
            "family": self.task.family and self.task.family.name,
            "method": self.config.train_type,
            "base_model": self.base,
            "train_data": self.data,
            "eval_data": self.eval_data,
            "contents": self.contents,
            "epoch": epoch,
            "step": step,
            "world_size": world_size(),
            "zero_stage": self.engine.zero_optimization_stage(),
            "metrics": metrics,
            "early_stopping": patience,
            "versions": versions(),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        set_modes(aside)
        write_checksums(aside)
        flush_tree(aside)
        if final.exists():  # no checkpoint, so somebody made something of it: a merged model
            raise FileExistsError(
                f"{final} is in the way of a checkpoint and is none itself; move it away"
            )
        os.replace(aside, final)
        flush(self.output_dir)  # so that the rename survives a power cut
        self.warn_if_untrained(state)

    def warn_if_untrained(self, state: dict[str, Tensor]):
        lora_b = [t for name, t in state.items() if "lora_B" in name]
        if lora_b and not any(t.any() for t in lora_b):
            say(
                "WARNING: every LoRA B is still zero, so this adapter changes nothing: is the learning rate 0, or every answer empty?"
            )

    def resume(self, folder: Path) -> dict:
        """Load a checkpoint into the engine; returns its manifest.

        Raises:
            ValueError: it was made by other flags, rows or base model, or in steps of other sizes, or its shards are damaged.
        """
        manifest = read_manifest(folder, self.config.verify)
        saved = read_json(folder / "train_config.json")
        elastic = manifest["world_size"] != world_size()
        self.check_flags(folder, saved, manifest.get("contents", {}), elastic)
        if elastic:
            self.check_batch(folder, manifest["world_size"], saved)
        stage = self.engine.zero_optimization_stage()
        asked = read_ds_file(self.config.ds_file)[1].get("zero_optimization", {}).get("stage", 0)
        # before manifests knew it: as the file said
        if not elastic and (before := manifest.get("zero_stage", asked)) != stage:
            raise ValueError(
                f"{folder} holds a ZeRO-{before} state, this run is on ZeRO-{stage}; its weights can still be a new run's start"
            )
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
                raise ValueError(
                    f"--{name}: {getattr(self.config, name, '')} has changed since {folder} was made"
                )
        for module in self.model.modules():  # a predictor's backbone is a part of its model
            if "lora_start" in vars(module):
                check_lora_start(module, dict(read_tensors(folder / "adapter_model.safetensors")))
        try:
            if elastic:
                with weights_only():
                    restore(self.engine, read_shards(folder / "trainer" / "state"))
                say(
                    f"resumed from {folder}, made by {manifest['world_size']} rank(s), on {world_size()}"
                )
                return manifest
            with weights_only(), without_prints():
                path, _ = self.engine.load_checkpoint(
                    str(folder / "trainer"), tag="state", load_module_strict=False
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            found = next(
                (line for line in str(error).splitlines() if "WeightsUnpickler" in line),
                str(error).split("\n")[0],
            )
            raise ValueError(
                f"{folder}/trainer: a shard is torn, or holds more than tensors ({found[:200]})"
            ) from None
        if path is None:
            raise ValueError(f"{folder}/trainer: DeepSpeed could not load its shards")
        say(f"resumed from {folder}")
        return manifest

    def check_flags(self, folder: Path, saved: dict, contents: dict[str, str], elastic: bool):
        """Raises ValueError where flags that shape training differ; paths to the same content are the same."""
        same = [name for name, content in contents.items() if self.contents.get(name) == content]
        sizes = ["per_device_train_batch_size", "gradient_accumulation_steps"] if elastic else []
        if not (changed := self.config.changed_since(saved, but=(*same, *sizes))):
            return
        way = ""
        if all(text.startswith(("--max_steps:", "--num_train_epochs:")) for text in changed):
            way = (
                ". The learning rates of all its steps follow from how many there are, so it cannot be made longer; "
                f"train on from its result instead, in another --output_dir: {self.next_start(folder)}"
            )
        raise ValueError(f"{folder} was made with other flags: {'; '.join(changed)}{way}")

    def next_start(self, folder: Path) -> str:
        if self.task.method.saves == "adapter":
            base = self.config.model_name_or_path
            return f"merge_lora.py --ori_model_dir {base} --model_dir {folder} --save_dir MERGED, then --model_name_or_path MERGED"
        return f"--model_name_or_path {folder}"

    def set_later_aside(self, folder: Path):
        """Move what a run resumed from `folder` makes again out of its way: later checkpoints, and their predictions."""
        if rank() == 0:
            done = (
                step_of(folder)
                if folder.parent.resolve() == self.output_dir.resolve()
                else read_manifest(folder, self.config.verify)["step"]
            )
            later = [
                path for path in committed_checkpoints(self.output_dir) if step_of(path) > done
            ]
            answers = [
                path
                for path in (self.output_dir / PREDICTIONS).glob("step-*.jsonl")
                if int(path.stem.split("-")[1]) > done
            ]
            if later:
                numbers = [
                    int(path.name.rsplit("-", 1)[1])
                    for path in self.output_dir.glob(f"{SET_ASIDE}-*")
                ]
                aside = self.output_dir / f"{SET_ASIDE}-{max(numbers, default=0) + 1}"
                (aside / PREDICTIONS).mkdir(parents=True)
                for path in later:
                    os.replace(path, aside / path.name)
                for path in answers:
                    os.replace(path, aside / PREDICTIONS / path.name)
                say(f"{len(later)} checkpoints of later steps are set aside: they lie in {aside}")
                if best := self.best():
                    best = {
                        "checkpoint": best["checkpoint"],
                        "metric": self.config.metric_for_best,
                        "value": best["value"],
                    }
                    write_json(self.output_dir / "best.json", best)
                else:
                    (self.output_dir / "best.json").unlink(missing_ok=True)
        barrier()

    def check_batch(self, folder: Path, ranks: int, saved: dict):
        """Raises ValueError where another number of ranks would change how many rows a step has."""
        here, flags = self.config, ("per_device_train_batch_size", "gradient_accumulation_steps")
        rows = ranks * saved[flags[0]] * saved[flags[1]]
        per_pass = world_size() * here.per_device_train_batch_size
        if rows == per_pass * here.gradient_accumulation_steps:
            return
        fit = (
            f"--gradient_accumulation_steps {rows // per_pass}"
            if rows % per_pass == 0
            else f"--{flags[0]} x --{flags[1]} = {rows / world_size():g}"
        )
        raise ValueError(
            f"{folder} was made by {ranks} ranks in steps of {rows} rows, this run has {world_size()} and steps of "
            f"{per_pass * here.gradient_accumulation_steps}: go on with {fit}"
        )

    def record_best(self, folder: Path, metric: str, value: float):
        if rank() == 0:
            try:
                write_json(
                    self.output_dir / "best.json",
                    {"checkpoint": folder.name, "metric": metric, "value": value},
                )
            except OSError as error:  # the manifests know it too
                say(
                    f"WARNING: {self.output_dir / 'best.json'} cannot be written ({error.strerror or error}); going on"
                )

    def best(self) -> dict | None:
        """The best checkpoint by the evaluation rows of this run, from the manifests: best.json may be one save behind after a kill."""
        metric = self.config.metric_for_best
        found = None
        for folder in committed_checkpoints(
            self.output_dir
        ):  # the oldest first: of equals the first is the best, as everywhere
            try:
                manifest = read_manifest(folder, self.config.verify)
            except ValueError as error:  # an old checkpoint's damage is no reason to end this run
                say(f"WARNING: {error}")
                continue
            if manifest.get("eval_data", self.eval_data) != self.eval_data:
                continue
            value = manifest["metrics"].get(metric)
            if value is not None and is_better(metric, value, found and found["value"]):
                found = {"checkpoint": folder.name, "value": value}
        return found

    def prune(self):
        """Keep the newest --save_total_limit checkpoints, and the best."""
        if rank() == 0 and self.config.save_total_limit:
            best = (self.best() or {}).get("checkpoint")
            for folder in committed_checkpoints(self.output_dir)[: -self.config.save_total_limit]:
                if folder.name != best:
                    # Renamed first: a half-deleted folder must not look like a checkpoint.
                    aside = folder.with_name(f".{folder.name}.tmp")
                    os.replace(folder, aside)
                    shutil.rmtree(aside)
        barrier()


def barrier():
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()
