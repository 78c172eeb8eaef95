"""What the loop trains: rows and how they are laid out, a model and its loss, metrics, and what is saved of it."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from chatglm.families import FAMILIES
from chatglm.loading import load_model, load_tokenizer, resolve_mode
from finetune.checkpoint import export
from finetune.config import TrainConfig
from finetune.data import Dataset, Row, collate, count_labels, encode_rows, read_rows
from finetune.distributed import rank, say
from finetune.evaluate import evaluation_loss, generation_f1
from finetune.files import sha256
from finetune.loss import LossModule
from finetune.methods import make_method


class FineTuning:
    """A ChatGLM learns to answer. predictor/training.py has the other task: how long the answer will be.

    Attributes:
        data: the training rows: a Dataset, or what has `input_ids`, `places` and a length like one.
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

    def load_rows(self):
        """Raises ValueError, FileNotFoundError for rows that do not fit."""
        self.data, _ = self.load_dataset(self.config.train_path, "train")
        if self.config.eval_path:
            self.eval_data, self.eval_rows = self.load_dataset(self.config.eval_path, "eval")

    def data_hash(self) -> str:
        """Of the training rows: a resumed run must have the same."""
        return sha256(Path(self.config.train_path))

    def load_dataset(self, path: str, name: str) -> tuple[Dataset, list[Row]]:
        config = self.config
        rows, bad = read_rows(
            path, prompt_text=config.prompt_text, on_bad_row=config.on_bad_row,
            limit=config.dataset_length if name == "train" else None,
        )  # fmt: skip
        if name == "eval":  # a test file may list several answers; the loss is of the first
            rows = [row.with_first_answer() for row in rows]
        cache = Path(config.data_cache).expanduser() if config.data_cache else None
        data = encode_rows(
            rows, self.tokenizer, self.family, max_len=config.max_len, max_src_len=config.max_src_len,
            is_skip=config.is_skip and name == "train", progress=rank() == 0, cache=cache,
        )  # fmt: skip
        words = [f"{len(data)} {name} rows"]
        words += [f"{bad} bad ones skipped"] if bad else []
        words += [f"{data.skipped} too long, skipped"] if data.skipped else [f"{data.truncated} cut"] if data.truncated else []
        say(", ".join(words))
        return data, rows

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        """The model, prepared by its method: what trains requires a gradient."""
        self.dtype = dtype
        return self.method.prepare(load_model(self.model_path, mode=self.family.name, dtype=dtype, **self.method.model_options()))

    def loss_module(self, model: nn.Module) -> nn.Module:
        return LossModule(model, smoothing=self.config.label_smoothing, noise_alpha=self.config.neftune_noise_alpha)

    @cached_property
    def layout(self) -> dict:
        return layout_of(self.config, self.family, self.tokenizer, self.dtype)

    def collate(self, rows: list[int]) -> dict:
        return collate(self.data, rows, **self.layout)

    @property
    def has_evaluation(self) -> bool:
        return bool(self.config.eval_path)

    def evaluate(self, loss_module: nn.Module, model: nn.Module, *, synced: bool) -> dict[str, float]:
        """Loss (and F1) on the evaluation rows. `synced`: ZeRO-3, ranks must step together."""
        config = self.config
        batch = config.per_device_eval_batch_size or config.per_device_train_batch_size
        metrics = {"loss": evaluation_loss(loss_module, self.eval_data, batch, **self.layout)}
        if config.eval_f1:
            metrics["f1"] = generation_f1(
                model, self.tokenizer, self.eval_rows, batch_size=batch, max_src_len=config.max_src_len,
                max_new_tokens=config.eval_max_new_tokens, synced=synced,
            )  # fmt: skip
        return metrics

    def before_save(self, loss_module: nn.Module, *, evaluated: bool):
        """What of a save every rank must take part in; rank 0 alone exports. `evaluated`: `evaluate` has just seen these weights."""

    def export(self, model: nn.Module, state: dict[str, Tensor], folder: Path):
        """Write what inference needs; `state` as checkpoint.export takes it."""
        export(model, self.method, self.tokenizer, state, folder)


def layout_of(config: TrainConfig, family, tokenizer, dtype: torch.dtype) -> dict:
    """collate's options: how the rows of a pass are laid out."""
    share = family.name != "glm" and shares_prefix(config)
    return {"ragged": config.batching == "ragged", "share": share, "multiple": row_multiple(dtype), "pad_id": tokenizer.pad_token_id}


def shares_prefix(config: TrainConfig) -> bool:
    """A beginning that rows share is computed once where neither dropout nor NEFTune acts, which would tie the rows' noise."""
    drops = {"lora": config.lora_dropout, "ptuning": config.prefix_dropout if config.resolved_ptuning_version == "v2" else 0}
    return config.share_prefix and not drops.get(config.train_type) and not config.neftune_noise_alpha


def row_multiple(dtype: torch.dtype) -> int:
    """What the length of a ragged row should be a multiple of.

    For half precision, oneDNN compiles its products anew for every shape, which takes longer than most products do.
    """
    return 64 if dtype != torch.float32 and not torch.cuda.is_available() else 1
