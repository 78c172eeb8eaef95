# Sourced by the other scripts: makes .venv, installs what is missing, puts it on PATH.
#   source scripts/setup.sh [extra of pyproject.toml]
# TORCH_INDEX takes torch from another index, e.g. https://download.pytorch.org/whl/cu130 for a GPU.
# VENV names another folder; PYTHON another interpreter (3.10 to 3.13).
_extra="${1:-}"
_venv="${VENV:-.venv}"
_stamp="$_venv/.installed-${_extra:-base}"
if [ ! -x "$_venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$_venv"
fi
PATH="$PWD/$_venv/bin:$PATH"
case "$_venv" in /*) PATH="$_venv/bin:$PATH" ;; esac
export PATH
_wanted="$(cat requirements.txt pyproject.toml | cksum)"
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
    echo "installing into $_venv ..."
    _started=$SECONDS
    if [ -n "${TORCH_INDEX:-}" ]; then
        python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" --index-url "$TORCH_INDEX"
    fi
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    if [ -n "$_extra" ]; then
        # The extra's packages alone: the project itself runs from its folder.
        python - "$_extra" > "$_venv/.extra.txt" <<'PY'
import re, sys
text = open("pyproject.toml", encoding="utf-8").read()
line = re.search(rf"^{sys.argv[1]} = \[(.*)\]$", text, re.M).group(1)
print("\n".join(re.findall(r'"([^"]+)"', line)))
PY
        python -m pip install --quiet --disable-pip-version-check -r "$_venv/.extra.txt"
    fi
    echo "$_wanted" > "$_stamp"
    echo "installed in $((SECONDS - _started)) s"
fi
