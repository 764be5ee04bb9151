"""Notice that this run must leave its machine: SIGTERM, which is also how clusters and TPU maintenance tell of it."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed  # the store of the processes has no public name; orbax uses it as well

NOTICES = "quietstar_jax/stop/"
AHEAD = 4  # calls by which no process is ahead of another: each reads the results of the last step but one


class PreemptionNotice:
    """Listens for SIGTERM while it is entered.

    With several processes, one that hears it says so in the store that they share, with a point of the run a few calls
    ahead, which no process has reached yet; there all stop together.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._signalled = self._said = False
        self._before: Any = None

    def __enter__(self) -> PreemptionNotice:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def given(self) -> bool:
        """Whether to stop now. Every process must ask equally often."""
        self._asked += 1
        if jax.process_count() == 1:
            return self._signalled
        store: Any = distributed.global_state.client
        if self._signalled and not self._said:
            self._said = True
            store.key_value_set(f"{NOTICES}{jax.process_index()}", str(self._asked + AHEAD))
        points = [int(point) for _, point in store.key_value_dir_get(NOTICES)]
        return bool(points) and self._asked >= min(points)

    def _hear(self, number: int, frame: Any) -> None:
        self._signalled = True
