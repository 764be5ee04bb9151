"""Many runs of one configuration, and what their differences are worth."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.errors import ConfigError


@dataclass(frozen=True)
class Study:
    """Variants of a configuration, each run with every seed.

    Attributes:
      base: configuration file that all start from.
      variants: name -> settings that differ, as on the command line: {"phases[1].steps": 0}.
      baseline: the variant that the others are compared with.
      seeds: at least two, so that there is something to compare.
      metrics: names in `summary.json`.
    """

    base: str
    variants: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[str, ...] = ("loss_without_thoughts", "loss_with_thoughts")


def load_study(path: str) -> Study:
    """The `get_study()` of a Python file.

    Raises:
      ConfigError: it is missing, has no such function, or does not fit together.
    """
    if not Path(path).is_file():
        raise ConfigError(f"There is no study {path!r}. Give a Python file with a function get_study().")
    found = runpy.run_path(path).get("get_study")
    study = found() if callable(found) else None
    if not isinstance(study, Study):
        raise ConfigError(f"{path} has no function get_study() that returns a quietstar_jax.studies.study.Study.")
    if study.baseline not in study.variants:
        raise ConfigError(
            f"{path}: the baseline {study.baseline!r} is none of the variants {', '.join(study.variants)}."
        )
    if not study.seeds or not Path(study.base).is_file():
        raise ConfigError(f"{path}: it takes at least one seed, and a configuration file as base (got {study.base!r}).")
    return study


def command(study: Study, variant: str, seed: int, workdir: Path) -> list[str]:
    """The command line of one run."""
    settings = {"workdir": str(workdir), "seed": seed, "logging.progress_bar": False} | dict(study.variants[variant])
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "quietstar_jax.train", "--config", study.base, *overrides]


def run_study(study: Study, root: Path, say: Callable[[str], None]) -> dict[str, dict[int, dict[str, Any]]]:
    """Runs what has not been run yet, one after another, each in a process of its own.

    A study that is started again skips finished runs and goes on in the middle of an unfinished one. A run that fails
    is reported, and the others still run.

    Returns:
      variant -> seed -> `summary.json` of every finished run.
    """
    results: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in study.variants}
    for seed in study.seeds:
        for variant in study.variants:
            workdir = root / variant / f"seed_{seed}"
            summary = workdir / "summary.json"
            if not summary.exists():
                workdir.mkdir(parents=True, exist_ok=True)
                say(f"{variant}, seed {seed}: {workdir}")
                with (workdir / "log.txt").open("a", encoding="utf-8") as log:
                    ended = subprocess.run(
                        command(study, variant, seed, workdir), stdout=log, stderr=subprocess.STDOUT, check=False
                    )
                if ended.returncode or not summary.exists():
                    say(f"{variant}, seed {seed} FAILED with status {ended.returncode}; see {workdir / 'log.txt'}")
                    continue
            results[variant][seed] = json.loads(summary.read_text("utf-8"))
    return results
