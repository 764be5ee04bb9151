"""Signals that ask a run to stop: SIGTERM (cluster, TPU maintenance), Ctrl-C (user), SIGHUP (closed terminal)."""

from __future__ import annotations

import contextlib
import os
import signal
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed  # the store of the processes has no public name; orbax uses it as well

from quietstar_jax.signals import listening

NOTICES = "quietstar_jax/stop/"
AHEAD = 4  # no process is this many calls ahead of another: each reads the results of the last step but one


class PreemptionNotice:
    """Context manager that records these signals; a second Ctrl-C ends the process immediately.

    With several processes, a process that receives a signal writes it to their shared store, together with a point of
    the run a few calls ahead, which no process has reached yet. All processes stop at this point.
    """

    def __init__(self) -> None:
        self._asked = self._signal = 0
        self._shared = False
        self._listening = contextlib.ExitStack()
        self._terminals: list[int] = []

    def __enter__(self) -> PreemptionNotice:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._listening.enter_context(listening(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()

    def signal_now(self) -> int:
        """Returns the signal for which to stop now, or 0. Every process must call this equally often."""
        self._asked += 1
        if jax.process_count() == 1:
            return self._signal
        store: Any = distributed.global_state.client
        if self._signal and not self._shared:
            self._shared = True
            store.key_value_set(f"{NOTICES}{jax.process_index()}", f"{self._asked + AHEAD} {self._signal}")
        notices = [tuple(map(int, notice.split())) for _, notice in store.key_value_dir_get(NOTICES)]
        due = [number for point, number in notices if point <= self._asked]
        return signal.SIGINT if signal.SIGINT in due else max(due, default=0)

    def _hear(self, number: int) -> None:
        if self._signal != signal.SIGINT:
            self._signal = number
        if number == signal.SIGHUP:  # writing to a terminal that is gone is an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(nowhere, descriptor)
        elif number == signal.SIGINT and 2 in self._terminals:
            os.write(2, b"\nStopping after this step, which is then saved. Ctrl-C again ends immediately.\n")
