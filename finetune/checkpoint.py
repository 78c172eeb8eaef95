"""Checkpoints that are there or not there: written aside, flushed to disk, renamed.

output_dir/epoch-E-step-S/
    adapter_model.safetensors + adapter_config.json      LoRA
    model.safetensors (the prefix alone) + config.json   P-Tuning
    model*.safetensors + config.json                     freeze, all
    tokenizer files, generation_config.json
    train_config.json, manifest.json
    trainer/                                             DeepSpeed's shards: optimizer, schedule, trainable weights
A folder with a manifest is complete; the newest is found by its step, so there is no pointer file to go stale.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatglm.loading import PREFIX, read_tensors, stop_ids
from finetune.config import TrainConfig
from finetune.distributed import agree, rank, say, without_prints, world_size
from finetune.ds_file import read_ds_file
from finetune.elastic import read_shards, restore, weights_only
from finetune.files import flush, flush_tree, sha256, write_json
from finetune.lora import check_lora_start, on_original_base
from finetune.record import RUN, is_better, versions

FORMAT_VERSION = 1
NAME = re.compile(r"epoch-(\d+)-step-(\d+)$")
MANIFEST = "manifest.json"
PREDICTIONS = "predictions"  # of each evaluation, in the output folder


def checkpoint_step(folder: Path) -> int:
    return int(NAME.search(folder.name).group(2))


def committed_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    folders = Path(output_dir).glob("epoch-*-step-*") if Path(output_dir).is_dir() else ()
    return sorted((p for p in folders if NAME.search(p.name) and (p / MANIFEST).is_file()), key=checkpoint_step)


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest of a checkpoint, or None where there is none.

    Raises:
        ValueError: it is not readable, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a checkpoint manifest") from None
    if found > FORMAT_VERSION:
        raise ValueError(f"{path}: format version {found}, this program reads up to {FORMAT_VERSION}")
    return manifest


def find_resume(resume: str, output_dir: str | Path) -> Path | None:
    """The folder --resume_from_checkpoint means; None for "auto" where there is none yet.

    Raises:
        FileNotFoundError: the named folder is no complete checkpoint with a trainer state.
    """
    if resume == "auto":
        found = committed_checkpoints(output_dir)
        return found[-1] if found else None
    folder = Path(resume)
    if not (folder / MANIFEST).is_file() or not (folder / "trainer").is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint: {folder} is not a complete checkpoint (manifest.json and trainer/)")
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
        for name in ("runs", PREDICTIONS):
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
            model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    elif method.saves == "prefix":
        save_file({k: v.contiguous() for k, v in state.items() if k.startswith(PREFIX)}, folder / "model.safetensors", {"format": "pt"})
        model.config.save_pretrained(str(folder))
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)  # how this run held the base
        config["_name_or_path"] = model.config.name_or_path  # the base, as the official P-Tuning checkpoints name it
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    else:
        if model.config.tie_word_embeddings:
            for tied, source in (model._tied_weights_keys or {}).items():
                if source in state:
                    state.pop(tied, None)
        model.save_pretrained(str(folder), state_dict=state, max_shard_size="2GB")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = stop_ids(tokenizer), tokenizer.pad_token_id
        generation.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def check_disk(folder: Path, needed: int):
    """Raises OSError naming the bytes wanted and free when a save of `needed` bytes would not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: a checkpoint takes about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def checkpoint_bytes(model: nn.Module, saves: str) -> int:
    """About how much one checkpoint takes: exported weights, and fp32 master, two moments and a copy per trainable."""
    sizes = [(p.ds_numel if hasattr(p, "ds_id") else p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    exported = sum(n * size for n, size, trainable in sizes if trainable or saves == "model")
    return exported + sum(n * (12 + size) for n, size, trainable in sizes if trainable) + 10_000_000


class Checkpointer:
    """Saves, finds again and prunes the checkpoints of one run."""

    def __init__(self, config: TrainConfig, output_dir: Path, engine, model, task, *, base: dict):
        self.config, self.output_dir, self.engine, self.model, self.task, self.base = config, output_dir, engine, model, task, base
        self.needed = checkpoint_bytes(model, task.method.saves)
        self.data = agree(task.data_hash)

    def save(self, *, epoch: int, step: int, metrics: dict, patience: dict) -> Path:
        """Write output_dir/epoch-E-step-S on all ranks; when this returns it is committed.

        Metrics, and the state of early stopping, go into its manifest.
        """
        final = self.output_dir / f"epoch-{epoch}-step-{step}"
        if agree((final / MANIFEST).is_file):
            return final
        aside = self.output_dir / f".{final.name}.tmp"
        if rank() == 0:
            check_disk(self.output_dir, self.needed)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        barrier()
        self.task.before_save(self.engine.module, evaluated=bool(metrics))
        self.engine.save_checkpoint(str(aside / "trainer"), tag="state", save_latest=False, exclude_frozen_parameters=True)
        state = gathered_state(self.model, trainable_only=self.task.method.saves != "model")
        if rank() == 0:
            self.task.export(self.model, state, aside)
            self.config.save(aside / "train_config.json")
            files = sorted(p for p in aside.iterdir() if p.is_file())
            manifest = {
                "format_version": FORMAT_VERSION,
                "task": self.config.task,
                "family": self.task.family and self.task.family.name,
                "method": self.config.train_type,
                "base_model": self.base,
                "train_data": self.data,
                "epoch": epoch,
                "step": step,
                "world_size": world_size(),
                "zero_stage": self.engine.zero_optimization_stage(),
                "metrics": metrics,
                "early_stopping": patience,
                "versions": versions(),
                "sha256": {p.name: sha256(p) for p in files},
            }
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            flush_tree(aside)
            if final.exists():  # no checkpoint, so somebody made something of it: a merged model
                raise FileExistsError(f"{final} is in the way of a checkpoint and is none itself; move it away")
            os.replace(aside, final)
            flush(self.output_dir)  # so that the rename survives a power cut
            self.warn_if_untrained(state)
        barrier()
        return final

    def warn_if_untrained(self, state: dict[str, Tensor]):
        lora_b = [t for name, t in state.items() if "lora_B" in name]
        if lora_b and not any(t.any() for t in lora_b):
            say("WARNING: every LoRA B is still zero, so this adapter changes nothing: is the learning rate 0, or every answer empty?")

    def resume(self, folder: Path) -> dict:
        """Load a checkpoint into the engine; returns its manifest.

        Raises:
            ValueError: it was made by other flags, rows or base model, or in steps of other sizes, or its shards are damaged.
        """
        manifest = read_manifest(folder)
        saved = json.loads((folder / "train_config.json").read_text(encoding="utf-8"))
        elastic = manifest["world_size"] != world_size()
        if changed := self.config.changed_since(saved, but=("per_device_train_batch_size", "gradient_accumulation_steps") if elastic else ()):
            raise ValueError(f"{folder} was made with other flags: {'; '.join(changed)}")
        if elastic:
            self.check_batch(folder, manifest["world_size"], saved)
        stage = self.engine.zero_optimization_stage()
        asked = read_ds_file(self.config.ds_file)[1].get("zero_optimization", {}).get("stage", 0)
        # before manifests knew it: as the file said
        if not elastic and (before := manifest.get("zero_stage", asked)) != stage:
            raise ValueError(f"{folder} holds a ZeRO-{before} state, this run is on ZeRO-{stage}; its weights can still be a new run's start")
        fingerprint = manifest["base_model"].get("fingerprint")
        if fingerprint and fingerprint != self.base.get("fingerprint"):
            raise ValueError(f"{folder} was trained on another base model than {self.base['name_or_path']}")
        if manifest.get("train_data") not in (None, self.data):
            raise ValueError(f"--train_path: {self.config.train_path} has changed since {folder} was made")
        for module in self.model.modules():  # a predictor's backbone is a part of its model
            if "lora_start" in vars(module):
                check_lora_start(module, dict(read_tensors(folder / "adapter_model.safetensors")))
        try:
            if elastic:
                with weights_only():
                    restore(self.engine, read_shards(folder / "trainer" / "state"))
                say(f"resumed from {folder}, made by {manifest['world_size']} rank(s), on {world_size()}")
                return manifest
            with weights_only(), without_prints():
                path, _ = self.engine.load_checkpoint(str(folder / "trainer"), tag="state", load_module_strict=False)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            found = next((line for line in str(error).splitlines() if "WeightsUnpickler" in line), str(error).split("\n")[0])
            raise ValueError(f"{folder}/trainer: a shard is torn, or holds more than tensors ({found[:200]})") from None
        if path is None:
            raise ValueError(f"{folder}/trainer: DeepSpeed could not load its shards")
        say(f"resumed from {folder}")
        return manifest

    def check_batch(self, folder: Path, ranks: int, saved: dict):
        """Raises ValueError where another number of ranks would change how many rows a step has."""
        here, flags = self.config, ("per_device_train_batch_size", "gradient_accumulation_steps")
        rows = ranks * saved[flags[0]] * saved[flags[1]]
        per_pass = world_size() * here.per_device_train_batch_size
        if rows == per_pass * here.gradient_accumulation_steps:
            return
        fit = f"--gradient_accumulation_steps {rows // per_pass}" if rows % per_pass == 0 else f"--{flags[0]} x --{flags[1]} = {rows / world_size():g}"
        raise ValueError(
            f"{folder} was made by {ranks} ranks in steps of {rows} rows, this run has {world_size()} and steps of "
            f"{per_pass * here.gradient_accumulation_steps}: go on with {fit}"
        )

    def record_best(self, folder: Path, metric: str, value: float):
        if rank() == 0:
            write_json(self.output_dir / "best.json", {"checkpoint": folder.name, "metric": metric, "value": value})

    def best(self) -> dict | None:
        """The best checkpoint there is, from the manifests: best.json tells people, and may be one save behind after a kill."""
        metric = self.config.metric_for_best
        found = None
        for folder in committed_checkpoints(self.output_dir):  # the oldest first: of equals the first is the best, as everywhere
            value = read_manifest(folder)["metrics"].get(metric)
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
