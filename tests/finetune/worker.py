"""One rank of several runs of train.py in a row: worker.py CASES.json (lists of flags).

One launch serves all runs, so that its start-up time is paid once.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402

if __name__ == "__main__":
    file = next(word for word in sys.argv[1:] if word.endswith(".json"))
    own = [word for word in sys.argv[1:] if word != file]  # the launcher's --local_rank
    for words in json.loads(Path(file).read_text()):
        if code := train.main([*own, *words]):
            sys.exit(code)
