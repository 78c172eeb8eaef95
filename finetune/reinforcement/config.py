"""The flags of `train.py --task grpo` and `--task ppo`. Free of torch."""

import re
from dataclasses import dataclass
from typing import ClassVar

from finetune.config import RowsConfig
from finetune.flag_effects import TRAINING, Effect
from finetune.flag_groups import check_not_negative, check_share, task_flag
from finetune.flags import fixed_flag, flag
from finetune.reinforcement.rewards import MODEL, RewardKnobs, parse_rewards

NORMS = ("sequence", "token", "constant")
SCALES = ("group", "batch", "none")
MIN_TEMPERATURE = 0.01  # lower ones leave fp32's range: all answers would be the likeliest


def uses(*names: str) -> Effect:
    """The effect of a knob of rewards."""
    return Effect(
        f"--rewards with {' or '.join(names)}; got {{c.rewards!r}}",
        lambda c: any(name in c.reward_weights for name in names),
    )


PTX = Effect("--pretrain_path", lambda c: bool(c.pretrain_path))
# When a flag has an effect, beside finetune.flag_effects.TRAINING.
EFFECTS: dict[str, Effect] = {
    "glm3_labels": Effect("another --task: no answer of a row is learnt", lambda c: False),
    "reward_length": uses("length"),
    "reward_pattern": uses("pattern", "pattern_share"),
    "reward_model": uses(MODEL),
}
GRPO_EFFECTS: dict[str, Effect] = {
    "unbiased_kl": Effect("--kl_coef above 0", lambda c: c.kl_coef > 0),
}
PPO_EFFECTS: dict[str, Effect] = {
    "glm3_labels": Effect(
        "--pretrain_path, and --mode glm3 or none",
        lambda c: bool(c.pretrain_path) and c.mode in (None, "glm3"),
    ),
    "pretrain_coef": PTX,
}


@dataclass(frozen=True)
class RolloutConfig(RowsConfig):
    """The flags of tasks that learn from rewards of sampled answers."""

    learning_rate: float = fixed_flag(1e-5, "highest learning rate")
    lora_dropout: float = fixed_flag(0.0, "dropout on LoRA's input")
    prefix_dropout: float = fixed_flag(0.0, "P-Tuning v2: dropout on the prefix in training")
    reward_model: str = fixed_flag("", "a checkpoint of --task reward, whose score is a reward")
    rewards: str = fixed_flag(
        "",
        "comma list of rewards, each with a weight after a colon, whose weighted sum counts "
        "(docs/preferences.md) [model, where --reward_model is given]",
    )
    reward_length: int = fixed_flag(64, "length: the wanted tokens of an answer", positive=True)
    reward_pattern: str = fixed_flag("", "pattern, pattern_share: a regular expression")
    reward_clip: float | None = fixed_flag(None, "clip rewards to so much on both sides of 0")
    missing_end_penalty: float = fixed_flag(
        0.0, "taken off the reward of an answer that does not end within --max_new_tokens"
    )
    num_generations: int = fixed_flag(8, "answers sampled for each prompt", positive=True)
    max_new_tokens: int = fixed_flag(
        None, "longest answer in tokens [--max_len less --max_src_len]", positive=True
    )
    temperature: float = fixed_flag(1.0, "of the sampling, and of the log-probabilities")
    top_p: float = fixed_flag(1.0, "sample among the likeliest tokens of so much probability")
    top_k: int = fixed_flag(0, "sample among so many likeliest tokens; 0: all")
    kl_coef: float = fixed_flag(0.04, "weight of the divergence from the start; 0: no reference")
    clip_range: float = fixed_flag(0.2, "how far the ratio of probabilities may fall below 1")
    clip_range_high: float | None = fixed_flag(None, "how far it may rise above 1 [--clip_range]")
    ema_decay: float | None = fixed_flag(
        None, "keep a moving average of the weights, in ema/ of every checkpoint: 0.992 is usual"
    )
    rollout_steps: int = fixed_flag(
        1, "optimizer steps whose prompts are answered at once", positive=True
    )
    rollout_epochs: int = fixed_flag(1, "times that answers are trained on", positive=True)
    rollout_batch: int = fixed_flag(32, "answers that are written at once, a device", positive=True)
    length_predictor: str = flag(
        "", "a predictor of the length of answers, by which rollouts are ordered from the start"
    )

    def __post_init__(self) -> None:
        """Check all flags; raises ValueError naming the first that is wrong."""
        if not self.rewards and self.reward_model:
            self.fill_in("rewards", MODEL)
        super().__post_init__()

    @property
    def evaluated(self) -> tuple[str, ...]:
        return ("loss", "reward", "kl", "answer_tokens")

    @property
    def reward_weights(self) -> dict[str, float]:
        """{name: weight} of --rewards; raises ValueError."""
        return parse_rewards(self.rewards)

    @property
    def reward_knobs(self) -> RewardKnobs:
        return RewardKnobs(self.reward_length, self.reward_pattern)

    @property
    def sequences(self) -> int:
        return self.num_generations

    @property
    def label_share(self) -> float:
        return min(1.0, self.max_new_tokens / self.max_len)

    @property
    def copies(self) -> tuple[int, int]:
        """(frozen, trained) models beside the one that learns; for the estimate of memory."""
        return int(bool(self.kl_coef) and not self.switches_off), 0

    @property
    def rollout_rows(self) -> int:
        prompts = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return min(self.rollout_batch, prompts * self.rollout_steps * self.num_generations)

    @property
    def scorer(self) -> str:
        return self.reward_model

    def check_task(self) -> None:
        """Raises ValueError for a number out of range, rewards that are not there, or answers
        without room.
        """
        if self.batching != "ragged":
            raise ValueError(
                f"--task {self.task} lays answers end to end, --batching ragged; "
                f"got {self.batching}"
            )
        self.check_rewards()
        if self.max_new_tokens is None:
            self.fill_in("max_new_tokens", self.max_len - self.max_src_len)
        if self.max_src_len + self.max_new_tokens > self.max_len:
            raise ValueError(
                f"--max_new_tokens ({self.max_new_tokens}) and --max_src_len ({self.max_src_len}) "
                f"together must be at most --max_len ({self.max_len})"
            )
        if not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature must be a number from {MIN_TEMPERATURE:g} up (answers must be "
                f"sampled to differ); got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1; got {self.top_p}")
        if self.ema_decay is not None:
            check_share("ema_decay", self.ema_decay)
        names = ("top_k", "kl_coef", "clip_range", "clip_range_high", "missing_end_penalty")
        for name in (*names, "reward_clip"):
            value = getattr(self, name)
            if value is not None:
                check_not_negative(name, value)

    def check_rewards(self) -> None:
        """Raises ValueError where --rewards lacks what its names need."""
        weights = self.reward_weights
        if not weights:
            raise ValueError("--rewards or --reward_model is required: what answers are scored by")
        if MODEL in weights and not self.reward_model:
            raise ValueError("--rewards model needs --reward_model, a folder of --task reward")
        patterns = {"pattern", "pattern_share"} & weights.keys()
        if patterns and not self.reward_pattern:
            raise ValueError(f"--rewards {min(patterns)} needs --reward_pattern")
        try:
            re.compile(self.reward_pattern)
        except re.error as error:
            raise ValueError(f"--reward_pattern is no regular expression: {error}") from None


