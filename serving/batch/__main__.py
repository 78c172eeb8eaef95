import sys

from serving.batch.command import main

if __name__ == "__main__":
    sys.exit(main())
