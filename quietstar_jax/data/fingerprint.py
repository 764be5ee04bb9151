"""What is cheap to know of a source's content, so that a run notices when it is resumed on other data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar_jax.data.sources.common import Piece

SAMPLES = 16  # places read of each file ...
ALL_SAMPLES = 1 << 14  # ... and of all files of a source, at least one of each
MARK = 8  # hexadecimal digits kept of each file
NAMED = 5  # changed files that a message names

Fingerprint = dict[str, Any]  # JSON-able: source, documents, pieces, bytes, marks


def fingerprint(spec: str, pieces: Sequence[Piece], documents: int | None = None) -> Fingerprint:
    """Sizes and marks of the pieces, in order; a few places of each file are read."""
    samples = min(SAMPLES, max(1, ALL_SAMPLES // max(len(pieces), 1)))
    marks = [hashlib.sha256(piece.identity(samples)).hexdigest()[:MARK] for piece in pieces]
    return {
        "source": spec,
        **({} if documents is None else {"documents": documents}),
        "pieces": len(pieces),
        "bytes": sum(piece.size for piece in pieces),
        "marks": "".join(marks),
    }


def changes(saved: Mapping[str, Any], now: Fingerprint, pieces: Sequence[Piece]) -> list[str]:
    """Lines that say how a source differs from what it was; none where it does not.

    Args:
      pieces: of now.
    """
    kept = [name for name in ("documents", "pieces", "bytes", "marks") if saved.get(name) != now.get(name)]
    if not kept:
        return []
    before, after = str(saved.get("marks")), now["marks"]
    if saved.get("pieces") != now["pieces"] or len(before) != len(after):
        said = f"{_said(saved)} -> {_said(now)}"
    else:
        spots = range(0, len(after), MARK)
        changed = [pieces[i // MARK].name for i in spots if before[i : i + MARK] != after[i : i + MARK]]
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        said = f"other content in {', '.join(changed[:NAMED])}{more} ({_said(saved)} -> {_said(now)})"
    return [f"{now['source']}: {said}"]


def _said(found: Mapping[str, Any]) -> str:
    return f"{found.get('pieces')} files, {found.get('bytes')} bytes, {found.get('documents')} documents"
