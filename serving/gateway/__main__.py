import sys

from serving.gateway.command import main

if __name__ == "__main__":
    sys.exit(main())
