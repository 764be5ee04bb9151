"""The work directory of a run: created, locked, and checked to be visible to every process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from quietstar_jax import io
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError, UserError
from quietstar_jax.lock import Lock, read
from quietstar_jax.parallel import processes

LOCK = "run.lock"
SHARED_SECONDS = 60.0  # time for all processes to see what the first one wrote; file systems cache missing files


class Workdir:
    """A locked work directory.

    Attributes:
      path: a `pathlib.Path`, or an `etils.epath.Path` for a URL.
    """

    def __init__(self, path: Any, lock: Lock | None):
        self.path, self._lock = path, lock

    def check(self) -> None:
        """Checks the lock; call it before writing. Does nothing on processes that do not hold the lock.

        Raises:
          LockedError: another run has taken the lock.
          GoneError: the folder has disappeared.
        """
        if self._lock:
            self._lock.check()


@contextlib.contextmanager
def open_workdir(config: Config) -> Iterator[Workdir]:
    """Creates the work directory if necessary, and locks it from the first process of the run.

    Raises:
      ConfigError: the folder cannot be written to, or the processes do not share it.
      LockedError: another run holds the lock.
    """
    path = io.place(config.workdir, "config.workdir")
    name = f"config.workdir {path}"
    with contextlib.ExitStack() as stack:
        lock: Lock | None = None

        def take() -> str:
            nonlocal lock
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(Lock(path / LOCK, name, _log))
            except UserError:
                raise
            except Exception as error:  # from any file system: a file of that name, no permission, full disk, no bucket
                raise ConfigError(
                    f"{name} cannot be written: {error}. Choose another folder, or free disk space there."
                ) from error
            return lock.nonce

        nonce = processes.from_first(take)
        seen = processes.is_primary() or _sees(path, nonce)
        blind = processes.gather("" if seen else f"{socket.gethostname()} (process {jax.process_index()})")
        if any(blind):
            raise ConfigError(
                f"{name} is not the same folder in all processes: {', '.join(filter(None, blind))} did not see within "
                f"{SHARED_SECONDS:.0f} s what process 0 wrote there. Every process writes its part of a checkpoint: "
                "give a folder that all hosts share (NFS, Lustre, gs://)."
            )
        yield Workdir(path, lock)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sees(path: Any, nonce: str) -> bool:
    """Whether the lock of the first process becomes visible to this process in time."""
    until = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(Exception):
            if not io.is_url(path):
                os.listdir(path)  # makes NFS refresh its cache
            if read(path / LOCK)[0].get("nonce") == nonce:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
