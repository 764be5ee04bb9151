"""Shared by all command lines: errors as messages, and `--config FILE --config.NAME=VALUE`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quietstar_jax.config import Config
from quietstar_jax.config_file import read_config
from quietstar_jax.errors import ConfigError
from quietstar_jax.io import is_url, place
from quietstar_jax.settings import LARGEST_INTEGER, shown, text_problem

MOST_AT_ONCE = 2**16  # texts in a batch


class CommandParser(argparse.ArgumentParser):
    """An `argparse` parser that raises `ConfigError` for invalid arguments and keeps line breaks in descriptions."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parses the arguments as `argparse` does.

        Raises:
          ConfigError: an argument is unknown, missing, or has an impossible value.
        """
        for argument in arguments:
            if problem := text_problem(argument):
                raise ConfigError(f"The argument {shown(argument)} {problem}.")
        return super().parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError` with the message; called by `argparse`."""
        message = re.sub("^argument (.*?): is ", r"\1 is ", message).removeprefix("argument ")
        raise ConfigError(f"{message}. {self.prog} --help lists all options.")


def integer(text: str, least: int = -LARGEST_INTEGER, most: int = LARGEST_INTEGER) -> int:
    """Argument type: an integer from `least` to `most`, by default any of at most 64 bits."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        bound = "at most 64 bits" if least < 0 else f"{least} or more"
        bound = f"{least} .. {most}" if most < LARGEST_INTEGER else bound
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it takes a whole number ({bound})")
    return value


def integer_from(least: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Returns the argument type `integer` within these bounds."""
    return functools.partial(integer, least=least, most=most)


def path(text: str) -> Path:
    """Argument type: a local path; `~` is the home folder."""
    found = path_or_url(text)
    if is_url(found):
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it takes a path on this machine, not a URL")
    return Path(found)


def path_or_url(text: str) -> Any:
    """Argument type: a local path as in `path`, or a URL of an object store."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; it takes a path")
    try:
        return place(text, "is")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """Argument type: a local file that can be written; checked before any work is done."""
    file = path(text)
    folder = file.absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"is {shown(text)}: the folder {folder} is missing. Make it first")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"is {shown(text)}, which cannot be written. Choose another file")
    return file


def parse_with_config(parser: CommandParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Returns the arguments of `parser`, and the configuration of `--config FILE` with the settings applied.

    Settings are `--config.NAME=VALUE` or `--config.NAME VALUE`; a boolean setting may also be written `--config.NAME`
    or `--noconfig.NAME`.

    Raises:
      ConfigError: an argument or a setting cannot be used.
    """
    parser.add_argument("--config", metavar="FILE", help="Python file with a function get_config()")
    parser.add_argument_group(
        "settings", "--config.NAME=VALUE changes a setting of the file. All names, with their defaults:\n"
        + "\n".join(f"  {name}={value!r}" for name, value in _defaults(Config(), "")),
    )  # fmt: skip
    file, settings, rest = None, [], []
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if file is not None:
                raise ConfigError("--config is given twice; it takes one file.")
            file = word.partition("=")[2] if "=" in word else next(words, "")
        elif word.startswith(("--config.", "--noconfig.")):
            name, equals, value = word.partition(".")[2].partition("=")
            if not equals:
                value = _value_of(word, name, words)
            settings.append((name, value))
        else:
            rest.append(word)
    given = parser.parse_args(rest)
    if not file:
        raise ConfigError("--config is missing: give a configuration file, as in --config configs/quickstart.py.")
    for text in (file, *(part for setting in settings for part in setting)):
        if problem := text_problem(text):
            raise ConfigError(f"The argument {shown(text)} {problem}.")
    return given, read_config(file, settings)


def _value_of(word: str, name: str, words: Iterator[str]) -> str:
    """The value of a setting that is written without `=`."""
    if word.startswith("--no"):
        return "false"
    kind: Any = Config
    for part in name.replace("]", "").replace("[", ".").split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else hints.get(part)
    if kind is bool:
        return "true"
    value = next(words, None)
    if value is None:
        raise ConfigError(f"{word} has no value: settings are given as --config.NAME=VALUE.")
    return value


def _defaults(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the names of all settings with their defaults."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _defaults(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for i, item in enumerate(value):
            yield from _defaults(item, f"{name}[{i}]")
    else:
        yield name, value
