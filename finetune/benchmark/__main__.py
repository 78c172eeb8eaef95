"""The command python -m finetune.benchmark; the code is command.py beside it."""

import sys

from finetune.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())
