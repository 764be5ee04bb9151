"""Nested mappings to frozen dataclasses and back, with every problem reported at once.

A dataclass that takes part may define `problems() -> list[str]`, built with `require` and `one_of`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from quietstar_jax.errors import ConfigError

T = TypeVar("T")


def require(holds: bool, name: str, value: Any, takes: str) -> list[str]:
    """A problem with field `name` unless the condition holds."""
    return [] if holds else [f"{name} is {value!r}; it takes {takes}"]


def one_of(name: str, value: str, choices: Sequence[str]) -> list[str]:
    """A problem with field `name` unless its value is among `choices`."""
    return require(value in choices, name, value, "one of " + ", ".join(choices))


def from_mapping(cls: type[T], mapping: Mapping[str, Any] | Any, root: str = "config") -> T:
    """Builds `cls` from a nested mapping.

    Raises:
      ConfigError: names each unknown key, wrong type and impossible value.
    """
    problems: list[str] = []
    value = _build(cls, mapping, root, problems)
    if problems:
        raise ConfigError("The configuration cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))
    return value


def to_mapping(value: Any) -> Any:
    """The inverse of `from_mapping`: dataclasses become dicts, tuples become lists of their items."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        if value and dataclasses.is_dataclass(value[0]):
            return [to_mapping(item) for item in value]
        return tuple(value)
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], root: str = "config") -> list[str]:
    """Lines `path: old -> new` for every leaf in which two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{root}.{key}")
        ]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) == len(new):
            return [
                line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{root}[{i}]")
            ]
        return [f"{root}: {len(old)} entries -> {len(new)} entries"]
    return [] if old == new else [f"{root}: {old!r} -> {new!r}"]


def _build(cls: type, mapping: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(mapping) and isinstance(mapping, cls):
        mapping = to_mapping(mapping)
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        problems.append(f"{path} is {mapping!r}; it takes a group of settings")
        return None
    given = dict(mapping.items())
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else "known are: " + ", ".join(names)
            problems.append(f"{path}.{key} is not a setting; {hint}")
    values = {}
    for name in names:
        before = len(problems)
        value = _convert(hints[name], given[name], f"{path}.{name}", problems) if name in given else None
        if name in given and len(problems) == before:
            values[name] = value
    built = cls(**values)  # a default stands in for what is wrong, so that the rest is checked too
    if hasattr(built, "problems"):
        problems.extend(f"{path}.{line}" for line in built.problems())
    return built


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, path, problems)
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, str) or not isinstance(value, Sequence):
            problems.append(f"{path} is {value!r}; it takes a list")
            return None
        return tuple(_convert(item_kind, item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{path} is {value!r} ({type(value).__name__}); it takes {kind.__name__}")
        return None
    if kind is float and not math.isfinite(value):
        problems.append(f"{path} is {value!r}; it takes a finite number")
    return value
