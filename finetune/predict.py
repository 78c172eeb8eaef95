"""The door of finetune/evaluation/predict.py: python -m finetune.predict."""

import sys

from finetune.evaluation.predict import main

if __name__ == "__main__":
    sys.exit(main())
