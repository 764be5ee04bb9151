"""What a study is: variants of one configuration, each with every seed."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.config import Config, from_config_dict
from quietstar_jax.errors import ConfigError


@dataclass(frozen=True)
class Study:
    """Variants of a configuration, each run with every seed.

    Attributes:
      base: configuration file that all start from.
      variants: name -> settings that differ, as on the command line: {"phases[1].steps": 0}.
      baseline: the variant that the others are compared with.
      seeds: at least two, so that there is something to compare; a paired test wants more.
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


def settings(study: Study, variant: str, seed: int, workdir: Path) -> dict[str, Any]:
    """What one run sets on top of the base."""
    own = {"workdir": str(workdir), "seed": seed, "logging.progress_bar": False, "checkpoint.keep_phase_ends": True}
    return own | dict(study.variants[variant])


def command(study: Study, variant: str, seed: int, workdir: Path) -> list[str]:
    """The command line of one run."""
    overrides = [f"--config.{name}={value}" for name, value in settings(study, variant, seed, workdir).items()]
    return [sys.executable, "-m", "quietstar_jax.train", "--config", study.base, *overrides]


def configuration(study: Study, variant: str, seed: int, workdir: Path) -> Config:
    """What that command line trains with.

    Raises:
      ConfigError: a setting of the variant is unknown or impossible.
    """
    make = runpy.run_path(study.base).get("get_config")
    if not callable(make):
        raise ConfigError(f"The base {study.base} of the study has no function get_config().")
    config = make()
    try:
        for name, value in settings(study, variant, seed, workdir).items():
            _set(config, name, value)
        return from_config_dict(config)
    except ConfigError as error:
        raise ConfigError(f"Variant {variant!r} of the study cannot be run. {error}") from error


def _set(config: Any, name: str, value: Any) -> None:
    """Sets a field by its name on the command line: `phases[1].rates.decoder`."""
    *path, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", name)]
    try:
        for part in path:
            config = config[part]
        config[last]  # a setting must be there before it is set
        config[last] = value
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"config.{name} cannot be set to {value!r}: {' '.join(map(str, error.args))}") from error
