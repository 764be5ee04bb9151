"""A run to export."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export_hf.exports import write_checkpoint
from tests.hf.runs import start_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf"))
    return tmp_path / "run"
