"""Cheap fingerprints of a source's content, which detect that a run resumes on other data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from quietstar_jax.data.sources.common import Piece

SAMPLES = 16  # samples read from each file ...
ALL_SAMPLES = 1 << 14  # ... and from all files of a source, at least one from each
MARK = 8  # hexadecimal digits stored per file
NAMED = 5  # maximum number of changed files in a message

Fingerprint = dict[str, Any]  # JSON-serializable: source, documents, pieces, bytes, marks


def fingerprint(spec: str, pieces: Sequence[Piece], documents: int | None = None) -> Fingerprint:
    """Returns total size and marks (short hashes) of the pieces, in order; reads a few samples of each file."""
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
    """Returns lines that describe how a source has changed; empty if it has not.

    Args:
      saved, now: the saved and the current fingerprint.
      pieces: the current pieces.
    """
    kept = [name for name in ("documents", "pieces", "bytes", "marks") if saved.get(name) != now.get(name)]
    if not kept:
        return []
    before, after = str(saved.get("marks")), now["marks"]
    if saved.get("pieces") != now["pieces"] or len(before) != len(after):
        change = f"{_summary(saved)} -> {_summary(now)}"
    else:
        spots = range(0, len(after), MARK)
        changed = [pieces[i // MARK].name for i in spots if before[i : i + MARK] != after[i : i + MARK]]
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        change = f"other content in {', '.join(changed[:NAMED])}{more} ({_summary(saved)} -> {_summary(now)})"
    return [f"{now['source']}: {change}"]


def _summary(fingerprint: Mapping[str, Any]) -> str:
    return (
        f"{fingerprint.get('pieces')} files, {fingerprint.get('bytes')} bytes, {fingerprint.get('documents')} documents"
    )
