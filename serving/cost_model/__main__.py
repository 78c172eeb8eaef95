import sys

from serving.cost_model.command import main

if __name__ == "__main__":
    sys.exit(main())
