"""Notice that this run must leave its machine: SIGTERM, which is also how clusters and TPU maintenance tell of it."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptionNotice:
    """Listens for SIGTERM while it is entered.

    With several processes, JAX's coordination service listens on each of them, and makes all agree on the point of the
    run at which they hear of it.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._signalled = False
        self._before: Any = None

    def __enter__(self) -> PreemptionNotice:
        alone = not jax.distributed.is_initialized()
        if alone and threading.current_thread() is threading.main_thread():
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
        return self._signalled or multihost_utils.reached_preemption_sync_point(self._asked)

    def _hear(self, number: int, frame: Any) -> None:
        self._signalled = True
