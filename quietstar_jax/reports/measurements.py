"""Reads the results of `quietstar_jax.evaluate` at several steps of one or more runs, for one page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.options import Options
from quietstar_jax.evals.table import GROUPS, MODES, PERCENT, PLAIN
from quietstar_jax.evals.tasks import TASKS, TEXT
from quietstar_jax.methods.thinking import ALWAYS
from quietstar_jax.reports.follow import run_names

Nested = Mapping[str, Any]
COUNTED = ("questions", "texts")
# Options that may differ between results that are compared: they select the model, or do not change the figures.
FREE = {"checkpoint", "step", "revision", "data", "limit", "max_length", "batch_size", "prefix_attention", "thoughts",
        "top", "perturb", "think_front", "records", "against", "quiet"}  # fmt: skip
OF_THOUGHTS = ("think", "control", "reach", "thought_length")  # compared only between results with thoughts
DEFAULTS = {
    field.name: json.loads(json.dumps(field.default))  # as in a file
    for field in dataclasses.fields(Options)
    if field.name not in FREE and field.default is not dataclasses.MISSING
} | {"reach": 1}  # results have the reach that was used


class Value(NamedTuple):
    """A figure with its 95 % interval, if it has one; `p_value` is that of a difference."""

    value: float
    interval: Sequence[float] | None
    p_value: float | None = None


class Measurement(NamedTuple):
    """One result of `evaluate --output`.

    Attributes:
      run: short name of the run; empty for a model without steps, from which the runs are taken to have started.
      step: 0 for a model without steps; name: of the model, for readers.
      values: by metric and mode of `table.MODES`; differences: by metric, with minus without thoughts.
    """

    run: str
    step: int
    name: str
    values: dict[str, dict[str, Value]]
    differences: dict[str, Value]


class Series(NamedTuple):
    """All measurements of one task, sorted by run and step; `about` says what was measured."""

    task: str
    about: str
    measurements: list[Measurement]


def read_measurements(paths: Sequence[Path]) -> list[Series]:
    """Returns the measurements by task, in the order of the files.

    Raises:
      DataError: a file is not such a result.
      ConfigError: results of a task measured different things, or the same thing twice; there are too many runs.
    """
    found = {path: _read(path) for path in dict.fromkeys(paths)}
    folders = [_folder(result) for result in found.values() if result["model"]["step"] is not None]
    names = run_names(folders, "results")
    by_task: dict[str, dict[Path, Nested]] = {}
    for path, result in found.items():
        by_task.setdefault(result["task"], {})[path] = result
    return [_series(task, own, names) for task, own in by_task.items()]


def _series(task: str, results: Mapping[Path, Nested], names: Mapping[Path, str]) -> Series:
    measured: dict[tuple[str, int | None], Path] = {}
    first: dict[str, tuple[Path, Any]] = {}
    measurements = []
    for path, result in results.items():
        for what, value in _scope(result).items():
            other, theirs = first.setdefault(what, (path, value))
            if theirs != value:
                raise ConfigError(
                    f"{other} and {path} in `results` measured {task}, but differ in {what} ({theirs} and {value}), so "
                    f"they cannot be compared. {_advice(what)}"
                )
        model = result["model"]
        run = "" if model["step"] is None else names[_folder(result)]
        where = f"step {model['step']} of {run}" if run else "a model without steps; only one is allowed"
        if (other := measured.setdefault((run, model["step"]), path)) != path:
            raise ConfigError(f"{other} and {path} in `results` both measured {task} for {where}. Omit one of them.")
        name = run or f"{_folder(result).name} (no steps)"
        of_modes = {mode: _figures(result.get(mode, {})) for mode in MODES}
        values = {
            metric: {mode: own[metric] for mode, own in of_modes.items() if metric in own}
            for metric in dict.fromkeys(metric for own in of_modes.values() for metric in own)
        }
        differences = _figures(result.get("comparison", {}))
        measurements.append(Measurement(run, model["step"] or 0, name, values, differences))
    measurements.sort(key=lambda one: (one.run, one.step))
    _, counted = first["numbers of texts"]
    used = {name: first[name][1] for name in (*OF_THOUGHTS, "exclude") if name in first}
    settings = [f"{name} {value}" for name, value in used.items() if value not in (DEFAULTS[name], str(ALWAYS))]
    data = next(iter(results.values()))["data"]
    return Series(task, ", ".join([data, counted, *settings]), measurements)


def _advice(what: str) -> str:
    if what == "numbers of texts":
        return "If some of them omitted texts that are too long, measure all with the same --max-length."
    return "Give results of the same measurement."


def _folder(result: Nested) -> Path:
    path = Path(result["model"]["checkpoint"])
    return path.parent if path.name == "checkpoints" else path


def _read(path: Path) -> Nested:
    try:
        result = json.loads(path.read_text("utf-8"))
        model = result["model"]
        known = isinstance(model["checkpoint"], str) and isinstance(model["step"], int | None)
        known &= result["task"] in TASKS and isinstance(result["config"], dict) and {"data", "data_hash"} <= {*result}
        known &= all(any(name in result for name in names) for names in (MODES, COUNTED))
    except OSError as error:
        raise DataError(f"The result {path} cannot be read: {error}. Check the path.") from error
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise DataError(f"{path} is not a result of `evaluate --output`. Choose one that it wrote.")
    return dict(result)


def _scope(result: Nested) -> dict[str, Any]:
    """Returns what must be equal for results to be compared: what was measured, and all options that change figures.

    Options are those that were used, where the result has them, else those that were requested.
    """
    unit = next(unit for unit in COUNTED if unit in result)
    used = {name: result.get(name, result["config"].get(name, default)) for name, default in DEFAULTS.items()}
    if "with_thoughts" not in result:
        of_thoughts = (*OF_THOUGHTS, "samples") if TASKS[result["task"]].kind == TEXT else OF_THOUGHTS
        used = {name: value for name, value in used.items() if name not in of_thoughts}
    numbers = f"{result[unit]:,} {unit}"
    return {"texts": str(result["data_hash"])[:12], "numbers of texts": numbers, "tokens": result.get("tokens"), **used}


def _figures(values: Nested) -> dict[str, Value]:
    """Returns every metric, also those in groups of tokens, of a mode or of the comparison of modes."""
    found = {}
    for name, label in (PERCENT | PLAIN).items():
        value = values.get(name)
        if isinstance(value, Mapping):
            found[label] = Value(value["difference"], value["interval"], value["p_value"])
        elif value is not None:
            found[label] = Value(value, values.get(f"{name}_interval"))
    for group, title in GROUPS.items():
        if group in values:
            found |= {f"{title}, {label}": value for label, value in _figures(values[group]).items()}
    return found
