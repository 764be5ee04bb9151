"""The arithmetic of thoughts is explicit about dtypes."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def explicit_dtypes(strict_promotion: None) -> None:
    """Applies `strict_promotion` to every test of this folder."""
