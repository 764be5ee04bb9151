"""Small files of JSON lines, read whole and checked line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quietstar_jax.errors import DataError


def read_objects(path: Path, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank.

    Args:
      kind: what the lines are, e.g. `prompts`, for messages.

    Raises:
      DataError: names the file, and the line that holds no JSON object or a text that UTF-8 cannot hold.
    """
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}. Give a file of JSON lines.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            rows = [(n, _object(line, f"{path}, line {n}")) for n, line in lines]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise DataError(f"{path} is empty: it holds no {kind}. Every line holds one JSON object.")
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{where}: a text holds \\u{ord(half):04x}, half of a character, which can be neither read as tokens nor "
            "written. Remove it or complete its pair."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON ({error}). Every line holds one JSON object.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object.")
    return row
