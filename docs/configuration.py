"""Prints docs/configuration.md: every setting, with its type, default and meaning, as its dataclass declares it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator

from quietstar_jax.config import Config
from quietstar_jax.setting_help import meanings
from quietstar_jax.settings import OnResume, described, type_hints, unmarked

INTRODUCTION = """\
# Configuration

`make docs` generates this page from [config.py](../quietstar_jax/config.py),
[thought_config.py](../quietstar_jax/thought_config.py), [data_config.py](../quietstar_jax/data_config.py) and
[architecture.py](../quietstar_jax/architecture.py).

Any setting can be changed on the command line: `--config.NAME=VALUE`, also inside lists:
`"--config.phases[0].steps=500"`. `--help-settings` lists the same. `--config FILE:ARGUMENT` passes `ARGUMENT` to a
`get_config` with one parameter. The column *on resume* says when a run that resumes from its checkpoint may change a
setting."""
HEAD = "| setting | value | default | on resume | meaning |\n|---|---|---|---|---|"


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
