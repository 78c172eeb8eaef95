"""The command python -m finetune.evaluate; the code is finetune/evaluation/evaluate.py."""

import sys

from finetune.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
