import sys

from serving.deployment.command import main

if __name__ == "__main__":
    sys.exit(main())
