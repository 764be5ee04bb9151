"""Speed of training: seconds and tokens per step, FLOP utilisation, memory, compilation, and waiting for data."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config
from quietstar_jax.parallel.chips import chip_of
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.flops import phase_flops, step_flops
from quietstar_jax.thoughts.settings import ThoughtSettings

_BACKEND_COMPILATION = "/jax/core/compile/backend_compile_duration"
_COMPILATION = (  # tracing, lowering, and compilation by XLA or from the compilation cache
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _BACKEND_COMPILATION,
)


SMOOTHING = 0.9  # weight of earlier steps in the recent time of a step


class Spans:
    """Spans of time of one thread, added in the order of their ends; a span within another counts once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> None:
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    def total(self) -> float:
        return sum(end - start for start, end in self._spans)


class Pace(NamedTuple):
    """Tokens of text per second, padding included, and seconds until the last step, evaluations not included."""

    tokens_per_second: float
    seconds_left: float


class SpeedMeter:
    """Measures the mean time of the steps between two records. Use as a context manager, in one thread.

    A step is dispatched while the one before it runs, so the time from the metrics of one step to those of the next is
    the time of a step, whether the device or the host is slower. Time in `leave_out` and in compilation, including
    compilation in the first step of a phase, is excluded.
    """

    def __init__(self, config: Config, architecture: Architecture):
        self._config, self._architecture = config, architecture
        self._compilations, self._compiling = 0, Spans()
        self._thread = threading.get_ident()
        self._flops = [phase_flops(config, phase, architecture) / max(phase.steps, 1) for phase in config.phases]
        self._recent = 0.0  # seconds of a step, over the latest ones; 0 = unknown
        self._restart(time.perf_counter())

    def __enter__(self) -> SpeedMeter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILATION and threading.get_ident() == self._thread:
            end = time.perf_counter()
            self._compilations += event == _BACKEND_COMPILATION
            self._compiling.add(end - duration_secs, end)
            self._left_out.add(end - duration_secs, end)

    def _restart(self, now: float) -> None:
        self._start, self._left_out, self._waited, self._steps = now, Spans(), 0.0, 0
        self._spent = 0.0  # of the time since `_start`, until the latest step

    def begin(self, phase: Phase, settings: ThoughtSettings) -> None:
        """Starts to measure a phase, or the rest of it; no step may be running."""
        self._phase, self._settings, self._recent = phase, settings, 0.0
        self._restart(time.perf_counter())

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Excludes the time in this context from the step time. No step may be running."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._left_out.add(start, time.perf_counter())

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Counts the time in this context as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def step_done(self) -> None:
        """Counts a step, whose metrics have just been read."""
        self._steps += 1
        spent = time.perf_counter() - self._start - self._left_out.total()
        seconds, self._spent = max(spent - self._spent, 1e-9), spent
        self._recent = SMOOTHING * self._recent + (1 - SMOOTHING) * seconds if self._recent else seconds

    def pace(self, step: int) -> Pace:
        """Returns the speed of the latest steps of the phase; call after `step_done`.

        Args:
          step: number of steps done. The time of a step of a later phase is that of this phase, multiplied by the ratio
            of their necessary FLOPs.
        """
        spans = list(zip(self._flops, self._config.phase_spans(), strict=True))
        now = next(flops for flops, span in spans if span.start < step <= span.end)
        left = sum(flops * max(0, span.end - max(step, span.start)) for flops, span in spans)
        tokens = self._phase.batch_size * self._config.data.sequence_length
        return Pace(tokens / self._recent, left / now * self._recent)

    def figures(self) -> dict[str, float]:
        """Returns means over the steps since the last call or the beginning of the phase; call after `step_done`.

        Returns:
          `step_time` in seconds; `tokens_per_second` of text, padding included, and in phases with thoughts
          `thought_tokens_per_second`, over all devices; `data_wait_share` of the step time; `compilations` and
          `compile_seconds` in this process; and where they are known, `mfu`, the necessary FLOPs over the peak of all
          chips, and `memory_gib`, `memory_peak_gib` of one device.
        """
        phase, settings, now = self._phase, self._settings, time.perf_counter()
        seconds = max(now - self._start - self._left_out.total(), 1e-9) / self._steps
        waited = self._waited / self._steps
        self._restart(now)
        length, device = self._config.data.sequence_length, jax.local_devices()[0]
        found = {"step_time": seconds, "tokens_per_second": phase.batch_size * length / seconds}
        if phase.thought_length:
            chains = phase.batch_size * settings.thinking_positions(length) * phase.num_thoughts
            found["thought_tokens_per_second"] = chains * phase.thought_length / seconds
        found |= {
            "data_wait_share": min(waited / seconds, 1.0),
            "compilations": self._compilations,
            "compile_seconds": self._compiling.total(),
        }
        if (chip := chip_of(device.device_kind)) is not None:
            flops = step_flops(
                self._architecture, settings, phase.batch_size, length, phase.rates, self._config.model.adapters
            ).necessary
            found["mfu"] = flops / seconds / (chip.flops * jax.device_count())
        memory = device.memory_stats() or {}
        for name, key in (("memory_gib", "bytes_in_use"), ("memory_peak_gib", "peak_bytes_in_use")):
            if key in memory:
                found[name] = memory[key] / 2**30
        return found
