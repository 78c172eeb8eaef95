"""Training data from files as they are published: python -m finetune.prepare."""

import sys

from finetune.prepare.command import main

if __name__ == "__main__":
    sys.exit(main())
