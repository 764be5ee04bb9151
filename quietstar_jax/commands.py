"""The command `quietstar`, and the table of all commands: `quietstar NAME` is `python -m quietstar_jax.MODULE`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from quietstar_jax import __version__
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.signals import SCRIPT


class Command(NamedTuple):
    """A command: its module in this package, which has a function `main(arguments)`, and what it does.

    The first sentence of `does` is a line of `quietstar --help`; all of it is in the command's own help.
    """

    module: str
    does: str


COMMANDS = {
    "train": Command("train", "Trains the model of a configuration file, or resumes the run in its work directory."),
    "evaluate": Command(
        "evaluate", "Measures a model on questions or text, with and without thoughts, and prints a table."
    ),
    "generate": Command(
        "generate", "Continues prompts: to the terminal, or from file to file (JSON lines with a completion each)."
    ),
    "export": Command(
        "export", "Writes a checkpoint of a run as a Hugging Face folder, which transformers loads by itself."
    ),
    "report": Command(
        "report",
        "Writes an HTML page about a checkpoint and its thoughts, a study, runs in training, or measurements.",
    ),
    "study": Command(
        "study", "Trains every variant of a study with every seed, and compares them. The same command resumes."
    ),
    "aot": Command(
        "aot",
        "Compiles the train step, or the decoder, for devices that need not be attached. Prints whether it\n"
        "fits in memory, what the devices communicate, and the shortest time of a step. Status 1: it does not fit.",
    ),
    "prepare": Command("data.prepare", "Tokenizes text into a folder that training reads. The same command resumes."),
    "build": Command(
        "data.build", "Builds a dataset of tensorflow-datasets in array_record format, to be read as tfds:NAME:SPLIT."
    ),
    "lm_eval": Command("lm_eval", "Runs the language model evaluation harness, with `--model quietstar`."),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `quietstar COMMAND ...` and exits with its status; `arguments`: None = those of the process."""
    run_command(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def written(name: str) -> str:
    """Returns a command as the user writes it: `quietstar NAME` if this process was started so."""
    as_script = os.path.basename(sys.argv[0]) == SCRIPT
    return f"{SCRIPT} {name}" if as_script else f"python -m quietstar_jax.{COMMANDS[name].module}"


def _dispatch(arguments: Sequence[str]) -> object:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name in ("-h", "--help"):
        return print(_help())
    if name == "--version":
        return print(f"{SCRIPT} {__version__}")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        problem = f"{name!r} is not a command of {SCRIPT}." if name else "There is no command."
        raise ConfigError(f"{problem} {f'Did you mean {near[0]}?' if near else f'{SCRIPT} --help lists all commands.'}")
    return importlib.import_module(f"quietstar_jax.{COMMANDS[name].module}").main(rest)


def _help() -> str:
    lines = [f"  {name:<10}{command.does.partition('. ')[0].removesuffix('.')}" for name, command in COMMANDS.items()]
    return "\n".join([
        f"usage: {SCRIPT} COMMAND [flags]", "", "commands:", *lines, "",
        f"{SCRIPT} COMMAND --help lists the flags of a command, {SCRIPT} --version prints the version.",
    ])  # fmt: skip
