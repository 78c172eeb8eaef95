import sys

from serving.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
