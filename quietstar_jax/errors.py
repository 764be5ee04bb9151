"""Errors that a user can fix, and the exit statuses of command lines.

A launcher restarts a run that ended with `EXIT_RETRY` or was killed (a status above 128, except `STOPPED`). Status 0
means that the run is finished; any other status means that something must be fixed first.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from quietstar_jax.signals import Interrupted, end_now, end_quietly, listening

EXIT_USER_ERROR = 2  # exit status: an unchanged restart fails again
EXIT_RETRY = 75  # exit status: a restarted run resumes where it stopped (EX_TEMPFAIL of sysexits.h)
STOPPED = 130  # exit status: stopped with Ctrl-C; the same command resumes

MOST_LINES, MOST_CHARACTERS, LONGEST_LINE = 25, 2000, 600  # of a message on the terminal
# Errors of a disk or a path that are never a bug: full, over quota, read-only, failing, not permitted, impossible.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR, errno.EACCES, errno.EPERM,
    errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE,
)  # fmt: skip
# A command reports these in one line. Any other OSError, such as a missing file, may be a bug and keeps its traceback.
ONE_LINE = (*DISK, errno.EISDIR, errno.ENFILE, errno.ENOMEM)
# The errors of a disk that libraries convert to other exceptions, recognized by their text.
ONE_LINE_AS_TEXT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    status = EXIT_USER_ERROR


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or impossible."""


class DataError(UserError):
    """A text source or tokenizer is missing, broken or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the configuration."""


class DivergedError(UserError):
    """The loss became NaN or infinite."""


class CollapsedError(UserError):
    """Thoughts became almost constant, and the run was to stop then; it has saved its state."""


class PreemptedError(UserError):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, status: int = EXIT_RETRY):
        super().__init__(message)
        self.status = status


def short(value: object, spell: Callable[[object], str] = repr) -> str:
    """The text of a value from a file; long texts are cut to 80 characters."""
    try:
        text = spell(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number with very many digits"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs a command and exits with the status that it returns; None is 0.

    Errors that a user can fix print a message and exit with the status of the error. So do errors of the file system
    (no space, no permission, a name that is too long) and lack of memory. Any other exception is a bug: it prints its
    traceback and exits with status 1. Ctrl-C, SIGTERM and SIGHUP end the command, after its cleanup, with one line and
    status 128 + signal.
    """
    asked: list[Interrupted] = []

    def stop(number: int) -> None:
        if not asked:
            asked.append(Interrupted(number))
            raise asked[0]

    def unraisable(args: Any) -> None:
        if asked and args.exc_value is asked[0]:  # a callback has swallowed it: nothing else would end the command
            end_now(asked[0].status, str(asked[0]))
        shown(args)

    shown, sys.unraisablehook = sys.unraisablehook, unraisable
    with listening(stop):
        try:
            status = command()
        except SystemExit as error:
            status = error.code
        except BaseException as error:
            cause = asked[0] if asked else error  # a library may have converted it to another error
            line = _line(cause)
            if line is None:
                raise
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                print(line, file=sys.stderr)
            status = getattr(cause, "status", EXIT_USER_ERROR)
    end_quietly(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)  # type: ignore[arg-type]


def _line(error: BaseException) -> str | None:
    """The line that a command prints for an error when it ends; None for a bug."""
    if isinstance(error, Interrupted | PreemptedError):
        return str(error)
    outside = isinstance(error, OSError) and error.errno in ONE_LINE
    outside |= isinstance(error, RuntimeError | ValueError) and system_error(error, ONE_LINE_AS_TEXT) is not None
    home = isinstance(error, RuntimeError) and "home directory" in reason(error)  # of `~NAME`, from pathlib
    if not isinstance(error, UserError | MemoryError) and not outside and not home:
        return None
    message = f"not enough memory. {reason(error)}" if isinstance(error, MemoryError) else reason(error)
    return f"error: {bounded(message)}"


def system_error(error: BaseException, numbers: Sequence[int]) -> str | None:
    """Returns which error of the system, one of the errno `numbers`, an exception reports; None if it reports none.

    An exception of a library reports one if it has its text, except for JAX's, whose errors are those of a device or of
    another process.
    """
    if isinstance(error, OSError):
        if error.errno not in numbers:
            return None
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if type(error).__name__ == "JaxRuntimeError":
        return None
    return next((text for text in map(os.strerror, numbers) if text in reason(error)), None)


def reason(error: BaseException) -> str:
    """The message of an exception, even if its `__str__` fails."""
    try:
        return str(error)
    except BaseException:  # an exception class from a user's file
        return "(it has no text)"


def bounded(message: str) -> str:
    """Shortens a message to fit a screen: omits the middle of long lines and messages, escapes control characters."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
    lines = [_without_middle(line, LONGEST_LINE) for line in shown.split("\n")]
    if len(lines) > MOST_LINES:
        last = MOST_LINES // 5
        first = MOST_LINES - 1 - last
        lines = [*lines[:first], f"... ({len(lines) - first - last} lines more) ...", *lines[-last:]]
    return _without_middle("\n".join(lines), MOST_CHARACTERS)


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    mark = f" ... ({len(text):,} characters) ... "
    last = (most - len(mark)) // 3  # the advice is often at the end
    return text[: most - len(mark) - last] + mark + text[-last:]
