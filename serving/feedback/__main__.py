import sys

from serving.feedback.command import main

if __name__ == "__main__":
    sys.exit(main())
