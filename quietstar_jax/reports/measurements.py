"""Reads the results of `quietstar_jax.evaluate` at several steps of one or more runs, for one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.table import GROUPS, MODES, PERCENT, PLAIN
from quietstar_jax.reports.follow import short_names
from quietstar_jax.reports.runs_page import MOST_RUNS

Nested = Mapping[str, Any]
COUNTED = ("questions", "texts")


class Measurement(NamedTuple):
    """One result of `evaluate --output`.

    Attributes:
      run: short name of the model; empty for a model without steps, from which the runs are taken to have started.
      step: 0 for a model without steps.
      values: by metric and mode of `table.MODES`, with the 95 % interval: (mean, (low, high)).
      differences: by metric, with minus without thoughts: (difference, p-value or None).
    """

    run: str
    step: int
    values: dict[str, dict[str, tuple[float, tuple[float, float]]]]
    differences: dict[str, tuple[float, float | None]]


class Series(NamedTuple):
    """All measurements of one task: `about` says what was measured; they are sorted by run and step."""

    task: str
    about: str
    measurements: list[Measurement]

    @property
    def runs(self) -> list[str]:
        """The names of the runs, without the model from which they started."""
        return list(dict.fromkeys(one.run for one in self.measurements if one.run))


def read_measurements(paths: Sequence[Path]) -> list[Series]:
    """Returns the measurements by task, in the order of the files.

    Raises:
      DataError: a file is not such a result.
      ConfigError: results of a task measured different things, or the same thing twice; there are too many runs.
    """
    found = {path: _read(path) for path in dict.fromkeys(paths)}
    folders = [Path(result["model"]["checkpoint"]) for result in found.values() if result["model"]["step"] is not None]
    names = short_names(folders)
    if len(names) > MOST_RUNS:
        raise ConfigError(f"`results` are of {len(names)} runs; more than {MOST_RUNS} colours cannot be told apart.")
    by_task: dict[str, dict[Path, Nested]] = {}
    for path, result in found.items():
        by_task.setdefault(result["task"], {})[path] = result
    return [_series(task, own, names) for task, own in by_task.items()]


def _series(task: str, results: Mapping[Path, Nested], names: Mapping[Path, str]) -> Series:
    first, about = next(iter(results.items()))
    measured: dict[tuple[str, int], Measurement] = {}
    files: dict[tuple[str, int], Path] = {}
    for path, result in results.items():
        ours, theirs = _scope(about), _scope(result)
        for what in ours:
            if ours[what] != theirs[what]:
                raise ConfigError(
                    f"{first} and {path} in `results` measured {task} with different {what} ({ours[what]} and "
                    f"{theirs[what]}), so they cannot be compared. Give results of the same measurement."
                )
        step = result["model"]["step"]
        run, step = ("", 0) if step is None else (names[Path(result["model"]["checkpoint"])], step)
        at = run, step
        if at in files:
            where = f"step {step} of {run}" if run else "models without steps, of which there can be one"
            raise ConfigError(f"{files[at]} and {path} in `results` both measured {task} of {where}. Omit one of them.")
        files[at] = path
        measured[at] = Measurement(run, step, _values(result), _differences(result.get("comparison", {})))
    return Series(task, f"{about['data']}, {_count(about)}", [measured[at] for at in sorted(measured)])


def _read(path: Path) -> Nested:
    try:
        result = json.loads(path.read_text("utf-8"))
        model = result["model"]
        known = isinstance(model["checkpoint"], str) and isinstance(model["step"], int | None)
        known &= {"task", "data", "data_hash"} <= {*result} and isinstance(result["config"], dict)
        known &= all(any(name in result for name in names) for names in (MODES, COUNTED))
    except OSError as error:
        raise DataError(f"The result {path} cannot be read: {error}. Check the path.") from error
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise DataError(f"{path} is not a result of `evaluate --output`. Choose one that it wrote.")
    return dict(result)


def _count(result: Nested) -> str:
    unit = next(unit for unit in COUNTED if unit in result)
    return f"{result[unit]:,} {unit}"


def _scope(result: Nested) -> dict[str, Any]:
    """Returns what must be equal for results to be compared, by its name in a message."""
    names = ("control", "reach", "thought_length", "samples", "temperature", "window", "context", "max_length")
    settings = {name: result["config"].get(name) for name in names}
    return {"texts": str(result["data_hash"])[:12], "numbers of texts": _count(result), "settings": settings}


def _values(result: Nested) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        for label, name, value in _by_metric(result.get(mode, {})):
            if isinstance(value.get(f"{name}_interval"), list):
                found.setdefault(label, {})[mode] = value[name], tuple(value[f"{name}_interval"])
    return found


def _differences(comparison: Nested) -> dict[str, tuple[float, float | None]]:
    return {label: (value[name]["difference"], value[name]["p_value"]) for label, name, value in _by_metric(comparison)}


def _by_metric(values: Nested) -> list[tuple[str, str, Nested]]:
    """Returns (label, name, mapping that contains the name) of every metric, also of those in groups of tokens."""
    found = [(label, name, values) for name, label in (PERCENT | PLAIN).items() if name in values]
    for group, title in GROUPS.items():
        if group in values:
            found += [(f"{title}, {label}", name, value) for label, name, value in _by_metric(values[group])]
    return found
