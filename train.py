"""Train a ChatGLM, or a predictor of its answers' lengths: TASKS. `python train.py --help` lists
every flag, `python train.py --task NAME --help` another task's; README.md shows the commands.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.commands import run_command
from finetune.config import RowsConfig, RunConfig, TrainConfig, parse_config


@dataclass(frozen=True)
class TaskEntry:
    """What --task NAME runs: two functions, which import what they need only when called.

    Attributes:
        config: returns the class of its configuration.
        train: trains, of a configuration; returns the last checkpoint's folder.
    """

    config: Callable[[], type[RunConfig]]
    train: Callable[[Any], Path]


def finetune(config: TrainConfig) -> Path:
    from finetune.engine import train

    return train(config)


def pretrain_config() -> type[RunConfig]:
    from finetune.pretraining.config import PretrainConfig

    return PretrainConfig


def pretrain(config: Any) -> Path:
    from finetune.pretraining.task import pretrain as train

    return train(config)


def reward_config() -> type[RunConfig]:
    from finetune.preference.config import RewardConfig

    return RewardConfig


def reward(config: Any) -> Path:
    from finetune.preference.reward import train_reward

    return train_reward(config)


def dpo_config() -> type[RunConfig]:
    from finetune.preference.config import DpoConfig

    return DpoConfig


def dpo(config: Any) -> Path:
    from finetune.preference.dpo import train_dpo

    return train_dpo(config)


def grpo_config() -> type[RunConfig]:
    from finetune.reinforcement.config import GrpoConfig

    return GrpoConfig


def grpo(config: Any) -> Path:
    from finetune.reinforcement.grpo import train_grpo
    from serving.rollouts.continuous import make_rollouts

    return train_grpo(config, make_rollouts)


def ppo_config() -> type[RunConfig]:
    from finetune.reinforcement.config import PpoConfig

    return PpoConfig


def ppo(config: Any) -> Path:
    from finetune.reinforcement.ppo import train_ppo
    from serving.rollouts.continuous import make_rollouts

    return train_ppo(config, make_rollouts)


def predictor_config() -> type[RunConfig]:
    from predictor.config import PredictorConfig  # numpy: not for the others' --help

    return PredictorConfig


def predictor(config: Any) -> Path:
    from predictor.training import train_predictor

    return train_predictor(config)


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, {name: entry.config for name, entry in TASKS.items()})
    return run_command("train.py", lambda: run_task(config))


def run_task(config: RunConfig) -> int | None:
    """Train, or estimate the memory; returns the exit code where a signal stopped the run.

    Raises:
        ValueError: also where the loss is not finite.
    """
    if isinstance(config, RowsConfig) and config.estimate_memory:
        from finetune.memory.command import estimate_run

        estimate_run(config)
        return None
    # torch, DeepSpeed: seconds, and only once the flags are right
    from finetune.engine import TrainingFailed
    from finetune.stopping import StoppedBySignal

    try:
        TASKS[config.task].train(config)
    except StoppedBySignal as stopped:  # its line is said
        return stopped.exit_code
    except TrainingFailed as error:
        raise ValueError(error) from None
    return None


TASKS: dict[str, TaskEntry] = {
    "finetune": TaskEntry(lambda: TrainConfig, finetune),
    "pretrain": TaskEntry(pretrain_config, pretrain),
    "reward": TaskEntry(reward_config, reward),
    "dpo": TaskEntry(dpo_config, dpo),
    "grpo": TaskEntry(grpo_config, grpo),
    "ppo": TaskEntry(ppo_config, ppo),
    "predictor": TaskEntry(predictor_config, predictor),
}


if __name__ == "__main__":
    sys.exit(main())
