"""The charts of a page as files of their own, for documents that cannot hold a page."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path

from quietstar_jax.reports.page import asset, write_page

_SVG = re.compile(r'<svg viewBox="([^"]+)" role="img" aria-label="([^"]+)">(.*?)</svg>', re.DOTALL)
_FONT = "svg { font-family: system-ui, sans-serif; background: var(--paper); }"


def drawings(html: str) -> dict[str, str]:
    """File name -> SVG of every chart of a page; two that show the same have numbers."""
    found: dict[str, str] = {}
    for view, label, marks in _SVG.findall(html):
        stem = re.sub(r"\W+", "_", unescape(label)).strip("_").lower()
        same = sum(re.fullmatch(rf"{stem}(_\d+)?\.svg", name) is not None for name in found)
        name = f"{stem}_{same + 1}.svg" if same else f"{stem}.svg"
        width, height = view.split()[2:]
        found[name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" width="{width}" height="{height}" role="img" '
            f'aria-label="{label}"><style>{escape(asset("chart.css"), quote=False)}{_FONT}</style>{marks}</svg>\n'
        )
    return found


def write_drawings(folder: Path, html: str) -> list[Path]:
    """Writes every chart of a page into a folder.

    Raises:
      ConfigError: it cannot be written.
    """
    found = {folder / name: svg for name, svg in drawings(html).items()}
    for path, svg in found.items():
        write_page(path, svg, "--figures")
    return list(found)
