"""The command python -m finetune.marks; the code is finetune/evaluation/marking.py."""

import sys

from finetune.evaluation.marking import main

if __name__ == "__main__":
    sys.exit(main())
