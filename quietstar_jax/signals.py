"""Handles Ctrl-C, SIGTERM and SIGHUP in commands. Imports nothing that is slow to load."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SCRIPT = "quietstar"  # the name of the console script
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAMES: dict[int, str] = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "SIGHUP: the terminal was closed",
}
SAME_PRESS = 0.5  # seconds; a launcher may forward the Ctrl-C that the terminal has already sent
_listening = False


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end. Not an `Exception`, so error handlers do not catch it."""

    def __init__(self, number: int):
        super().__init__(f"Stopped by {NAMES[number]}.")
        self.status = 128 + number


@contextlib.contextmanager
def listening(hear: Callable[[int], None]) -> Iterator[None]:
    """Calls `hear(number)` for each signal, in the main thread; does nothing in another thread.

    A second Ctrl-C ends the process immediately, even while the main thread waits for compiled code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not _listening:
            stack.enter_context(_ends_at_second())
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before = signal.signal(number, lambda number, frame: hear(number))
            stack.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        yield


@contextlib.contextmanager
def _ends_at_second() -> Iterator[None]:
    global _listening
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    _listening = True
    try:
        yield
    finally:
        _listening = False
        signal.set_wakeup_fd(before)
        writer.close()


def _watch(received: socket.socket) -> None:
    """Ends the process at the second SIGINT. Every signal arrives as a byte, whatever the main thread is doing."""
    first: float | None = None
    with received:
        while numbers := received.recv(64):
            now = time.monotonic()
            if signal.SIGINT not in numbers:
                continue
            if first is not None and now - first > SAME_PRESS:
                end_now(128 + signal.SIGINT)
            first = now if first is None else first


def end_now(status: int, line: str = "Ended immediately.") -> None:
    """Ends this process and its workers without any cleanup."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
    for worker in sys.modules["multiprocessing"].active_children() if "multiprocessing" in sys.modules else ():
        worker.kill()
    os._exit(status)


def end_quietly(status: int) -> None:
    """Makes any further signal end the process with this status; call it when the process is about to exit."""

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)

    for number in SIGNALS:
        signal.signal(number, end)


def while_importing(package: str) -> None:
    """Makes Ctrl-C end `python -m PACKAGE.COMMAND` with one line during its imports, which last seconds.

    The terminal sends Ctrl-C to the worker processes of a command too; they ignore it, and the command ends them.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing")
    if multiprocessing and multiprocessing.parent_process() is not None:
        if sys.argv and (sys.argv[0].startswith(package) or os.path.basename(sys.argv[0]) == SCRIPT):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif sys.argv[:1] == ["-m"]:  # while Python looks for the module
        signal.signal(signal.SIGINT, lambda number, frame: end_now(128 + number, "Stopped by Ctrl-C."))
