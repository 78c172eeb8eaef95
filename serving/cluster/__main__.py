import sys

from serving.cluster.command import main

if __name__ == "__main__":
    sys.exit(main())
