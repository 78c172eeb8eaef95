import sys

from serving.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
