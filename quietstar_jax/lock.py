"""A lock that works across hosts: a file that names its holder, which updates it every few seconds (a heartbeat).

It needs neither file-system locks nor synchronized clocks, so it works on NFS, FUSE mounts and object stores. A killed
holder leaves its file: the next run takes over immediately if the process was on this machine and has ended, otherwise
after `STALE_SECONDS` without a heartbeat. A holder that was only suspended finds another name in the file and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from quietstar_jax import io
from quietstar_jax.errors import EXIT_RETRY, UserError

BEAT_SECONDS = 5.0  # between heartbeats
STALE_SECONDS = 60.0  # without a heartbeat, after which the holder counts as dead
SETTLE_SECONDS = 1.0  # after a write; the name that is then in the file has won


class LockedError(UserError):
    """Another process holds the lock. The status is 75 if the holder is on another machine: it may be the previous run,
    still saving, and a later restart may get the lock. The status is 2 if the holder is on this machine."""


class GoneError(UserError):
    """The folder of the lock no longer exists."""


class Lock:
    """Holds a lock file, and with it the folder that contains it; a context manager.

    Args:
      path: local or a URL; its folder must exist.
      name: of the folder, for messages.
      log: called with a line when this process waits for another holder or takes over from it.
    """

    def __init__(self, path: io.AnyPath, name: str, log: Callable[[str], None]):
        self.nonce = uuid.uuid4().hex
        self._path, self._name, self._log, self._url = path, name, log, io.is_url(path)
        self._beats, self._taken_by, self._started = 0, "", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._stop, self._renewing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat_until_stopped, name="lock", daemon=True)

    def __enter__(self) -> Lock:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if read(self._path)[0].get("nonce") == self.nonce:
                epath.Path(self._path).unlink()

    def check(self) -> None:
        """Checks that this process still holds the lock; call it before writes that conflict with another holder's.

        Raises:
          LockedError: another process took over.
          GoneError: the folder is gone.
        """
        try:
            self._renew()
        except GoneError:
            raise
        except Exception:
            pass  # of the disk or the network: the next write fails as well, and reports why
        if self._taken_by:
            raise LockedError(
                f"{self._name} was taken over by {self._taken_by}: this run did not renew its lock for "
                f"{STALE_SECONDS:.0f} s. It stops and writes nothing more; the other one continues."
            )

    def _acquire(self) -> None:
        """Acquires the lock; waits while it is unknown whether the current holder is alive.

        Raises:
          LockedError: the holder is alive.
        """
        watched, until = None, 0.0
        while not self._create():
            holder, mark = read(self._path)
            if mark is None:  # released in between
                continue
            if is_gone(holder):
                self._log(f"{self._name}: {describe(holder)} has ended; this run takes over.")
            elif watched is None:
                watched, until = mark, time.monotonic() + STALE_SECONDS
                self._log(
                    f"{self._name} is in use by {describe(holder)}. Waiting at most {STALE_SECONDS:.0f} s for it to "
                    "renew its lock; otherwise this run takes over."
                )
                continue
            elif mark != watched:
                error = LockedError(
                    f"{self._name} is in use by {describe(holder)}, which is running. Wait until it ends, stop it, or "
                    "choose another workdir: two runs in one workdir overwrite each other's checkpoints."
                )
                error.status = LockedError.status if holder.get("machine") == io.machine() else EXIT_RETRY
                raise error
            elif time.monotonic() < until:
                time.sleep(0.2 if not self._url else 2)
                continue
            else:
                self._log(f"{self._name}: {describe(holder)} did not renew its lock; this run takes over.")
            if read(self._path)[1] == mark and self._write():
                return
            watched = None

    def _create(self) -> bool:
        """Creates the file unless it exists; returns whether this process now holds the lock."""
        if self._url:
            return not epath.Path(self._path).exists() and self._write()
        path = Path(self._path)
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._text())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return True

    def _write(self) -> bool:
        """Writes this process into the file; returns whether it is still there after all competitors have written."""
        io.write_text(self._path, self._text())
        time.sleep(SETTLE_SECONDS)
        return read(self._path)[0].get("nonce") == self.nonce

    def _text(self) -> str:
        return json.dumps({
            "host": socket.gethostname(), "process": os.getpid(), "started": self._started, "machine": io.machine(),
            "process_started": process_start(os.getpid()), "nonce": self.nonce, "beats": self._beats,
        }) + "\n"  # fmt: skip

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(BEAT_SECONDS) and not self._taken_by:
            with contextlib.suppress(Exception):  # the next one may succeed
                self._renew()

    def _renew(self) -> None:
        """Updates the file (a heartbeat), unless it names another holder; one thread at a time."""
        with self._renewing:
            holder, mark = read(self._path)
            if mark is None:
                if self._url or Path(self._path).parent.is_dir():
                    self._create()  # only the file was removed
                else:
                    raise GoneError(
                        f"{self._name} has disappeared: nothing can be saved. Restore it, then run the same command "
                        "again."
                    )
            elif holder.get("nonce", self.nonce) != self.nonce:
                self._taken_by = describe(holder)
            elif self._url or not holder:  # a file that names no holder is written again
                self._beats += 1
                io.write_text(self._path, self._text())
            else:
                os.utime(self._path)  # needs no space on the disk


def read(path: io.AnyPath) -> tuple[dict[str, Any], Any]:
    """Returns the holder of a lock, empty if its file names none; and a mark that changes with each heartbeat, None if
    there is no file."""
    try:
        if io.is_url(path):
            text, changed = epath.Path(path).read_text(), 0
        else:
            with Path(path).open(encoding="utf-8", errors="replace") as file:  # opened: NFS then asks its server
                text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    try:
        holder = json.loads(text)
    except ValueError:
        holder = {}
    return holder if isinstance(holder, dict) else {}, (text, changed)


def describe(holder: dict[str, Any]) -> str:
    """Describes the holder, for messages."""
    if "process" not in holder:
        return "another process"
    return f"process {holder['process']} on {holder.get('host')}, started {holder.get('started')}"


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and has ended; another process may have its id by now."""
    if holder.get("machine") != io.machine() or not isinstance(holder.get("process"), int):
        return False
    process, started = holder["process"], holder.get("process_started")
    return not io.process_exists(process) or process_start(process) not in ("", started)


def process_start(process: int) -> str:
    """Start time of a process in ticks since boot; "ended" for a zombie, empty if unknown."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state in "ZX" else fields[18]
