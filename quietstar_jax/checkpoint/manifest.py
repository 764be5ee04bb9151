"""The manifest of a saved step: size and CRC-32C of each file, written last and checked before the files are read.

`manifest.json` is stored in the folder of the step, so that it is moved, copied and removed together with the step:

    {"version": 1, "step": 24, "config": SHA-256 of config/metadata, "files": {PATH: [BYTES, CRC-32C]}, "manifest": CRC}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
from etils import epath

NAME = "manifest.json"
CONFIG = "config/metadata"  # the record of the configuration
PROGRESS = "progress/metadata"  # {"step": number}
CHUNK_BYTES = 2**22
THREADS = 8
_UNREADABLE = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, getattr(errno, "EUCLEAN", errno.EIO))


def write(folder: epath.Path) -> None:
    """Writes the manifest of a folder whose other files are all written.

    Raises:
      OSError: a file cannot be read back, or the manifest cannot be written.
    """
    paths = sorted(files(folder))
    sums = checksums([folder / path for path in paths])
    content = {
        "version": 1,
        "step": _stored_step(folder),
        "config": _config_hash(folder) if CONFIG in paths else "",
        "files": dict(zip(paths, sums, strict=True)),
    }
    (folder / NAME).write_bytes(_encode(content))


def checksums(paths: Sequence[epath.Path]) -> list[list[int]]:
    """Returns size and CRC-32C of each file, all of which are read.

    Raises:
      OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_checksum, paths))


def exists(folder: epath.Path) -> bool:
    """Whether a step has a manifest. Only steps of earlier versions have none."""
    return (folder / NAME).exists()


def has_other_config(folder: epath.Path) -> bool:
    """Whether the configuration of a step differs from the one in its manifest, or either file cannot be read.

    False for a readable configuration without a manifest.
    """
    try:
        content = _decode((folder / NAME).read_bytes()) if exists(folder) else {"config": _config_hash(folder)}
        return content is None or content["config"] != _config_hash(folder)
    except OSError:
        return True


def damage(folder: epath.Path, step: int, *, leave_out: Collection[str] = (), part: int = 0, parts: int = 1) -> str:
    """Describes the damage of a saved step as `FILE: reason`; empty if it has none.

    For a step without a manifest, only the stored step number is compared.

    Args:
      folder: the folder of the step.
      step: the step number.
      leave_out: items, such as `opt_state`, that the caller does not read.
      part, parts: check every `parts`-th file, starting at number `part`, so that several processes share the work.

    Raises:
      OSError: a file exists but cannot be read now, for example without permission. This is not a sign of damage.
    """
    try:
        if not exists(folder):
            stored = _stored_step(folder)
            return "" if stored == step else f"{PROGRESS}: it is of step {stored}, not {step}"
        content = _decode((folder / NAME).read_bytes())
        if content is None:
            return f"{NAME}: it is damaged"
        if content["step"] != step:
            return f"{NAME}: it is of step {content['step']}, not {step}"
        read = [(path, *entry) for path, entry in content["files"].items() if path.partition("/")[0] not in leave_out]
        with ThreadPoolExecutor(THREADS) as pool:
            problems = [line for line in pool.map(lambda file: _compare(folder, *file), read[part::parts]) if line]
        if not problems and CONFIG in content["files"] and _config_hash(folder) != content["config"]:
            return f"{CONFIG}: it differs from the configuration in the manifest"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{PROGRESS}: {error}"
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return f"{_relative(folder, error)}: {error.strerror}"
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") if problems else ""


def _compare(folder: epath.Path, path: str, size: int, checksum: int) -> str:
    file = folder / path
    if not file.exists():
        return f"{path}: it is missing"
    if not file.is_file():
        return f"{path}: it is not a file"
    if (length := file.stat().length) != size:
        return f"{path}: it has {length:,} bytes, not {size:,}"
    try:
        same = _checksum(file) == [size, checksum]
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return f"{path}: {error.strerror}"
    return "" if same else f"{path}: its bytes have changed (checksum)"


def _checksum(file: epath.Path) -> list[int]:
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size += len(chunk)
            checksum = google_crc32c.extend(checksum, chunk)
    return [size, checksum]


def files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the relative paths of all files below a folder, each with `prefix` in front."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _stored_step(folder: epath.Path) -> int:
    progress = json.loads((folder / PROGRESS).read_bytes())
    return int(progress["step"])


def _config_hash(folder: epath.Path) -> str:
    return hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()


def _encode(content: dict[str, Any]) -> bytes:
    text = json.dumps(content)
    return json.dumps(content | {"manifest": google_crc32c.value(text.encode())}).encode()


def _decode(text: bytes) -> dict[str, Any] | None:
    """Returns the content, or None if any byte differs from what `_encode` wrote."""
    try:
        content: dict[str, Any] = json.loads(text)
        del content["manifest"]
        return content if _encode(content) == text else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _relative(folder: epath.Path, error: OSError) -> str:
    name = str(error.filename or folder)
    return os.path.relpath(name, folder) if name.startswith(str(folder)) else name