@dataclass(frozen=True)
class GrpoConfig(RolloutConfig):
    """All flags of train.py --task grpo."""

    title: ClassVar[str] = "Train a model by the rewards of its answers, compared with each other"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS | GRPO_EFFECTS

    task: str = task_flag("grpo")
    unbiased_kl: bool = fixed_flag(
        True, "weigh the divergence of a token by the ratio of its probabilities, new to old"
    )
    advantage_scale: str = fixed_flag(
        "group",
        "what advantages are divided by: the deviation of a prompt's rewards (group), of all "
        "rewards of a rollout (batch), or nothing",
        choices=SCALES,
    )
    loss_norm: str = fixed_flag(
        "sequence",
        "the mean over tokens of each answer, then over answers (sequence); over all tokens "
        "(token); over answers of --max_new_tokens each (constant)",
        choices=NORMS,
    )

    def check_task(self) -> None:
        """As RolloutConfig's; also for groups of one answer."""
        super().check_task()
        if self.num_generations < 2:
            raise ValueError(
                "--task grpo compares the answers to a prompt: --num_generations must be at "
                "least 2; got 1"
            )


@dataclass(frozen=True)
class PpoConfig(RolloutConfig):
    """All flags of train.py --task ppo."""

    title: ClassVar[str] = "Train a model, and a critic, by the rewards of its answers"
    effects: ClassVar[dict[str, Effect]] = TRAINING | EFFECTS | PPO_EFFECTS

    task: str = task_flag("ppo")
    num_generations: int = fixed_flag(1, "answers sampled for each prompt", positive=True)
    kl_coef: float = fixed_flag(
        0.05, "weight of the divergence from the start in the rewards; 0: no reference"
    )
    rollout_epochs: int = fixed_flag(2, "times that answers are trained on", positive=True)
    clip_range_value: float = fixed_flag(0.2, "how far a value may move from the rollout's")
    vf_coef: float = fixed_flag(0.1, "weight of the critic's loss")
    gamma: float = fixed_flag(1.0, "discount of later rewards")
    gae_lambda: float = fixed_flag(0.95, "GAE: weight of longer returns")
    whiten_rewards: bool = fixed_flag(
        False, "scale a rollout's rewards to a deviation of 1, around their mean"
    )
    pretrain_path: str = fixed_flag(
        "", "PPO-ptx: rows of questions and answers that are learnt beside, as --train_path"
    )
    pretrain_coef: float = fixed_flag(10.0, "PPO-ptx: weight of the loss of --pretrain_path")

    @property
    def copies(self) -> tuple[int, int]:
        return super().copies[0], 1

    def check_task(self) -> None:
        """As RolloutConfig's; also for a discount or a lambda outside of [0, 1]."""
        super().check_task()
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be from 0 to 1; got {getattr(self, name)}")
        for name in ("clip_range_value", "vf_coef", "pretrain_coef"):
            check_not_negative(name, getattr(self, name))
