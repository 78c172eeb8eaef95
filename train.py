"""Fine-tune a ChatGLM, or train a predictor of its answers' lengths. `python train.py --help` lists
every flag; README.md shows the commands.
"""

import sys

from chatglm.commands import run_command
from finetune.config import RunConfig, TrainConfig, parse_config


def predictor_config() -> type[RunConfig]:
    """The configuration of --task predictor, imported only for it."""
    from predictor.config import PredictorConfig  # numpy: not for the others' --help

    return PredictorConfig


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, {"predictor": predictor_config})
    return run_command("train.py", lambda: run_task(config))


def run_task(config: RunConfig) -> int | None:
    """Train, or estimate the memory; returns the exit code where a signal stopped the run.

    Raises:
        ValueError: also where the loss is not finite.
    """
    if isinstance(config, TrainConfig) and config.estimate_memory:
        from finetune.memory.command import estimate_run

        estimate_run(config)
        return None
    # torch, DeepSpeed: seconds, and only once the flags are right
    from finetune.engine import TrainingFailed
    from finetune.stopping import StoppedBySignal

    try:
        if isinstance(config, TrainConfig):
            from finetune.engine import train

            train(config)
        else:
            from predictor.config import PredictorConfig
            from predictor.training import train_predictor

            assert isinstance(config, PredictorConfig)
            train_predictor(config)
    except StoppedBySignal as stopped:  # its line is said
        return stopped.exit_code
    except TrainingFailed as error:
        raise ValueError(error) from None
    return None


if __name__ == "__main__":
    sys.exit(main())
