"""What the settings mean, read from the comments on their fields: for `--help-settings` and docs/configuration.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator

from quietstar_jax.config import Config
from quietstar_jax.settings import described, type_hints, unmarked


def meanings(cls: type) -> dict[str, str]:
    """Returns the comment on every field of a dataclass that has one: it begins on the line of the field's value."""
    source = inspect.getsource(cls)
    definition = typing.cast(ast.ClassDef, ast.parse(source).body[0])
    fields = {node.lineno: node for node in definition.body if isinstance(node, ast.AnnAssign)}
    found: dict[str, str] = {}
    name, last = "", 0  # the field that a comment may belong to; the last line of its value or comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if line in fields:
            name, last = typing.cast(ast.Name, fields[line].target).id, fields[line].end_lineno or line
        if token.type == tokenize.COMMENT and last <= line <= last + 1:
            found[name] = f"{found.get(name, '')} {token.string.lstrip('# ')}".strip()
            last = line
    return found


def list_settings(width: int, value: typing.Any = None, path: str = "") -> Iterator[str]:
    """Yields lines about every setting of a value, by default of `Config()`: `name=default`, then its meaning."""
    value = Config() if value is None else value
    cls: type = type(value)
    means = meanings(cls)
    for name, hint in type_hints(cls).items():
        default, kind = getattr(value, name), unmarked(hint)[0]
        if dataclasses.is_dataclass(kind):
            yield from list_settings(width, default, f"{path}{name}.")
        elif isinstance(default, tuple) and default and dataclasses.is_dataclass(default[0]):
            for i, item in enumerate(default):
                yield from list_settings(width, item, f"{path}{name}[{i}].")
        else:
            yield f"  {path}{name}={default!r}"
            about = f"{described(hint)}; {means[name]}"
            yield from textwrap.wrap(about, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
