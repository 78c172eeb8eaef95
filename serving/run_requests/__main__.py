import sys

from serving.run_requests.command import main

if __name__ == "__main__":
    sys.exit(main())
