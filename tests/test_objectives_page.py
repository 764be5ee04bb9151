"""docs/objectives.md: its tables are those of the registries, and its links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "objectives.md"


def test_generated_parts_are_fresh() -> None:
    document = runpy.run_path(str(DOCS / "objectives.py"))["document"]
    assert PAGE.read_text("utf-8") == document(), "run `make docs`"


def test_links_to_files_and_headings_exist() -> None:
    text = PAGE.read_text("utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (DOCS / target).exists(), target
