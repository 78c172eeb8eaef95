"""Names of tools. Free of everything else."""

import re
from typing import Any

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_tool_name(name: str, value: Any) -> str:
    """A tool's name.

    Args:
        name: of the field that it stands in.
    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not TOOL_NAME.fullmatch(value):
        got = repr(value[:64]) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name} must be 1 to 64 letters, digits, _ and -, got {got}")
    return value
