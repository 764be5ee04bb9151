"""Writes the charts of a page as separate SVG files, for documents that cannot embed a page."""

from __future__ import annotations

import itertools
import re
from html import escape, unescape
from pathlib import Path

from quietstar_jax.reports.page import asset, write_page

_SVG = re.compile(r'<svg viewBox="([^"]+)" role="img" aria-label="([^"]+)">(.*?)</svg>', re.DOTALL)
_FONT = "svg { font-family: system-ui, sans-serif; background: var(--paper); }"


def drawings(html: str) -> dict[str, str]:
    """Returns file name -> SVG for every chart of a page; repeated names are numbered."""
    found: dict[str, str] = {}
    style = escape(asset("chart.css"), quote=False) + _FONT
    for view, label, marks in _SVG.findall(html):
        stem = re.sub(r"\W+", "_", unescape(label)).strip("_").lower()
        names = itertools.chain([f"{stem}.svg"], (f"{stem}_{i}.svg" for i in itertools.count(2)))
        name = next(name for name in names if name not in found)
        width, height = view.split()[2:]
        found[name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" style="width:{width}px;height:{height}px" '
            f'role="img" aria-label="{label}"><style>{style}</style>{marks}</svg>\n'
        )
    return found


def write_drawings(folder: Path, html: str) -> list[Path]:
    """Writes every chart of a page into a folder.

    Raises:
      ConfigError: a file cannot be written.
    """
    found = {folder / name: svg for name, svg in drawings(html).items()}
    for path, svg in found.items():
        write_page(path, svg, "--figures")
    return list(found)
