"""Real models and texts that are not part of the repository: tests that use them skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def material(relative: str) -> Path:
    """A file or folder below the one named by QUIETSTAR_MATERIAL (default: `shared` beside the repository).

    Args:
      relative: path inside it, e.g. `models/stories260k`. Skips the calling test if it does not exist.
    """
    root = Path(os.environ.get("QUIETSTAR_MATERIAL") or Path(__file__).resolve().parents[2] / "shared")
    path = root / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; set QUIETSTAR_MATERIAL to the folder that holds models/, data/, tokenizers/")
    return path
