"""Records a window of optimizer steps with the profiler of JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from quietstar_jax.config import LoggingConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.io import is_url


class StepProfile:
    """Records the steps `logging.profile_steps` into `profile` in the work directory. Use as a context manager.

    A run that begins, resumes or ends within the window records the part of the window that it trains.

    Args:
      silent: record nothing; set on all processes but one.

    Raises:
      ConfigError: the work directory is a URL.
    """

    def __init__(self, workdir: Path, config: LoggingConfig, *, silent: bool = False):
        if config.profile_steps and is_url(workdir):
            raise ConfigError(
                f"config.logging.profile_steps is {config.profile_steps}, which needs a local workdir. Set it to (), "
                f"or choose a local folder instead of {workdir}."
            )
        self._folder, self._window, self._silent = workdir / "profile", config.profile_steps, silent
        self._running = False

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def starts_at(self, step: int) -> bool:
        """Whether recording must start before this step."""
        return not self._running and bool(self._window) and self._window[0] <= step <= self._window[1]

    def stops_at(self, step: int) -> bool:
        """Whether recording must stop after this step."""
        return self._running and step >= self._window[1]

    def start(self, state: Any) -> None:
        """Starts to record when `state`, the result of the step before, is complete."""
        jax.block_until_ready(state)
        self._running = True
        if not self._silent:
            jax.profiler.start_trace(self._folder)

    def stop(self, state: Any) -> None:
        """Stops recording when `state`, the result of the last step, is complete, and writes the files."""
        jax.block_until_ready(state)
        self._stop()

    def _stop(self) -> None:
        if self._running and not self._silent:
            jax.profiler.stop_trace()
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks the work dispatched in this context as one step; profile viewers group the time by step."""
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
