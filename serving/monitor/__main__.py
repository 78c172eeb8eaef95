import sys

from serving.monitor.command import main

if __name__ == "__main__":
    sys.exit(main())
