"""Fine-tune a ChatGLM. `python train.py --help` lists every flag; README.md shows the commands."""

import sys

from finetune.config import parse_config


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv)
    if config.estimate_memory:
        from finetune.memory import estimate_run

        return estimate_run(config)
    from finetune.engine import TrainingFailed, train  # torch, DeepSpeed: seconds, and only once the flags are right

    try:
        train(config)
    except (ValueError, OSError, TrainingFailed) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
