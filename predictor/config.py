"""The flags of `train.py --task predictor`: those of fine-tuning and a predictor's. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from finetune.config import RunConfig
from finetune.flag_effects import TRAINING, UNSHARED, Effect
from finetune.flag_groups import task_flag
from finetune.flags import fixed_flag, flag
from finetune.methods import METHODS
from predictor.backbones import BACKBONES
from predictor.heads import HEADS
from predictor.hidden_states import POOLINGS
from predictor.labels import MAX_TOKENS

MOST_BINS = 10_000  # of a head, each an output
MOST_UNITS = 4096
TRAIN_TYPES = (*METHODS, "none")

STEPS = Effect(
    "a backbone that is trained in steps, not --train_type none", lambda c: c.train_type != "none"
)
LEXICAL = Effect(
    "--backbone lexical, or states, whose prior is lexical; got {c.backbone}",
    lambda c: c.backbone in ("lexical", "states"),
)
STATES = Effect("--backbone states; got {c.backbone}", lambda c: c.backbone == "states")
FROZEN = Effect("--train_type none; got {c.train_type}", lambda c: c.train_type == "none")
DISTRIBUTION = Effect("--head distribution; got {c.head}", lambda c: c.head == "distribution")
IN_STEPS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_ratio",
    "batching",
    "gradient_checkpointing",
    "num_workers",
    "precision",
    "ds_file",
    "show_loss_step",
    "save_model_step",
    "save_total_limit",
    "eval_step",
    "per_device_eval_batch_size",
    "metric_for_best",
    "early_stopping_patience",
    "resume_from_checkpoint",
    "report_to",
    "tensorboard",
)
# When a flag of --task predictor has an effect, beside finetune.flag_effects.TRAINING.
EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(IN_STEPS, STEPS),
    "tensorboard": Effect(
        "--report_to tensorboard, and not --train_type none",
        lambda c: c.train_type != "none" and "tensorboard" in c.loggers,
    ),
    "share_prefix": Effect(
        f"--backbone chatglm, a --mode other than {', '.join(UNSHARED)}, and no dropout",
        lambda c: c.backbone == "chatglm" and c.mode not in UNSHARED and not c.has_noise,
    ),
    "data_cache": FROZEN,
    "data_cache_gb": Effect(
        "--data_cache and --train_type none",
        lambda c: bool(c.data_cache) and c.train_type == "none",
    ),
    "encoder_path": Effect(
        "--backbone encoder or lexical; got {c.backbone}",
        lambda c: c.backbone in ("encoder", "lexical"),
    ),
    "encoder_language": Effect(
        "--backbone lexical with --encoder_path",
        lambda c: c.backbone == "lexical" and bool(c.encoder_path),
    ),
    "encoder_layers": Effect("--encoder_path", lambda c: bool(c.encoder_path)),
    "student_dims": Effect(
        "--backbone lexical with --encoder_path",
        lambda c: c.backbone == "lexical" and bool(c.encoder_path),
    ),
    **dict.fromkeys(("hash_bits", "student_ridge"), LEXICAL),
    **dict.fromkeys(("head_ridge", "landmarks"), FROZEN),
    "calibration_share": Effect(
        "a backbone that is trained in steps or --backbone states, not --train_type none",
        lambda c: c.train_type != "none" or c.backbone == "states",
    ),
    "eval_path": Effect(
        "another --backbone than states, whose metrics are of prompts unseen in folds",
        lambda c: c.backbone != "states",
    ),
    **dict.fromkeys(
        (
            "states",
            "state_layers",
            "state_pooling",
            "state_units",
            "state_seeds",
            "state_decay",
            "state_dropout",
        ),
        STATES,
    ),
    **dict.fromkeys(("num_bins", "label_width", "crps_weight"), DISTRIBUTION),
    "num_buckets": Effect("--head bucket; got {c.head}", lambda c: c.head == "bucket"),
    "ranking_loss": Effect("--head ranking; got {c.head}", lambda c: c.head == "ranking"),
}


def parse_layers(name: str, text: str) -> tuple[int, ...]:
    """The layers of a flag's comma list, ascending. Raises ValueError where it is malformed."""
    try:
        layers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        layers = [0]
    if layers and layers[0] < 1:
        raise ValueError(
            f"--{name} must be whole numbers from 1, separated by commas; got {text!r}"
        )
    return tuple(layers)


