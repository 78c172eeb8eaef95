"""train.py --task predictor: the loop of fine-tuning over prompts and answer lengths."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chatglm.families import Family, family_of
from chatglm.family_tokenizer import FamilyTokenizer
from chatglm.loading import load_tokenizer, resolve_mode
from finetune.checkpoint import export_model, inner_state
from finetune.distributed import on_device, rank, say, world_size
from finetune.epochs import EpochRows, StepBatches
from finetune.files import sha256
from finetune.methods import make_method
from finetune.out_of_memory import explained, training_advice
from finetune.row_task import row_multiple, shares_prefix
from predictor.backbones import ChatGLMBackbone, EncoderBackbone
from predictor.config import PredictorConfig
from predictor.decoder import Decoder, write_card
from predictor.heads import make_head
from predictor.lengths import LengthArrays, load_lengths, served_card
from predictor.network import LengthLoss, LengthNetwork, save_head
from predictor.scores import metrics_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_TOKENS = 315  # a part of evaluation_id, as in the manifests of earlier versions


@dataclass(frozen=True)
class EncodedPrompts:
    """The rows that the loop trains on: `lengths` are the labels, input_ids[i] prompt i's ids."""

    lengths: LengthArrays
    input_ids: list[list[int]]

    def place(self, row: int) -> str:
        """ "file:line" of a prompt, for messages."""
        return self.lengths.places[row]

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """(prompts,) tokens of each."""
        return np.array([len(ids) for ids in self.input_ids])

    def __len__(self) -> int:
        return len(self.input_ids)


