"""Atomic file writes, JSON Lines and locks; no other module implements them.

Paths may be local or URLs (`etils.epath`). An object store is atomic by itself: a file appears when it is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

from absl import logging
from etils import epath

from quietstar_jax.errors import DISK, ConfigError, system_error
from quietstar_jax.settings import shown

AnyPath: TypeAlias = os.PathLike[str]  # local, or a URL of etils.epath
STORES = {"gs": "gcsfs", "s3": "s3fs"}  # URL schemes, and the package with which etils reads each
TEMPORARY = ".partial"  # suffix of a file that is being written
INCOMPLETE = ".incomplete"  # suffix of a folder that is being written
ABANDONED_SECONDS = 3600  # a file that another machine has not changed for this long has no writer


def is_url(path: AnyPath | str) -> bool:
    """Whether a path is on an object store, such as gs://."""
    return "://" in os.fspath(path)


def place(text: str, name: str) -> Any:
    """Converts the text of a user to a `pathlib.Path`, or to an etils path for a URL of an object store.

    Args:
      name: of the setting or flag, for messages.

    Raises:
      ConfigError: the scheme is unknown, its package is missing, or the text cannot be a path.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    scheme = match[1] if match else ""
    if scheme in STORES:
        if not re.match(rf"{scheme}://[^/]+", text):
            raise ConfigError(f"{name} {shown(text)} has no bucket. Write {scheme}://BUCKET/FOLDER.")
        packages = ("tensorflow", STORES[scheme])  # etils reads with either
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ConfigError(f"{name} {shown(text)} needs the package {STORES[scheme]}: pip install {STORES[scheme]}.")
        return epath.Path(text)
    address = urllib.parse.urlsplit(text) if scheme == "file" else None
    if scheme and (address is None or address.netloc not in ("", "localhost")):
        raise ConfigError(
            f"{name} {shown(text)}: {scheme}: is not a supported scheme. Give a folder, file:///FOLDER, "
            f"{' or '.join(f'{store}://BUCKET/FOLDER' for store in STORES)}."
        )
    try:
        path = Path(urllib.parse.unquote(address.path) if address else text).expanduser()
        if "\0" in str(path):
            raise ValueError("it contains a NUL byte")
    except (RuntimeError, ValueError) as error:  # RuntimeError: no such user
        raise ConfigError(f"{name} {shown(text)} cannot be a path: {error}.") from error
    if path.absolute().parts[1:2] in (("gs",), ("s3",), ("az",), ("hf",)):  # etils reads it as a URL
        raise ConfigError(
            f"{name} {shown(text)}: this top-level folder is mistaken for a URL of an object store. Choose another."
        )
    return path


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path` at the end, or removes it after an exception.

    The folder must exist. A symbolic link is kept, and the file that it points to is replaced.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "file"
            yield temporary
            with temporary.open("rb") as source, epath.Path(path).open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    target = Path(os.path.realpath(path))
    temporary = _temporary(target.parent, f".{_short(target.name)}.", TEMPORARY)
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system supports fsync on a folder
        _to_disk(target.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside the local `path`, which must not exist; renames it at the end, or removes it.

    The temporary folder of a killed process is removed by the next process that creates the same `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, f"{_short(path.name)}.", INCOMPLETE)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _to_disk(file)
        _to_disk(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # not every file system supports fsync on a folder
        _to_disk(path.parent)


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: AnyPath, value: Any) -> None:
    """Writes a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_lines(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the objects of a JSON Lines file, in order; an empty list if the file does not exist.

    Lines that hold no JSON object are skipped with a warning. An incomplete last line is skipped without a warning: its
    writer was killed.
    """
    file = epath.Path(path)
    if not file.exists():
        return []
    *lines, last = file.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    broken = []
    for number, line in enumerate([*lines, last], start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None and number <= len(lines):
            broken.append(number)
    if broken:
        logging.warning("%s: line %s is not a JSON object and is ignored.", path, ", ".join(map(str, broken)))
    return rows


class JsonLinesWriter:
    """Appends to a JSON Lines file; a context manager.

    Each line is written to a local file immediately. An object store cannot append: the whole file is rewritten, at
    most every `every_seconds`, in `flush` and at the end.
    """

    def __init__(self, path: AnyPath, every_seconds: float = 30):
        self._path, self._every, self._written = epath.Path(path), every_seconds, time.monotonic()
        self._file: IO[bytes] | None = None
        if is_url(path):
            self._text = self._path.read_bytes() if self._path.exists() else b""
            self._text = self._text[: self._text.rfind(b"\n") + 1]
            return
        self._file = Path(path).open("a+b")  # noqa: SIM115 (closed by `close`)
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # an incomplete line: its writer was killed

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes all lines to durable storage and closes the file."""
        self.flush()
        if self._file:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        line = json.dumps(row).encode() + b"\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > self._every:
            self.flush()

    def flush(self) -> None:
        """Writes all lines to durable storage."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        else:
            self._path.write_bytes(self._text)
            self._written = time.monotonic()


@contextlib.contextmanager
def folder_to_write(path: AnyPath) -> Iterator[Path]:
    """Yields a local folder to write files to: `path`, or one whose files are then copied to the object store."""
    if not is_url(path):
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for item in Path(folder).iterdir():
            (epath.Path(path) / item.name).write_bytes(item.read_bytes())


@contextlib.contextmanager
def folder_to_read(path: AnyPath) -> Iterator[Path]:
    """Yields a local folder with the files of `path`: `path` itself, or a copy of the files in the object store."""
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for item in epath.Path(path).iterdir():
            (Path(folder) / item.name).write_bytes(item.read_bytes())
        yield Path(folder)


def lock_file(file: IO[bytes], path: Path) -> None:
    """Locks an open local file against other processes until it is closed.

    Raises:
      ConfigError: another process holds the lock, or held it and has renamed the file; or the file system has no
        locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"Another process is writing {path}. Wait until it ends, or choose another file.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be locked ({error}). Choose a file on another file system.") from error
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise ConfigError(f"Another process was writing {path} and has finished. Check this file.")


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[int]:
    """Holds a local lock file, after waiting for it if necessary; yields its descriptor.

    A process that inherits the descriptor holds the lock as well, until it ends.

    Args:
      busy: called before waiting; may raise.
    """
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def _temporary(folder: Path, start: str, end: str) -> Path:
    """Returns a new name that identifies its writer; removes what dead writers of the same path have left."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            writer = re.fullmatch(re.escape(start) + r"(\w+)-(\d+)-\w{8}" + re.escape(end), name)
            if not writer:
                continue
            path = folder / name
            if not process_exists(int(writer[2])) if writer[1] == machine() else _is_old(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return folder / f"{start}{machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{end}"


def _is_old(path: Path) -> bool:
    changed = max(item.stat().st_mtime for item in (path, *path.rglob("*")))
    return time.time() - changed > ABANDONED_SECONDS


def _short(name: str) -> str:
    return name.encode()[:100].decode(errors="ignore")


def process_exists(process: int) -> bool:
    """Whether this machine has a process with this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@functools.cache
def machine() -> str:
    """Identifies the scope in which process ids are unique: this host since its boot, and this container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A write to a folder that existed before can also fail because the disk, or the folder, is gone or was replaced.
_WRITE_FAILED = (
    *DISK, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EEXIST,
)  # fmt: skip


def disk_error(error: BaseException) -> str | None:
    """Returns the disk error that caused a failed write, even if a library has converted it to another error.

    None if the error was not caused by a disk.
    """
    return next(filter(None, (system_error(cause, _WRITE_FAILED) for cause in _causes(error))), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
