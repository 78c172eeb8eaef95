#!/usr/bin/env bash
# Set up .venv where needed and run the tests. Arguments go to pytest: bash scripts/test.sh tests/chatglm -k lora
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh test
exec python -m pytest "$@"
