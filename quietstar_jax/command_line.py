"""Shared by all command lines: errors as messages, and `--config FILE --config.NAME=VALUE`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quietstar_jax.commands import COMMANDS, written
from quietstar_jax.config import Config
from quietstar_jax.config_file import read_config
from quietstar_jax.data_config import TEXT_DOCUMENTS
from quietstar_jax.errors import ConfigError, UserError
from quietstar_jax.io import is_url, place
from quietstar_jax.methods.thinking import THINKING, usage
from quietstar_jax.settings import LARGEST_INTEGER, shown, text_problem

MOST_AT_ONCE = 2**16  # texts in a batch
BATCH_SIZE = 16
SCREEN = 120  # columns of a help page; the terminal may have fewer
FLAG = re.compile(r"--[a-z][a-z-]*")
# Flags of earlier versions. A new name is suggested by a command that has it.
RENAMED = {
    "--source": "--data",
    "--input": "--data",
    "--documents": "--limit",
    "--max-tokens": "--page-tokens",
    "--study": "--workdir",
}


class CommandParser(argparse.ArgumentParser):
    """The parser of one command: raises `ConfigError` for invalid arguments; its help fits one screen.

    Args:
      command: its name in `COMMANDS`, which says what it does.
      example: arguments that work.
      more: text for the end of the help.
    """

    def __init__(self, command: str, example: str, more: str = ""):
        prog = written(command)
        end = "\n".join(filter(None, [f"example: {prog} {example}", more]))
        does = COMMANDS[command].does
        fixed: dict[str, Any] = dict(formatter_class=_Help, allow_abbrev=False, add_help=False)
        super().__init__(prog=prog, description=does, epilog=end, **fixed)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # who reads it has found it

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parses the arguments as `argparse` does, without abbreviated flags.

        Raises:
          ConfigError: an argument is unknown, missing, or has an impossible value.
        """
        for argument in arguments:
            if problem := text_problem(argument):
                raise ConfigError(f"The argument {shown(argument)} {problem}.")
        for argument in itertools.takewhile("--".__ne__, arguments):
            flag = argument.partition("=")[0]
            if FLAG.fullmatch(flag) and " " not in argument and flag not in self._option_string_actions:
                raise ConfigError(f"{shown(flag)[1:-1]} is not a flag of {self.prog}. {self._advice(flag)}")
        return super().parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError` with the message; called by `argparse`."""
        message = re.sub("^argument (.*?): is ", r"\1 is ", message).removeprefix("argument ")
        raise ConfigError(f"{message.removesuffix('.')}. {self.prog} --help lists all flags.")

    def format_usage(self) -> str:
        """Returns the required arguments; `format_help` lists the others, one to a line."""
        needed = [self._written(action) for action in self._actions if action.required or action.dest == "config"]
        choices = [group for group in self._mutually_exclusive_groups if group.required]
        needed += [f"({' | '.join(one.option_strings[-1] for one in group._group_actions)})" for group in choices]
        return f"usage: {' '.join([self.prog, *needed])} [flags]\n"

    def format_help(self) -> str:
        """Returns the text of `--help`."""
        self.usage = self.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%")
        return super().format_help()

    @contextlib.contextmanager
    def parsed(self, arguments: Sequence[str]) -> Iterator[argparse.Namespace]:
        """Yields the parsed arguments; errors raised in this context name flags, see `naming_flags`."""
        args = self.parse_args(arguments)
        with self.naming_flags():
            yield args

    @contextlib.contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Names flags in the errors of a user that are raised inside, where the library names arguments or settings.

        The library begins a message with the argument, as in "thought_length is 0", and writes other arguments and
        settings in backticks: `max_length` becomes --max-length, `data.text_key` --text-key. A name remains if this
        command has no flag for it.
        """
        try:
            yield
        except UserError as error:
            error.args = (self._with_flags(str(error)), *error.args[1:])
            raise

    def _with_flags(self, message: str) -> str:
        flags = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
        names = r"`(?:data\.)?([a-z_]+)`|^([a-z_]+)(?= is )"
        return re.sub(names, lambda match: flags.get(match[1] or match[2], match[0]), message)

    def _advice(self, flag: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if RENAMED.get(flag) in known:
            return f"It is now {RENAMED[flag]}."
        near = difflib.get_close_matches(flag, known, n=1)
        return f"Did you mean {near[0]}?" if near else f"{self.prog} --help lists all flags."

    def _written(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        return f"{action.option_strings[-1]} {action.metavar}"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, and has room for a flag and its help in one line of a wide terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, SCREEN))


def integer(text: str, least: int = -LARGEST_INTEGER, most: int = LARGEST_INTEGER) -> int:
    """Argument type: an integer from `least` to `most`, by default any of at most 64 bits."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        bound = "at most 64 bits" if least < 0 else f"{least} or more"
        bound = f"{least} .. {most}" if most < LARGEST_INTEGER else bound
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it must be a whole number ({bound})")
    return value


def integer_from(least: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Returns the argument type `integer` within these bounds."""
    return functools.partial(integer, least=least, most=most)


def path(text: str) -> Path:
    """Argument type: a local path; `~` is the home folder."""
    if is_url(text) and not text.startswith("file://"):
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it must be a path on this machine, not a URL")
    return Path(path_or_url(text))


def path_or_url(text: str) -> Any:
    """Argument type: a local path as in `path`, or a URL of an object store."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; it must be a path")
    try:
        return place(text, "is")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def model_path(text: str) -> str:
    """Argument type: a path or URL as in `path_or_url`, or a hub id; returned as it is."""
    path_or_url(text)
    return text


def check_writable(file: Path, flag: str) -> None:
    """Checks a path before any work is done.

    Raises:
      ConfigError: no file can be written there; the message names the flag.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} is {shown(str(file))}: the folder {folder} is missing. Create it first.")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"{flag} is {shown(str(file))}, which cannot be written. Choose another file.")


# Every flag that several commands have: it means the same in all of them.
SHARED: dict[str, dict[str, Any]] = {
    "--checkpoint": dict(
        type=model_path,
        metavar="PATH",
        help="work directory of a run, Hugging Face folder, or hub id (export: only a run)",
    ),
    "--step": dict(type=integer_from(0), metavar="N", help="step of the run's checkpoint (default: the newest)"),
    "--revision": dict(default="", metavar="NAME", help="branch, tag or commit of a hub id (default: main)"),
    "--dtype": dict(
        default="float32",
        metavar="DTYPE",
        help="dtype of weights and computation: float32, bfloat16; export also: float16 (default: %(default)s)",
    ),
    "--data": dict(
        metavar="SOURCE",
        help="file, folder, glob, URL, hf:NAME:SPLIT or tfds:NAME:SPLIT, as in data.train (docs/data.md)",
    ),
    "--prompt": dict(
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue, or to show (report); - = read it from standard input; may be repeated",
    ),
    "--text-key": dict(default="text", metavar="FIELD", help="field that contains the text (default: %(default)s)"),
    "--text-documents": dict(
        default="file",
        choices=TEXT_DOCUMENTS,
        metavar="KIND",
        help=f"one document of a text file: {', '.join(TEXT_DOCUMENTS)} (default: %(default)s)",
    ),
    "--data-dir": dict(type=path_or_url, metavar="FOLDER", help="folder of tensorflow-datasets, as data.data_dir"),
    "--against": dict(
        default="",
        metavar="PATH",
        help="another model to compare with: file of its records (evaluate), or its checkpoint (report)",
    ),
    "--limit": dict(
        type=integer_from(0),
        metavar="N",
        help="number of questions, texts or documents, from the first; 0 = all (default: %(default)s)",
    ),
    "--output": dict(type=path, metavar="PATH", help="path of the result: a file, or a folder (export, data.prepare)"),
    "--figures": dict(
        type=path,
        metavar="FOLDER",
        help="folder for the charts of the page, or of evaluate --think-front, as SVG files",
    ),
    "--workdir": dict(type=path, metavar="FOLDER", help="work directory of a study: its runs and its table"),
    "--thoughts": dict(
        default="auto",
        metavar="MODE",
        help="on, off, auto (on if the model can think); evaluate also: both, its auto (default: %(default)s)",
    ),
    "--think": dict(
        metavar="POLICY",
        help="tokens that get a thought; in an export, those before which its model thinks by default: "
        f"{', '.join(map(usage, THINKING))}",
    ),
    "--thought-length": dict(type=integer_from(1), metavar="N", help="tokens of a thought (default: as in training)"),
    "--reach": dict(
        type=integer_from(1),
        metavar="N",
        default=0,
        help="tokens for which a thought is used, above 1 with mixing probabilities (default: the model's)",
    ),
    "--max-tokens": dict(type=integer_from(1), metavar="N", help="most tokens to generate (default: %(default)s)"),
    "--max-length": dict(
        type=integer_from(1),
        metavar="N",
        help="most tokens of a text, prompt and completion together (default: what the model allows)",
    ),
    "--temperature": dict(
        type=float,
        metavar="X",
        help="sampling temperature of the text; 0 = the most likely token (default: %(default)s)",
    ),
    "--samples": dict(
        type=integer_from(0),
        metavar="N",
        help="random samples of steps (*_cot: 8) or of each thought (report: 3; language_modeling: 0)",
    ),
    "--seed": dict(type=integer_from(0), default=0, metavar="N", help="seed of all random numbers (default: 0)"),
    "--batch-size": dict(
        type=integer_from(1, MOST_AT_ONCE),
        metavar="N",
        help=f"texts that are computed together, over all devices (default: {BATCH_SIZE}; generate --prompt: 1)",
    ),
    "--json": dict(action="store_true", help="print one JSON object on the last line instead of a table"),
    "--quiet": dict(action="store_true", help="no progress bar"),
}


def add_flags(parser: Any, *names: str, **options: Any) -> None:
    """Adds flags of `SHARED` to a parser or a group of it; `options` override theirs, such as `required`."""
    for name in names:
        parser.add_argument(name, **{**SHARED[name], **options})


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Returns the texts of `--prompt`, with standard input in place of `-`."""
    return [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompt]


def add_checkpoint_flags(parser: Any, choice: Any = None, *, hub: bool = True) -> None:
    """Adds the flags that name a model and how it is loaded.

    Args:
      choice: a group of flags that exclude one another, for `--checkpoint`; None = it is required.
      hub: whether the model may be one of the Hugging Face hub, which has revisions.
    """
    add_flags(choice or parser, "--checkpoint", required=choice is None)
    add_flags(parser, "--step", *(["--revision"] if hub else []), "--dtype")


class _ListSettings(argparse.Action):
    """Prints all settings with their defaults and meanings, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from quietstar_jax.setting_help import list_settings

        print("--config.NAME=VALUE changes a setting. All names, with their defaults, values and meanings:")
        print("\n".join(list_settings(shutil.get_terminal_size().columns)))
        parser.exit()


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `parse_with_config` reads."""
    parser.add_argument(
        "--config", metavar="FILE", help="Python file with get_config(), or a shipped name: quickstart ... (required)"
    )
    parser.add_argument("--config.NAME", metavar="VALUE", dest="setting", help="change a setting of this file")
    parser.add_argument(
        "--help-settings", action=_ListSettings, nargs=0, help="list all settings: defaults, values and meanings"
    )


def parse_with_config(parser: CommandParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Returns the arguments of `parser`, and the configuration of `--config FILE` with the settings applied.

    Settings are `--config.NAME=VALUE` or `--config.NAME VALUE`; a boolean setting may also be written `--config.NAME`
    or `--noconfig.NAME`.

    Args:
      parser: has the flags of `add_config_flags`.

    Raises:
      ConfigError: an argument or a setting cannot be used.
    """
    file, settings, rest = None, [], []
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if file is not None:
                raise ConfigError("--config is given twice; one file is allowed.")
            file = word.partition("=")[2] if "=" in word else next(words, "")
        elif word.startswith(("--config.", "--noconfig.")):
            name, equals, value = word.partition(".")[2].partition("=")
            if not equals:
                value = _value_of(word, name, words)
            settings.append((name, value))
        else:
            rest.append(word)
    args = parser.parse_args(rest)
    if not file:
        raise ConfigError("--config is missing: give a configuration file, as in --config configs/quickstart.py.")
    for text in (file, *(part for setting in settings for part in setting)):
        if problem := text_problem(text):
            raise ConfigError(f"The argument {shown(text)} {problem}.")
    return args, read_config(file, settings)


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
