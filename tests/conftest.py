"""Where tests find goldens and public data: `shared` beside the repository, or $GLM_FOUNDRY_SHARED."""

import os
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GLM_FOUNDRY_SHARED", REPO_ROOT.parent / "shared"))


def shared_file(relative: str) -> Path:
    """Path of a file or folder under SHARED; skips the test (or the module, at import) where it is absent."""
    path = SHARED / relative
    if not path.exists():
        reason = f"needs {relative}, not found under {SHARED} (set GLM_FOUNDRY_SHARED)"
        pytest.skip(reason, allow_module_level=True)
    return path
