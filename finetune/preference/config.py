"""The flags of `train.py --task reward` and `--task dpo`. Free of torch."""

from dataclasses import dataclass
from typing import ClassVar

from finetune.config import RowsConfig
from finetune.flag_effects import TRAINING, Effect
from finetune.flag_groups import check_not_negative, task_flag
from finetune.flags import fixed_flag
from finetune.preference.formats import PAIRINGS, PREFERENCE_COLUMNS, PREFERENCE_FORMATS

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "kto", "orpo")

KTO = Effect("--loss_type kto; got {c.loss_type}", lambda c: c.loss_type == "kto")
# When a flag has an effect, beside finetune.flag_effects.TRAINING.
EFFECTS: dict[str, Effect] = {
    "prompt_text": Effect("another --task: no format of pairs reads it", lambda c: False),
}
DPO_EFFECTS: dict[str, Effect] = {
    "pairs": Effect("another --loss_type than kto", lambda c: c.loss_type != "kto"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), KTO),
}


@dataclass(frozen=True)
class PreferenceConfig(RowsConfig):
    """The flags of tasks whose rows are answers that are compared."""

    data_format: str = fixed_flag(
        "auto",
        "what the rows look like; auto: found from each row's keys",
        choices=("auto", *PREFERENCE_FORMATS),
    )
    pairs: str = fixed_flag(
        "all",
        "of an answer list, all pairs that differ in score, or those adjacent in its order",
        choices=PAIRINGS,
    )
    learning_rate: float = fixed_flag(5e-5, "highest learning rate")
    lora_dropout: float = fixed_flag(0.0, "dropout on LoRA's input")
    prefix_dropout: float = fixed_flag(0.0, "P-Tuning v2: dropout on the prefix in training")

    @property
    def column_names(self) -> tuple[str, ...]:
        return PREFERENCE_COLUMNS

    @property
    def pairing(self) -> str:
        """How answers are compared: as PreferenceReader's."""
        return self.pairs

    @property
    def sequences(self) -> int:
        return 1 if self.pairing == "labelled" else 2

    def check_task(self) -> None:
        """Raises ValueError for another --batching than ragged."""
        if self.batching != "ragged":
            raise ValueError(
                f"--task {self.task} lays answers end to end, --batching ragged; "
                f"got {self.batching}"
            )


@dataclass(frozen=True)
class RewardConfig(PreferenceConfig):
    """All flags of train.py --task reward."""

    title: ClassVar[str] = "Train a model that scores answers"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS

    task: str = task_flag("reward")
    margin: float = fixed_flag(
        0.0, "how much higher the better answer's score must be before the loss is halved"
    )
    score_margin: float = fixed_flag(
        0.0, "the same, for each point by which the scores in the rows differ"
    )
    center: float = fixed_flag(
        0.0, "weight of the squared sum of a pair's scores, which keeps them around 0"
    )

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "margin")

    @property
    def label_share(self) -> float:
        return 1 / self.max_len  # an answer's last token, and no logits

    @property
    def scores(self) -> bool:
        return True

    def check_task(self) -> None:
        """Raises ValueError for a margin or a weight below 0."""
        super().check_task()
        for name in ("margin", "score_margin", "center"):
            check_not_negative(name, getattr(self, name))


@dataclass(frozen=True)
class DpoConfig(PreferenceConfig):
    """All flags of train.py --task dpo."""

    title: ClassVar[str] = "Train a model to prefer the better of two answers"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS | DPO_EFFECTS

    task: str = task_flag("dpo")
    loss_type: str = fixed_flag(
        "sigmoid",
        "sigmoid: DPO; ipo, hinge: other losses of a pair; kto: answers that are liked or not; "
        "orpo: without a reference",
        choices=LOSS_TYPES,
    )
    beta: float = fixed_flag(
        0.1, "how strongly the model is held to its reference; orpo: weight of the odds ratio"
    )
    desirable_weight: float = fixed_flag(1.0, "kto: weight of the answers that are liked")
    undesirable_weight: float = fixed_flag(1.0, "kto: weight of the others")

    @property
    def evaluated(self) -> tuple[str, ...]:
        names = ("loss", "margin", "chosen_reward", "rejected_reward")
        return names if self.loss_type == "kto" else (*names, "accuracy")

    @property
    def pairing(self) -> str:
        return "labelled" if self.loss_type == "kto" else self.pairs

    def check_task(self) -> None:
        """Raises ValueError for a number out of range, or where a reference cannot be."""
        super().check_task()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"--beta must be above 0; got {self.beta}")
        for name in ("desirable_weight", "undesirable_weight"):
            check_not_negative(name, getattr(self, name))
        if self.loss_type == "orpo":
            return
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if self.loss_type == "kto" and getattr(self, name) == 1:
                raise ValueError(
                    "--loss_type kto compares each answer with another row's: "
                    f"--{name} must be at least 2; got 1"
                )
        if not self.switches_off and (self.streaming or self.loss_type == "kto"):
            other = "--streaming" if self.streaming else "--loss_type kto"
            raise ValueError(
                f"{other} needs a reference that is this model with its adapter off: "
                f"--train_type ptuning, or lora without --adapter and with another "
                f"--init_lora_weights than pissa and olora"
            )
