"""JSON files of Hugging Face folders, which may come from anyone: bounded, and without repeated names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar_jax.errors import CheckpointError, short
from quietstar_jax.hf.safetensors_file import DuplicateNamesError, file_size, unique_keys

MAX_JSON_BYTES = 100_000_000  # far larger than any config.json or index; the whole file is read into memory


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      CheckpointError: the file is missing, not regular, too large or unreadable, repeats a name, or is not an object.
    """
    try:
        size = file_size(file)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file} has {size} bytes; at most {MAX_JSON_BYTES} are read. It is not the JSON file of a model: "
                "fetch it again."
            )
        with file.open("rb") as stream:
            value = json.loads(stream.read(size).decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Give a complete Hugging Face folder.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except DuplicateNamesError as error:
        raise CheckpointError(f"{file} is ambiguous: {error}. Remove all but one of each.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({short(error, str)}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object. Fetch it again.")
    return value


def value_or(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns the value, or the default if it is missing or null."""
    value = config.get(key)
    return default if value is None else value
