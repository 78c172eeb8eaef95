"""The door of finetune/evaluation/evaluate.py: python -m finetune.evaluate."""

import sys

from finetune.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
