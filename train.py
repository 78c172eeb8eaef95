"""Fine-tune a ChatGLM, or train a predictor of its answers' lengths. `python train.py --help` lists
every flag; README.md shows the commands.
"""

import sys

from chatglm.commands import run_command
from finetune.config import TrainConfig, parse_config


def predictor_config() -> type[TrainConfig]:
    from predictor.config import PredictorConfig  # numpy: not for the others' --help

    return PredictorConfig


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, {"predictor": predictor_config})
    return run_command("train.py", lambda: run(config))


def run(config: TrainConfig) -> int | None:
    if config.estimate_memory:
        from finetune.memory.command import estimate_run

        estimate_run(config)
        return
    # torch, DeepSpeed: seconds, and only once the flags are right
    from finetune.engine import TrainingFailed, train
    from finetune.stopping import StoppedBySignal

    try:
        if config.task == "predictor":
            from predictor.training import train_predictor

            train_predictor(config)
        else:
            train(config)
    except StoppedBySignal as stopped:  # its line is said
        return stopped.exit_code
    except TrainingFailed as error:
        raise ValueError(error) from None


if __name__ == "__main__":
    sys.exit(main())
