"""Reads configurations from Python files and applies the settings of the command line.

The result is a checked `Config` or a `ConfigError`, whatever the file or command line contains.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from quietstar_jax.config import Config, from_config_dict
from quietstar_jax.errors import ConfigError, reason
from quietstar_jax.settings import to_mapping, unknown


class _SettingError(ConfigError):
    """The error is on the command line, not in the file."""


SHIPPED = Path(__file__).parent / "configs"  # of the package; a link to configs/ of the repository
FOLDERS = {"get_config": SHIPPED, "get_study": SHIPPED / "studies"}  # where a name without a folder is looked up
LARGEST_FILE = 10 * 2**20  # bytes
LONGEST_LITERAL = 100_000  # characters
SETTING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d{1,9}\])*", re.ASCII)
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def read_config(file: str, settings: Iterable[tuple[str, str]] = ()) -> Config:
    """Returns the configuration of a file: `FILE`, or `FILE:ARGUMENT` for a `get_config` with one parameter.

    Args:
      settings: names such as `phases[0].steps` and their values as text; the last value of a name applies.

    Raises:
      ConfigError: the file cannot be used, or a setting is unknown, of the wrong type or impossible.
    """
    path, argument = (file, None) if ":" not in file or is_file(file) else file.rsplit(":", maxsplit=1)
    get_config = load_function(path, "get_config")
    with _blame(path, "get_config()"):
        config = get_config(*_arguments(get_config, argument))
        if isinstance(config, Config):
            config = to_mapping(config)
        if not isinstance(config, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"it returned {type(config).__name__}, not an ml_collections.ConfigDict")
        if type(config) is not ml_collections.ConfigDict:
            config = ml_collections.ConfigDict(dict(config.items()))
    for name, text in settings:
        if not SETTING.fullmatch(name):
            raise ConfigError(f"--config.{name} is not the name of a setting, such as seed or phases[0].steps.")
        with _blame(path, f"setting config.{name}"):
            _replace(config, Config, re.findall(r"\w+", name), text, "config")
    with _blame(path, "reading the result of get_config()"):
        plain = _plain(config)
    return from_config_dict(plain)


def call_function(path: str, name: str) -> Any:
    """Calls a function without parameters of a Python file and returns its result.

    Raises:
      ConfigError: as `load_function`, or if the call fails.
    """
    function = load_function(path, name)
    with _blame(path, f"{name}()"):
        return function()


def load_function(path: str, name: str) -> Callable[..., Any]:
    """Executes a Python file and returns one of its functions.

    Args:
      path: of a file, or a shipped configuration, see `find_file`.

    Raises:
      ConfigError: names the file, and the line and the exception if its execution failed.
    """
    found = find_file(path, name)
    if found is None:
        names = [file.stem for file in sorted(FOLDERS[name].glob("*.py")) if file.stem != "__init__"]
        near = difflib.get_close_matches(Path(path).stem, names, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"These come with the package: {', '.join(names)}."
        raise ConfigError(f"There is no file {path!r}. Give a Python file with a function {name}(). {hint}")
    path = found
    module = types.ModuleType(f"config_file.{Path(path).stem}")
    module.__file__ = path
    with _blame(path, "this file"):
        if Path(path).stat().st_size > LARGEST_FILE:
            raise ConfigError(f"it is larger than {LARGEST_FILE:,} bytes")
        code = compile(Path(path).read_bytes(), path, "exec")
        sys.modules[module.__name__] = module  # dataclasses look up the module that they are defined in
        exec(code, module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {name}().")
    return function


def find_file(path: str, function: str) -> str | None:
    """Returns the path of the Python file that a user names, None if there is no such file.

    Args:
      path: a file; or, in any folder, a configuration of this package: `configs/quickstart.py`, `quickstart`,
        `objectives/rlp`, or for `get_study` `controls`.
      function: `get_config` or `get_study`.
    """
    if is_file(path):
        return path
    name = path.removesuffix(".py")
    folder = SHIPPED if name.startswith("configs/") else FOLDERS[function]
    name = name.removeprefix("configs/")
    shipped = f"{folder / name}.py"
    return shipped if is_file(shipped) and ".." not in Path(name).parts and not Path(name).is_absolute() else None


@contextlib.contextmanager
def _blame(path: str, what: str) -> Iterator[None]:
    """Converts exceptions raised inside to a `ConfigError` that names the file and, if known, the line."""
    try:
        yield
    except (KeyboardInterrupt, _SettingError):
        raise
    except BaseException as error:  # SystemExit too: a configuration must not end the program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines and lines[-1] else path
        message = reason(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {reason(error)}"
        raise ConfigError(f"{where}: {what} cannot be used: {message}") from error


def is_file(path: str) -> bool:
    """Whether the path is a regular file; reading a pipe or a device might never end."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that cannot exist
        return False


def _arguments(get_config: Callable[..., Any], argument: str | None) -> tuple[str, ...]:
    arguments = () if argument is None else (argument,)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        form = "FILE:ARGUMENT" if argument is None else "FILE, without `:ARGUMENT`"
        raise _SettingError(
            f"get_config{inspect.signature(get_config)} is called with {len(arguments)} arguments: {error}. Give it as "
            f"--config {form}."
        ) from None
    return arguments


def _replace(value: Any, kind: Any, parts: list[str], text: str, path: str) -> Any:
    """Returns the value with one of its settings changed; groups are changed in place.

    Args:
      kind: the type of the value; parts: the parts of the setting's name below this value.
    """
    if not parts:
        return _from_text(kind, text)
    part, *rest = parts
    if typing.get_origin(kind) is tuple:
        if not part.isdigit() or int(part) >= len(value):
            raise _SettingError(f"{path}[{part}] does not exist: {path} is a list of {len(value)}, counted from 0")
        items = list(value)
        items[int(part)] = _replace(items[int(part)], typing.get_args(kind)[0], rest, text, f"{path}[{part}]")
        return items
    if not dataclasses.is_dataclass(kind):
        raise _SettingError(f"{path} is a single setting: it has no {part!r}")
    hints = typing.get_type_hints(kind)
    if part not in hints:
        raise _SettingError(unknown(path, part, list(hints)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_mapping(value)
    now = value[part] if part in value else to_mapping(getattr(typing.cast(type, kind)(), part))
    new = _replace(now, hints[part], rest, text, f"{path}.{part}")
    if new is not now or part not in value:
        with value.ignore_type() if isinstance(value, ml_collections.ConfigDict) else contextlib.nullcontext():
            value[part] = new
    return value


def _from_text(kind: Any, text: str) -> Any:
    """Parses a value; returns the text itself if it cannot be parsed, for validation to reject with all others."""
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if typing.get_origin(kind) is tuple and len(text) <= LONGEST_LITERAL:
            items = ast.literal_eval(text)
            return items if isinstance(items, tuple | list) else (items,)
    return text


def _plain(value: Any) -> Any:
    """Converts to nested dictionaries and lists; references of `ml_collections` become values."""
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
