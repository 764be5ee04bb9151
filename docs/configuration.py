"""Prints docs/configuration.md: every setting, with its type, default and meaning, as its dataclass declares it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator

from quietstar_jax.config import Config
from quietstar_jax.settings import OnResume, described, type_hints, unmarked

INTRODUCTION = """\
# Configuration

`make docs` generates this page from [config.py](../quietstar_jax/config.py),
[thought_config.py](../quietstar_jax/thought_config.py) and [architecture.py](../quietstar_jax/architecture.py).

Any setting can be changed on the command line: `--config.NAME=VALUE`, for example `--config.phases[0].steps=500`. The
column *on resume* says when a run that resumes from its checkpoint may change a setting."""
HEAD = "| setting | value | default | on resume | meaning |\n|---|---|---|---|---|"


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


def groups(cls: type = Config, path: str = "", on_resume: str = "no", comment: str = "") -> Iterator[str]:
    """Yields the heading, the introduction and the table of a group of settings and of the groups in it."""
    rows, inner, means, defaults = [], [], meanings(cls), cls()
    for name, hint in type_hints(cls).items():
        kind, marks = unmarked(hint)
        when = next((mark.value for mark in marks if isinstance(mark, OnResume)), on_resume)
        item = next(iter(typing.get_args(kind)), None)
        if dataclasses.is_dataclass(kind):
            inner.append(groups(typing.cast(type, kind), f"{path}{name}.", when, means.get(name, "")))
        elif dataclasses.is_dataclass(item):
            inner.append(groups(typing.cast(type, item), f"{path}{name}[i].", when))
        else:
            cells = (f"`{name}`", described(hint), f"`{getattr(defaults, name)!r}`", when, means[name])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    introduction = " ".join(filter(None, [inspect.getdoc(cls), comment and f"{comment[0].upper()}{comment[1:]}."]))
    yield "\n\n".join([f"## `{path.rstrip('.')}`" if path else "## Run", introduction, "\n".join([HEAD, *rows])])
    for group in inner:
        yield from group


def document() -> str:
    """Returns the content of docs/configuration.md."""
    return "\n\n".join([INTRODUCTION, *groups()]) + "\n"


if __name__ == "__main__":
    print(document(), end="")
