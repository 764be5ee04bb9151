"""The definition of a study: variants of one configuration, each with every seed."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.config import Config
from quietstar_jax.config_file import call_function, find_file, read_config
from quietstar_jax.errors import ConfigError
from quietstar_jax.settings import LARGEST_INTEGER, shown
from quietstar_jax.thoughts.flops import phase_flops

FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}")  # the name of a variant


@dataclass(frozen=True)
class Study:
    """Variants of a configuration, each run with every seed.

    Attributes:
      base: configuration file that all variants change.
      variants: name -> settings that differ, as on the command line: {"phases[1].steps": 0}.
      baseline: the variant that the others are compared with.
      seeds: a paired test needs at least two, and preferably more.
      metrics: names in `summary.json`.
      fronts: pairs of metrics that the page of the study draws against each other, the first on the horizontal axis.
    """

    base: str
    variants: Mapping[str, Mapping[str, Any]]
    baseline: str
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[str, ...] = ("loss_without_thoughts", "loss_with_thoughts")
    fronts: tuple[tuple[str, str], ...] = ()


def load_study(path: str) -> Study:
    """Returns the study from `get_study()` of a Python file.

    Raises:
      ConfigError: the file is missing or has no such function, or the study is inconsistent.
    """
    study = call_function(path, "get_study")
    if not isinstance(study, Study):
        raise ConfigError(f"{path}: get_study() must return a quietstar_jax.studies.study.Study.")
    problems = list(_problems(study))
    if problems:
        raise ConfigError(f"{path} cannot be run:\n" + "\n".join(f"  - {line}" for line in problems))
    return study


def _problems(study: Study) -> Iterator[str]:
    variants = study.variants if isinstance(study.variants, Mapping) else {}
    if not variants or not all(isinstance(settings, Mapping) for settings in variants.values()):
        yield f"variants is {shown(study.variants)}; it must be a mapping from names to settings"
    for name in variants:
        if not isinstance(name, str) or not FOLDER.fullmatch(name):
            yield f"a variant is named {shown(name)}; it must be letters, digits, points, dashes (it names a folder)"
    if study.baseline not in tuple(variants):
        yield f"the baseline {shown(study.baseline)} is not one of the variants {', '.join(map(str, variants))}"
    if not isinstance(study.base, str) or not find_file(study.base, "get_config"):
        yield f"base is {shown(study.base)}; it must be a configuration file"
    if not _are(study.seeds, int) or not all(0 <= seed <= LARGEST_INTEGER for seed in study.seeds):
        yield f"seeds is {shown(study.seeds)}; it must be a list of at least one whole number, 0 or more"
    if not _are(study.metrics, str):
        yield f"metrics is {shown(study.metrics)}; it must be a list of at least one name in summary.json"
    elif not _are_pairs(study.fronts, study.metrics):
        yield f"fronts is {shown(study.fronts)}; it must be a list of pairs of names in metrics"


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, tuple | list) and bool(values) and all(type(value) is kind for value in values)


def _are_pairs(values: Any, names: Any) -> bool:
    pairs = values if isinstance(values, tuple | list) else (None,)
    return all(isinstance(pair, tuple | list) and len(pair) == 2 and set(pair) <= set(names) for pair in pairs)


def settings(study: Study, variant: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Returns the settings of one run on top of the base."""
    of_run = {"workdir": str(workdir), "seed": seed, "logging.progress_bar": False, "checkpoint.keep_phase_ends": True}
    return of_run | dict(study.variants[variant])


def command(study: Study, variant: str, seed: int, workdir: Path) -> list[str]:
    """Returns the command line of one run."""
    overrides = [f"--config.{name}={value}" for name, value in settings(study, variant, seed, workdir).items()]
    return [sys.executable, "-m", "quietstar_jax.train", "--config", study.base, *overrides]


def configuration(study: Study, variant: str, seed: int, workdir: Path) -> Config:
    """Returns the configuration that the `command` of a run trains with.

    Raises:
      ConfigError: a setting of the variant is unknown or impossible.
    """
    changes = settings(study, variant, seed, workdir)
    try:
        return read_config(study.base, [(name, str(value)) for name, value in changes.items()])
    except ConfigError as error:
        raise ConfigError(f"Variant {variant!r} of the study cannot be run. {error}") from error


def steps_of_equal_flops(base: str, variant: Mapping[str, Any], phase: int) -> int:
    """Returns the steps of one phase, rounded up, for which a variant costs as many necessary FLOPs as its base.

    Args:
      base: configuration file; variant: settings that differ; phase: index of the phase whose steps are chosen.

    Raises:
      ConfigError: a setting of the variant is unknown or impossible.
    """

    def costs(changes: Mapping[str, Any]) -> list[float]:
        config = read_config(base, [(name, str(value)) for name, value in changes.items()])
        return [phase_flops(config, of_phase) for of_phase in config.phases]

    once = costs({**variant, f"phases[{phase}].steps": 1})
    return math.ceil((sum(costs({})) - sum(once)) / once[phase]) + 1


def controls(base: str, plain: Mapping[str, Any], phase: int) -> dict[str, dict[str, Any]]:
    """Returns the variants that every study of thoughts compares with: no thoughts, or others in their place.

    Args:
      base: configuration file; plain: settings that make its phases with thoughts plain language modelling; phase:
        index of the phase that plain training lengthens until it costs as many FLOPs.

    Raises:
      ConfigError: as from `steps_of_equal_flops`.
    """
    return {
        "plain_equal_tokens": dict(plain),
        "plain_equal_flops": {**plain, f"phases[{phase}].steps": steps_of_equal_flops(base, plain, phase)},
        "pause_tokens": {"thought.control": "pause"},
        "random_thoughts": {"thought.control": "random"},
        "shuffled_thoughts": {"thought.control": "shuffled"},
    }
