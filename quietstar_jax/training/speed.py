"""Speed of training: seconds and tokens per step, FLOP utilisation, memory, compilation, and waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config, Phase
from quietstar_jax.parallel.chips import chip_of
from quietstar_jax.thoughts.flops import step_flops
from quietstar_jax.thoughts.settings import ThoughtSettings

_COMPILATION = "/jax/core/compile/backend_compile_duration"


class SpeedMeter:
    """Measures the time between the metrics of two steps. Use as a context manager.

    A step is dispatched while the one before it runs, so the time from the metrics of one step to those of the next is
    the time of a step, whichever of device and host is slower. Evaluations and checkpoints are left out.
    """

    def __init__(self, config: Config, architecture: Architecture):
        self._config, self._architecture = config, architecture
        self._compilations: list[float] = []  # seconds of each
        self._last = time.perf_counter()
        self._left_out = self._waited = 0.0

    def __enter__(self) -> SpeedMeter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION:
            self._compilations.append(duration_secs)

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Does not count the time in this context as part of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - start

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time in this context as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def step_done(self, phase: Phase, settings: ThoughtSettings) -> dict[str, float]:
        """Returns the figures of the step whose metrics have just been read.

        Returns:
          `step_time` in seconds; `tokens_per_second` of text and `thought_tokens_per_second`, over all devices;
          `data_wait_share` of the step time; `compilations` and `compile_seconds` since the start; and where they are
          known, `mfu`, the necessary FLOPs over the peak of all chips, and `memory_gib`, `memory_peak_gib` of device 0.
        """
        now = time.perf_counter()
        seconds = max(now - self._last - self._left_out, 1e-9)
        waited, self._last, self._left_out, self._waited = self._waited, now, 0.0, 0.0
        length, device = self._config.data.sequence_length, jax.local_devices()[0]
        chains = phase.batch_size * settings.thinking_positions(length) * phase.num_thoughts
        found = {
            "step_time": seconds,
            "tokens_per_second": phase.batch_size * length / seconds,
            "thought_tokens_per_second": chains * phase.thought_length / seconds,
            "data_wait_share": min(waited / seconds, 1.0),
            "compilations": len(self._compilations),
            "compile_seconds": sum(self._compilations),
        }
        if (chip := chip_of(device.device_kind)) is not None:
            flops = step_flops(self._architecture, settings, phase.batch_size, length, phase.rates).necessary
            found["mfu"] = flops / seconds / (chip.flops * jax.device_count())
        memory = device.memory_stats() or {}
        for name, key in (("memory_gib", "bytes_in_use"), ("memory_peak_gib", "peak_bytes_in_use")):
            if key in memory:
                found[name] = memory[key] / 2**30
        return found
