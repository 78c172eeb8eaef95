#!/usr/bin/env bash
# Set up .venv where needed, check format, lint and types, and run the tests, whole files side by side on up to 4 cores.
#   bash scripts/test.sh tests/chatglm -k lora      arguments go to pytest, which then runs in one process
#   SLOW=1 bash scripts/test.sh                     also the tests that take minutes, such as the whole quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh test
source scripts/setup_browser.sh
cores="$(nproc)"  # before OMP_NUM_THREADS is set, which nproc obeys
if [ $# -eq 0 ]; then
    ruff check .
    mypy
    ruff format --check .
fi
if [ $# -eq 0 ] && [ "$cores" -ge 2 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    set -- -n "$(( cores < 4 ? cores : 4 ))" --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest "$@"