class LengthTraining:
    """Trains an encoder, or the served ChatGLM itself, to predict the lengths of answers.

    A finetune.task.Task.
    """

    def __init__(self, config: PredictorConfig):
        self.config = config
        self.dtype = torch.float32
        self.family: Family | None = None
        self.served_tokenizer: FamilyTokenizer | None = None
        if config.model_name_or_path:
            mode = resolve_mode(config.model_name_or_path, config.mode)
            self.served_tokenizer = load_tokenizer(
                config.model_name_or_path, mode=mode, prompt_style=config.prompt_style
            )
            self.family = family_of(self.served_tokenizer)
        self.method = make_method(config)
        self.backbone: ChatGLMBackbone | EncoderBackbone
        self.tokenizer: PreTrainedTokenizerBase
        if config.backbone == "chatglm" and self.family and self.served_tokenizer:
            self.model_path = config.model_name_or_path
            self.backbone = ChatGLMBackbone(
                self.family.name, config.max_src_len, shares_prefix(config)
            )
            self.tokenizer = self.served_tokenizer
            name = self.family.title
        else:
            self.model_path = config.encoder_path
            encoder = EncoderBackbone(config.encoder_path, config.max_src_len, config.layers)
            self.backbone = encoder
            self.tokenizer = encoder.load_tokenizer()
            name = Path(config.encoder_path).name
        self.title = f"length predictor on {name}"
        self.default_output_dir = f"output-predictor-{config.backbone}-{config.head}"
        self.calibrated: tuple[Decoder, dict[str, float]] | None = None
        self.eval_data: EncodedPrompts | None = None
        self.eval_hash: str | None = None

    def load_rows(self) -> None:
        """Read, split and encode the rows, and make the head."""
        self.rows = load_lengths(self.config, self.served_tokenizer)
        say(self.rows.summary())
        if self.rows.calibration is None:
            raise ValueError("a backbone that is trained in steps needs calibration rows")
        self.head = make_head(self.rows.config)
        data = self.encode(self.rows.train)
        self.epochs = EpochRows(data, self.config.seed, self.config.batching == "grouped")
        self.calibration = self.encode(self.rows.calibration)
        if self.rows.test:
            self.eval_data = self.encode(self.rows.test)
        if self.config.eval_path:
            self.eval_hash = sha256(Path(self.config.eval_path))

    def rows_per_epoch(self, steps: int | None, step_rows: int) -> int:
        """As in Task."""
        return self.epochs.count()

    def rows_of_step(
        self, epoch: int, place: int, steps_per_epoch: int, step_rows: int
    ) -> tuple[EncodedPrompts, np.ndarray, int]:
        """As in Task."""
        return self.epochs.of_step(epoch, place, step_rows)

    def dropped_rows(self) -> int:
        return 0  # bad rows are skipped when they are loaded

    def evaluation_id(self) -> str | None:
        """The hash of the evaluation rows; longer where the best metric is not the loss."""
        if self.eval_hash is None or self.config.metric_for_best == "loss":
            return self.eval_hash
        return f"{self.eval_hash} {ANSWER_TOKENS}"

    def data_hash(self) -> str:
        """Of all rows: a resumed run must have the same."""
        return self.rows.hash

    def encode(self, lengths: LengthArrays) -> EncodedPrompts:
        """The prompts as the backbone's ids."""
        ids = [self.backbone.encode(self.tokenizer, prompt) for prompt in lengths.prompts]
        return EncodedPrompts(lengths, ids)

    def build_model(self, dtype: torch.dtype) -> nn.Module:
        self.dtype = dtype
        options = self.method.model_options()
        model = self.backbone.load_model(dtype, options, self.model_path)
        model = self.method.make_trainable(model)
        if self.config.backbone == "chatglm" and not model.config.tie_word_embeddings:
            model.get_output_embeddings().requires_grad_(False)  # no gradient reaches it
        bias = torch.tensor(self.head.starting_bias(self.rows.train.tokens), dtype=torch.float32)
        return LengthNetwork(
            self.backbone,
            model,
            self.backbone.width(model),
            self.head.width,
            len(self.rows.served_models),
            bias,
        )

    def loss_module(self, model: Any) -> nn.Module:
        """LengthLoss of the network that build_model returned."""
        return LengthLoss(model, self.head)

    def count_labels(self, batch: dict[str, Any]) -> float:
        return float(batch["weights"].sum())

    def collate(self, data: EncodedPrompts, rows: list[int]) -> dict[str, Any]:
        """The arguments of LengthLoss: a batch of prompts and, end to end, all their labels.

        A row of -1 is padding: the shortest prompt with weight 0.
        """
        labels = data.lengths
        numbers = np.array(rows)
        is_row = numbers >= 0
        prompts = np.where(is_row, numbers, data.row_lengths.argmin())
        # The labels of prompt i are those from starts[i] to starts[i + 1].
        counts = np.diff(labels.starts)[prompts]
        chosen = []
        for i in prompts:
            chosen.append(np.arange(labels.starts[i], labels.starts[i + 1]))
        label = np.concatenate(chosen)
        weights = labels.weights[label] * np.repeat(is_row, counts)
        ids = [data.input_ids[i] for i in prompts]
        batch = self.backbone.collate(ids, self.tokenizer, multiple=row_multiple(self.dtype))
        batch["tokens"] = torch.from_numpy(labels.tokens[label])
        batch["finished"] = torch.from_numpy(labels.finished[label])
        batch["weights"] = torch.from_numpy(weights.astype(np.float32))
        batch["served"] = torch.from_numpy(labels.served[label])
        batch["prompt"] = torch.from_numpy(np.repeat(np.arange(len(prompts)), counts))
        return batch

    @torch.no_grad()
    def outputs(self, network: LengthNetwork, data: EncodedPrompts) -> np.ndarray:
        """(prompts, width) head outputs for the served model, computed by all ranks together."""
        config = self.config
        size = config.per_device_eval_batch_size or config.per_device_train_batch_size
        outputs = torch.zeros(len(data), self.head.width, dtype=torch.float64)
        order = data.row_lengths.argsort(kind="stable").tolist()
        per_pass = size * world_size()
        device = network.head.weight.device
        for start in range(0, len(order), per_pass):
            rank_rows = order[start : start + per_pass][rank() :: world_size()]
            rows = rank_rows or order[:1]  # ZeRO-3: every rank runs every pass
            ids = [data.input_ids[i] for i in rows]
            batch = self.backbone.collate(ids, self.tokenizer, multiple=row_multiple(self.dtype))
            prompt = torch.arange(len(rows), device=device)
            served = torch.full_like(prompt, self.rows.target_model)
            values = network(on_device(batch, device), prompt, served).double().cpu()
            if rank_rows:
                outputs[rank_rows] = values
        if world_size() > 1:
            total = outputs.to(device)
            torch.distributed.all_reduce(total)
            outputs = total.cpu()
        return outputs.numpy()

    def evaluate(
        self, loss_module: nn.Module, model: nn.Module, *, synced: bool, predictions: Path
    ) -> dict[str, float]:
        """Metrics for the served model on the evaluation rows, else on the calibration rows.

        Loss, tau, MAE and coverage; `predictions` is not written.
        """
        network = network_of(loss_module)
        decoder, calibration_metrics = self.calibrate(network)
        self.calibrated = decoder, calibration_metrics
        if not self.eval_data:
            return calibration_metrics
        outputs = self.outputs(network, self.eval_data)
        return self.measure(decoder, outputs, self.eval_data.lengths)

    def calibrate(self, network: LengthNetwork) -> tuple[Decoder, dict[str, float]]:
        """The decoder for the network as it is, and its metrics on the calibration rows."""
        lengths = self.calibration.lengths
        outputs = self.outputs(network, self.calibration)
        prompt, tokens, finished, weights = lengths.of_model(self.rows.target_model)
        decoder = Decoder.fit(self.head, outputs[prompt], tokens, finished, weights, prompt)
        return decoder, self.measure(decoder, outputs, lengths)

    def measure(
        self, decoder: Decoder, outputs: np.ndarray, lengths: LengthArrays
    ) -> dict[str, float]:
        """Loss and metrics of outputs (prompts, width) for the served model's labels."""
        prompt, tokens, finished, weights = lengths.of_model(self.rows.target_model)
        total = self.head.loss(
            torch.from_numpy(outputs[prompt]),
            torch.from_numpy(tokens),
            torch.from_numpy(finished),
            torch.from_numpy(weights),
            torch.zeros(len(tokens), dtype=torch.long),
        )
        loss = float(total) / weights.sum()
        probabilities, ranks = decoder.decode(outputs[prompt])
        return {"loss": loss} | metrics_of(probabilities, decoder.edges, ranks, tokens, finished)

    def step_batches(self, loss_module: nn.Module, collated: StepBatches, step: int) -> StepBatches:
        """The batches themselves: they need no weights."""
        return collated

    def load_state(self, folder: Path) -> None:
        """Nothing: a checkpoint's weights are all that a run goes on with."""

    def before_training(self, loss_module: nn.Module, output_dir: Path) -> None:
        """Nothing: a run needs only its weights."""

    def before_save(self, loss_module: nn.Module, *, evaluated: bool) -> None:
        """Calibrate, on every rank, unless an evaluation has: a checkpoint is a full predictor."""
        if not evaluated:
            loss_module.eval()
            self.calibrated = self.calibrate(network_of(loss_module))
            loss_module.train()

    def export(self, model: LengthNetwork, state: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that LengthPredictor loads: backbone, head and card."""
        if self.calibrated is None:
            raise RuntimeError("a predictor is calibrated before it is exported")
        export_model(model.model, self.method, self.tokenizer, inner_state(state), folder)
        save_head(state, self.rows.target_model, folder)
        decoder, metrics = self.calibrated
        backbone = {"name": self.config.backbone, **asdict(self.backbone)}
        if self.config.backbone == "encoder":
            backbone["encoder_path"] = ""  # the encoder lies in the folder
        card = {
            "backbone": backbone,
            "served_model": served_card(self.config, self.rows),
            **decoder.to_dict(),
            "training_data": self.rows.card(),
            "metrics": {"calibration": metrics},
        }
        write_card(folder, card)

    def extra_bytes(self, model: LengthNetwork) -> int:
        """None: a card is small."""
        return 0


def network_of(loss_module: nn.Module) -> LengthNetwork:
    """The network inside of a LengthLoss."""
    network = loss_module.network
    if not isinstance(network, LengthNetwork):
        raise TypeError(f"wanted a LengthNetwork, got {type(network).__name__}")
    return network


def train_predictor(config: PredictorConfig) -> Path:
    """Train, calibrate and export; returns the predictor's folder.

    Raises: as finetune.engine.train_task.
    """
    if config.backbone == "states":
        from predictor.states_training import train_states

        return train_states(config)
    if config.train_type == "none":
        from predictor.frozen import train_frozen

        with explained(lambda: training_advice(config)):
            return train_frozen(config)
    from finetune.engine import train_task

    return train_task(config, LengthTraining)
