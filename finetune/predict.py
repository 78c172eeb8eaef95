"""The command python -m finetune.predict; the code is finetune/evaluation/predict.py."""

import sys

from finetune.evaluation.predict import main

if __name__ == "__main__":
    sys.exit(main())
