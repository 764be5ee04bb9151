"""Errors that a user can mend. Command lines print their message and exit with status 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UserError):
    """A text source or tokenizer is missing, broken or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the configuration."""


class DivergedError(UserError):
    """The loss became NaN or infinite."""


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line; what a user can mend ends with a message and status 2."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
