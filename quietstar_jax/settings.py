"""Converts nested mappings to frozen dataclasses and back; one error reports all problems.

The type of a field says which values it accepts: `Literal` lists choices, and `Annotated` adds marks such as a `Check`
or `OnResume`. Integers have at most 32 bits, as in JAX, except `Int64`. Conditions on several fields of a dataclass are
checked by its method `conflicts() -> list[str]`, built with `require`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from quietstar_jax.errors import ConfigError

T = TypeVar("T")

LARGEST_INTEGER = 2**63 - 1
LONGEST_SHOWN = 200  # characters of a value in a message
WIDE = "64 bits"  # mark of an integer


class Check(NamedTuple):
    """A condition on the value of a field."""

    holds: Callable[[Any], bool]
    text: str  # completes the sentence "it must be ..."


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Mark of a string that must be one of these names, such as those of a registry, which may grow."""

    names: Mapping[str, Any]


def between(least: float, most: float) -> Check:
    """Returns the check that a number is within these bounds, both included."""
    return Check(lambda value: least <= value <= most, f"within {least} .. {most}")


def at_least(least: float) -> Check:
    """Returns the check that a number is not below this bound."""
    return Check(lambda value: value >= least, f"at least {least}")


def is_pattern(value: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(value)
    except re.error:
        return False
    return True


Positive = Annotated[T, Check(lambda value: value > 0, "above 0")]
NonNegative = Annotated[T, at_least(0)]
NonEmpty = Annotated[T, Check(bool, "non-empty")]
Fraction = Annotated[float, between(0, 1)]
Portion = Annotated[float, Check(lambda value: 0 < value <= 1, "above 0 and at most 1")]
Below1 = Annotated[float, Check(lambda value: 0 <= value < 1, "at least 0 and below 1")]
Int64 = Annotated[int, WIDE]


class OnResume(enum.Enum):
    """When a resumed run may change a setting; without a mark, never."""

    UNRELATED = "yes"  # no effect on the results of a run, or only on rounding
    MEASURED = "yes; evaluations differ"  # affects metrics, not the weights
    THINKING = "until the first phase with thoughts begins"  # no effect before
    REINFORCE = "until the first phase that trains thoughts begins"  # no effect on weights before
    SAME_TEXT = "to a source of the same content"  # compared by fingerprint: the same bytes may have moved
    SAME_WEIGHTS = "to a source of the same weights"  # as above
    NOT_BEGUN = "until the phase begins"
    OPEN_END = "until the next phase begins, if `decay` is constant"  # no effect on the learning rate before


Unrelated = Annotated[T, OnResume.UNRELATED]
Measured = Annotated[T, OnResume.MEASURED]
Thinking = Annotated[T, OnResume.THINKING]
Reinforce = Annotated[T, OnResume.REINFORCE]
SameText = Annotated[T, OnResume.SAME_TEXT]
SameWeights = Annotated[T, OnResume.SAME_WEIGHTS]

WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


def require(holds: bool, name: str, value: Any, must_be: str) -> list[str]:
    """Returns a problem with field `name` if the condition does not hold."""
    return [] if holds else [f"{name} is {shown(value)}; it must be {must_be}"]


def one_of(name: str, value: Any, choices: Any) -> list[str]:
    """Returns a problem with field `name` if its value is not among those of a `Literal` or of `Choices`."""
    names = names_of(choices)
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return require(isinstance(value, str) and value in names, name, value, described(choices) + hint)


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Returns the types of the fields of a dataclass, with their marks."""
    return typing.get_type_hints(cls, include_extras=True)


def unmarked(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits `Annotated[kind, *marks]` into (kind, marks)."""
    return (kind.__origin__, kind.__metadata__) if typing.get_origin(kind) is Annotated else (kind, ())


def marked(cls: type, mark: Any, root: str = "") -> tuple[str, ...]:
    """Returns the paths of all settings and groups of settings that have this mark, each after the root."""
    paths: list[str] = []
    for name, hint in type_hints(cls).items():
        kind, marks = unmarked(hint)
        if mark in marks:
            paths.append(root + name)
        elif dataclasses.is_dataclass(kind):
            paths += marked(typing.cast(type, kind), mark, f"{root}{name}.")
    return tuple(paths)


def names_of(hint: Any) -> tuple[str, ...]:
    """Returns the names that a type accepts, of a `Literal` or of `Choices`; empty for other types."""
    kind, marks = unmarked(hint)
    names = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return next((tuple(mark.names) for mark in marks if isinstance(mark, Choices)), names)


def described(kind: Any) -> str:
    """Returns a description of the values that a type accepts."""
    if names := names_of(kind):
        return "one of " + ", ".join(names)
    kind, marks = unmarked(kind)
    if typing.get_origin(kind) is tuple:
        kind = f"a list, each item {described(typing.get_args(kind)[0])}"
    checks = [mark.text for mark in marks if isinstance(mark, Check)]
    return ", ".join([WORDS.get(kind, kind), *checks])


def shown(value: Any) -> str:
    """The text of a value for messages: shortened if it is long, its type if its `repr` fails."""
    try:
        text = repr(value)
    except Exception:  # an integer with more digits than Python writes, an object of a configuration file
        return f"a value of type {type(value).__name__}"
    if len(text) > LONGEST_SHOWN:
        return f"{text[: LONGEST_SHOWN - 50]} ... {text[-20:]} ({len(text):,} characters)"
    return text


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
        problems += require(False, path, mapping, f"a group of settings ({path}.NAME)")
        return None
    entries = dict(mapping.items())
    hints = type_hints(cls)
    problems += [unknown(path, key, list(hints)) for key in entries if key not in hints]
    values = {
        name: _convert(hint, entries[name], f"{path}.{name}", problems)
        for name, hint in hints.items()
        if name in entries
    }
    # Defaults replace values that cannot be used, so that the others are checked too.
    built = cls(**{name: value for name, value in values.items() if value is not None})
    if hasattr(built, "conflicts"):
        problems.extend(f"{path}.{line}" for line in built.conflicts())
    return built


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Returns the value as the type that the hint describes; None, with a problem added, if that is impossible."""
    kind, marks = unmarked(hint)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, path, problems)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            problems += require(False, path, value, "a list, written as ('first', 'second')")
            return None
        item_kind = typing.get_args(kind)[0]
        value = tuple(_convert(item_kind, item, f"{path}[{i}]", problems) for i, item in enumerate(value))
        if None in value:
            return None
        conflicts = []
    elif names_of(hint):
        conflicts = one_of(path, value, hint)
    else:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1e300 else math.inf
        conflicts = _scalar_problems(hint, value, path)
    for mark in marks:
        if isinstance(mark, Check) and not conflicts:
            conflicts = require(mark.holds(value), path, value, mark.text)
    problems += conflicts
    return None if conflicts else value


def _scalar_problems(hint: Any, value: Any, path: str) -> list[str]:
    kind, marks = unmarked(hint)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{path} is {shown(value)} ({type(value).__name__}); it must be {described(hint)}"]
    if kind is float:
        return require(math.isfinite(value), path, value, "a finite number")
    if kind is int:
        bits = 64 if WIDE in marks else 32
        return require(abs(value) < 2 ** (bits - 1), path, value, f"an integer of at most {bits} bits")
    problem = text_problem(value) if kind is str else None
    return [f"{path} is {shown(value)}, which {problem}"] if problem else []
