"""The command python -m finetune.score; the code is finetune/preference/scorer.py."""

import sys

from finetune.preference.scorer import main

if __name__ == "__main__":
    sys.exit(main())