@dataclass(frozen=True)
class PredictorConfig(RunConfig):
    """All flags of train.py --task predictor.

    Lengths are tokens of the served model, without its end token.
    """

    title: ClassVar[str] = "Train a predictor of the length of a served model's answers"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS

    task: str = task_flag("predictor")
    model_name_or_path: str = fixed_flag(
        "",
        "folder of the served model: its tokenizer counts lengths; with --backbone chatglm it is "
        "the backbone too (not needed where rows carry output_tokens and the backbone is another)",
    )
    train_path: str = fixed_flag(
        "",
        "comma list of rows: {prompt, output_tokens, served_model?, finished?}, or answers to "
        "count: {instruction, input, output} (required)",
    )
    eval_path: str = flag("", "rows for the metrics; else the calibration rows serve")
    # None only until __post_init__ fills in the default of the backbone.
    train_type: str = fixed_flag(
        None,
        "how the backbone is trained; none: not at all, a head on its frozen vectors [chatglm: "
        "lora; encoder: all; lexical: none]",
        choices=TRAIN_TYPES,
    )
    learning_rate: float = fixed_flag(None, "highest learning rate [all, freeze: 5e-5; else 1e-3]")
    metric_for_best: str = flag(
        "loss", "what makes a checkpoint the best", choices=("loss", "tau", "mae")
    )
    batching: str = fixed_flag(
        "ragged",
        "grouped: prompts of like length in one pass, which spares an encoder padding",
        choices=("ragged", "grouped"),
    )
    # predictor
    backbone: str = fixed_flag(
        "lexical",
        "lexical: n-grams and counts, no transformer; encoder: a Hugging Face encoder "
        "(--encoder_path); chatglm: the served model itself; states: its hidden states, read again "
        "while the answer is written (--states)",
        choices=tuple(BACKBONES),
    )
    head: str = fixed_flag(
        "distribution",
        "distribution: log-spaced bins; bucket: equal classes; regression: log length; "
        "ranking: order only",
        choices=tuple(HEADS),
    )
    encoder_path: str = fixed_flag(
        "", "folder of a Hugging Face encoder; for --backbone lexical, a teacher for its n-grams"
    )
    encoder_language: str = fixed_flag(
        "all", "lexical: prompts that the teacher reads", choices=("all", "en", "zh")
    )
    encoder_layers: str = fixed_flag(
        "",
        "comma list of the encoder's layers whose means are read, from 1; it is cut after the "
        "highest [the last]",
    )
    reuse_prefill: bool = fixed_flag(
        False,
        "--backbone chatglm: a head on the served model's own prompt state, which costs nothing "
        "when serving",
    )
    states: str = fixed_flag(
        "",
        "--backbone states: folder of the hidden states of --train_path's answers, which "
        "scripts/collect_lengths.py --states keeps (required)",
    )
    state_layers: str = fixed_flag(
        "", "states: comma list of the layers to read, of those that were kept [all]"
    )
    state_pooling: str = fixed_flag(
        "both",
        "states: the last token's, the mean over tokens, both side by side, or both with the "
        "prompt's mean weighted by entropy",
        choices=POOLINGS,
    )
    state_units: int = fixed_flag(64, "states: hidden units of a network; 0: a linear one")
    state_seeds: int = fixed_flag(2, "states: networks whose logits are averaged", positive=True)
    state_decay: float = fixed_flag(3.0, "states: weight decay of AdamW")
    state_dropout: float = fixed_flag(0.5, "states: dropout of states and hidden units")
    served_model: str = fixed_flag(
        "",
        "name of the model whose answers are predicted "
        "[the folder's, of a checkpoint with its run's]",
    )
    other_models_weight: float = fixed_flag(
        0.85,
        "share of a prompt's weight that lengths of other served models get, where there are any",
    )
    length_limit: int | None = fixed_flag(
        None, "longest answer in tokens [the served model's context, else 8192]", positive=True
    )
    num_bins: int = fixed_flag(
        32, "classes of the distribution, spaced in log length", positive=True
    )
    label_width: float = fixed_flag(1.0, "distribution: width of a soft label, in bins")
    crps_weight: float = fixed_flag(1.0, "distribution: weight of the ordinal term")
    num_buckets: int = fixed_flag(10, "bucket: number of equal classes", positive=True)
    ranking_loss: str = fixed_flag(
        "pairwise", "ranking: which loss", choices=("pairwise", "listmle")
    )
    calibration_share: float = fixed_flag(
        0.15,
        "share of the prompts held out for calibration; a frozen backbone's head calibrates on "
        "all of them, each by a head that has not seen it; states: held out to stop training",
    )
    hash_bits: int = fixed_flag(18, "lexical: n-grams are hashed to 2^N rows")
    student_ridge: float = fixed_flag(3.0, "lexical: ridge penalty of the student of n-grams")
    student_dims: int = fixed_flag(
        64,
        "lexical with --encoder_path: principal components of the teacher's vectors that the "
        "student learns",
    )
    head_ridge: float = fixed_flag(0.5, "frozen backbone: ridge penalty of the kernel head")
    landmarks: int = fixed_flag(
        1024, "frozen backbone: prompts that the kernel compares with", positive=True
    )
    near_duplicates: float = fixed_flag(
        0.8, "prompts at least so alike (Jaccard of 5-grams) stay on one side of every split"
    )

    def __post_init__(self) -> None:
        """Check all flags; raises ValueError naming the first that is wrong."""
        self._fill_in_defaults()
        self.check_groups()
        self._check_backbone()
        self._check_numbers()

    def _fill_in_defaults(self) -> None:
        """Set the flags whose default depends on other flags."""
        if not self.train_type:
            kinds = {
                "chatglm": "none" if self.reuse_prefill else "lora",
                "encoder": "all",
            }
            self.fill_in("train_type", kinds.get(self.backbone, "none"))
        if self.max_src_len is None:
            self.fill_in("max_src_len", 256)
        if self.learning_rate is None:
            rate = 5e-5 if self.train_type in ("all", "freeze") else 1e-3
            self.fill_in("learning_rate", rate)

    def _check_backbone(self) -> None:
        """Raises ValueError where --backbone, --train_type and --encoder_path do not fit."""
        if self.reuse_prefill and (self.backbone, self.train_type) != ("chatglm", "none"):
            raise ValueError(
                "--reuse_prefill needs --backbone chatglm, and no --train_type: "
                "the served model stays as it is"
            )
        if self.backbone in ("lexical", "states") and self.train_type != "none":
            raise ValueError(
                f"--backbone {self.backbone} has no weights for --train_type {self.train_type}"
            )
        if self.backbone == "states":
            self._check_states()
        if self.backbone == "encoder" and not self.encoder_path:
            raise ValueError(
                "--backbone encoder needs --encoder_path: the folder of a Hugging Face encoder"
            )
        if self.backbone == "encoder" and self.train_type == "ptuning":
            raise ValueError(
                "--train_type ptuning is for ChatGLM; an encoder takes all, lora, freeze or none"
            )

    def _check_states(self) -> None:
        """Raises ValueError where the flags of --backbone states do not fit."""
        if not self.states:
            raise ValueError(
                "--backbone states needs --states: the folder that "
                "scripts/collect_lengths.py --states writes"
            )
        if self.head != "distribution":
            raise ValueError(f"--backbone states needs --head distribution; got {self.head}")
        if "," in self.train_path:
            raise ValueError(
                "--backbone states needs one file as --train_path, whose lines the states are of; "
                f"got {self.train_path}"
            )
        if not 0 <= self.state_units <= MOST_UNITS:
            raise ValueError(
                f"--state_units must be from 0 to {MOST_UNITS:,}; got {self.state_units}"
            )
        if not 0 <= self.state_decay < 1e3:
            raise ValueError(f"--state_decay must not be below 0; got {self.state_decay}")
        if not 0 <= self.state_dropout < 1:
            raise ValueError(f"--state_dropout must be in [0, 1); got {self.state_dropout}")
        self.read_layers  # noqa: B018 - raises where --state_layers is malformed

    def _check_numbers(self) -> None:
        """Raises ValueError naming the first flag that is out of its range."""
        largest = {"length_limit": MAX_TOKENS, "num_bins": MOST_BINS, "num_buckets": MOST_BINS}
        for name, most in largest.items():
            value = getattr(self, name)
            if value is not None and not 2 <= value <= most:
                raise ValueError(f"--{name} must be from 2 to {most:,}; got {value}")
        for name in ("label_width", "crps_weight"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"--{name} must not be below 0; got {getattr(self, name)}")
        for name in ("other_models_weight", "calibration_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1); got {getattr(self, name)}")
        if not self.calibration_share:
            raise ValueError(
                "--calibration_share must be above 0: "
                "quantiles hold on prompts that were not trained on"
            )
        for name in ("student_ridge", "head_ridge"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"--{name} must be above 0; got {getattr(self, name)}")
        if not 8 <= self.hash_bits <= 24:
            raise ValueError(f"--hash_bits must be from 8 to 24; got {self.hash_bits}")
        if self.student_dims < 0:
            raise ValueError(f"--student_dims must not be below 0; got {self.student_dims}")
        self.layers  # noqa: B018 - raises where --encoder_layers is malformed
        if not 0 < self.near_duplicates <= 1:
            raise ValueError(f"--near_duplicates must be in (0, 1]; got {self.near_duplicates}")

    @property
    def layers(self) -> tuple[int, ...]:
        """--encoder_layers, ascending."""
        return parse_layers("encoder_layers", self.encoder_layers)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """--state_layers, ascending; none for all."""
        return parse_layers("state_layers", self.state_layers)

    @property
    def needs_model(self) -> bool:
        """Whether the served model's folder is needed: without it rows must bring their lengths."""
        return self.backbone == "chatglm"

    @property
    def has_evaluation(self) -> bool:
        """A run always evaluates, without --eval_path on the calibration rows."""
        return True

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("loss", "tau", "mae")
