import sys

from serving.chat.command import main

if __name__ == "__main__":
    sys.exit(main())
