"""Shared by all benchmarks: sizes as flags, one JSON object on the last line, and the FLOP rate of the machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Sizes = TypeVar("Sizes")


def run(
    description: str, presets: Mapping[str, Sizes], measure: Callable[[Sizes, int], dict[str, Any]], *,
    steps: int, steps_help: str,
) -> None:  # fmt: skip
    """Runs the command line of a benchmark: every field of a preset is a flag; measures, then prints.

    Args:
      presets: by name, the default first; dataclasses of one type.
      measure: (sizes, steps) -> what was measured.
      steps: default of `--steps`.
    """
    sizes: Any = next(iter(presets.values()))
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)))
    for f in dataclasses.fields(sizes):
        kind: Any = type(f.default)
        given: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, **given)
    parser.add_argument("--steps", type=int, default=steps, help=steps_help)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    changed = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(sizes)}
    chosen: Any = presets[arguments.preset]
    chosen = dataclasses.replace(chosen, **{name: value for name, value in changed.items() if value is not None})
    result = {"preset": arguments.preset, "sizes": dataclasses.asdict(chosen)} | measure(chosen, arguments.steps)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")


def matmul_rate(dtype: str) -> float:
    """FLOPs per second of a large square matrix product in this process."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
