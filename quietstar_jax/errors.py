"""Errors that a user can mend, and the exit statuses of command lines.

A launcher starts a run again that ended with `START_AGAIN`, or was killed (a status above 128); with 0 it is done, with
any other something is to be mended first.
"""

import sys
from collections.abc import Callable

MEND_FIRST = 2  # exit status: started again, it would only fail again
START_AGAIN = 75  # exit status: started again, the run goes on where it stopped (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    status = MEND_FIRST


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UserError):
    """A text source or tokenizer is missing, broken or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the configuration."""


class DivergedError(UserError):
    """The loss became NaN or infinite."""


class PreemptedError(UserError):
    """The run was told to leave its machine, and has saved where it is."""

    status = START_AGAIN


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line; what a user can mend ends with a message and the status of the error."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
