"""Converts nested mappings to frozen dataclasses and back; one error reports all problems.

Such a dataclass may define `problems() -> list[str]`, built with `require` and `one_of`. Its integers have at most 32
bits, as in JAX, unless the metadata of their field sets other `bits`.
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

LARGEST_INTEGER = 2**63 - 1
LONGEST_SHOWN = 200  # characters of a value in a message


def require(holds: bool, name: str, value: Any, takes: str) -> list[str]:
    """Returns a problem with field `name` unless the condition holds."""
    return [] if holds else [f"{name} is {shown(value)}; it takes {takes}"]


def one_of(name: str, value: str, choices: Sequence[str]) -> list[str]:
    """Returns a problem with field `name` unless its value is among `choices`."""
    return require(value in choices, name, value, "one of " + ", ".join(choices))


def shown(value: Any) -> str:
    """The text of a value for messages: shortened if it is long, its type if its `repr` fails."""
    try:
        text = repr(value)
    except Exception:  # an integer with more digits than Python writes, an object of a configuration file
        return f"a value of type {type(value).__name__}"
    return (
        text
        if len(text) <= LONGEST_SHOWN
        else f"{text[: LONGEST_SHOWN - 50]} ... {text[-20:]} ({len(text):,} characters)"
    )


def unknown(path: str, key: Any, names: Sequence[str]) -> str:
    """Returns the problem that a group of settings has no setting with this name."""
    near = difflib.get_close_matches(str(key), names, n=1)
    hint = f"did you mean {near[0]}?" if near else "known are: " + ", ".join(names)
    return f"{path}.{key} is not a setting; {hint}"


def text_problem(text: str) -> str | None:
    """Why a text cannot be an argument, a name or a path; None if it can."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


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
    return [] if old == new else [f"{root}: {shown(old)} -> {shown(new)}"]


def _build(cls: type, mapping: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(mapping) and isinstance(mapping, cls):
        mapping = to_mapping(mapping)
    if not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        problems.append(f"{path} is {shown(mapping)}; it takes a group of settings ({path}.NAME)")
        return None
    given = dict(mapping.items())
    hints = typing.get_type_hints(cls)
    bits = {f.name: f.metadata.get("bits", 32) for f in dataclasses.fields(cls)}
    names = list(bits)
    for key in given:
        if key not in names:
            problems.append(unknown(path, key, names))
    values = {}
    for name in names:
        before = len(problems)
        value = _convert(hints[name], given[name], f"{path}.{name}", problems, bits[name]) if name in given else None
        if name in given and len(problems) == before:
            values[name] = value
    built = cls(**values)  # defaults replace invalid values, so that the rest is checked too
    if hasattr(built, "problems"):
        problems.extend(f"{path}.{line}" for line in built.problems())
    return built


def _convert(kind: Any, value: Any, path: str, problems: list[str], bits: int) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, path, problems)
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if isinstance(value, str) or not isinstance(value, Sequence):
            problems.append(f"{path} is {shown(value)}; it takes a list, written as ('first', 'second')")
            return None
        return tuple(_convert(item_kind, item, f"{path}[{i}]", problems, bits) for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{path} is {shown(value)} ({type(value).__name__}); it takes {kind.__name__}")
        return None
    if kind is float and not math.isfinite(value):
        problems.append(f"{path} is {shown(value)}; it takes a finite number")
    if kind is int and abs(value) >= 2 ** (bits - 1):
        problems.append(f"{path} is {shown(value)}; it takes an integer of at most {bits} bits")
    if kind is str and (problem := text_problem(value)):
        problems.append(f"{path} is {shown(value)}, which {problem}")
    return value
