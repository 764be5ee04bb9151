"""One self-contained HTML page, which loads nothing and forbids the browser to load anything."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from quietstar_jax.errors import ConfigError
from quietstar_jax.io import write_text

# A browser that follows this policy fetches nothing, whatever the page contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(title: str, body: str, data: Mapping[str, Any] | None = None, *, reload_seconds: int = 0) -> str:
    """Returns the page.

    Args:
      body: HTML with escaped texts; data: for the page's script, which is included only with data.
      reload_seconds: time after which the browser loads the page again, and keeps its place; 0 = never.
    """
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else ""
    script = ""
    if data is not None:
        code = asset("panel.js") + asset("page.js")
        script = f'<script type="application/json" id="data">{for_script(data)}</script><script>{code}</script>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'{reload}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{asset('chart.css')}{asset('page.css')}</style></head>\n<body><main>{body}</main>{script}</body></html>\n"
    )


def visible(text: str) -> str:
    """Replaces invisible characters with signs: line breaks `↵`, tabs `→`, control and direction characters."""
    out = []
    for character in text:
        code = ord(character)
        if character == "\n":
            out.append("↵")
        elif character == "\t":
            out.append("→")
        elif code < 0x20:
            out.append(chr(0x2400 + code))
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            out.append(f"⟨U+{code:04X}⟩")
        else:
            out.append(character)
    return "".join(out)


def for_script(value: Any) -> str:
    """Encodes JSON for a script element, which no text in it can close."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def figure(title: str, drawing: str, caption: str) -> str:
    """Returns a drawing with a title and a caption, which are escaped here."""
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{drawing}{said}</figure>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of texts, which are escaped here."""

    def cells(name: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f"<{name}>{escape(text)}</{name}>" for text in texts) + "</tr>"

    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    return f'<div class="scroll"><table class="data">{"".join(lines)}</table></div>'


def tiles(items: list[tuple[str, str]]) -> str:
    """Returns tiles of key figures, from pairs (figure, description)."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in items
    )
    return f'<div class="tiles">{inner}</div>'


def write_page(path: Path, html: str, flag: str = "--output") -> None:
    """Writes the file completely or not at all; `flag` is the flag of its path, for messages.

    Raises:
      ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error}. Choose another file.") from error


def asset(name: str) -> str:
    """Returns the text of a file of this package."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")
