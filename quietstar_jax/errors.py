"""Errors that a user can mend, and the exit statuses of command lines.

A launcher starts a run again that ended with `EXIT_RETRY`, or was killed (a status above 128, but not `STOPPED`); with
0 it is done, with any other something is to be mended first.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from quietstar_jax.signals import Interrupted, end_now, end_quietly, listening

EXIT_USER_ERROR = 2  # exit status: an unchanged restart fails again
EXIT_RETRY = 75  # exit status: a restarted run resumes where it stopped (EX_TEMPFAIL of sysexits.h)
STOPPED = 130  # exit status: stopped with Ctrl-C; the same command resumes

MOST_LINES, MOST_CHARACTERS, LONGEST_LINE = 25, 2000, 600  # of a message on the terminal
OUTSIDE = frozenset(  # errors of the system that no change of this program would prevent
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
     errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)  # fmt: skip

# The same in the words of libraries that raise errors of their own for it.
OUTSIDE_TEXTS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))


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


class PreemptedError(UserError):
    """The run was asked to stop, and has saved where it is."""

    def __init__(self, message: str, status: int = EXIT_RETRY):
        super().__init__(message)
        self.status = status


def short(value: object, spell: Callable[[object], str] = repr) -> str:
    """A value from a file, spelled so that it cannot fill the screen."""
    try:
        text = spell(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of very many digits"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs a command line, which returns its exit status or None for 0, and exits with that.

    What a user can mend ends with a message and the status of the error. So do errors of the file system (no space, no
    permission, a name that is too long) and too little memory. Any other exception is a defect, with its traceback and
    status 1. Ctrl-C, SIGTERM and SIGHUP end a command with one line and status 128 + signal, after it has cleaned up.
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
            found = asked[0] if asked else error  # a library may have made another error of it
            line = _line(found)
            if line is None:
                raise
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                print(line, file=sys.stderr)
            status = getattr(found, "status", EXIT_USER_ERROR)
    end_quietly(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)  # type: ignore[arg-type]


def _line(error: BaseException) -> str | None:
    """What a command says of an error at its end; None of a defect."""
    if isinstance(error, Interrupted | PreemptedError):
        return str(error)
    outside = isinstance(error, OSError) and error.errno in OUTSIDE
    if isinstance(error, RuntimeError | ValueError) and type(error).__name__ != "JaxRuntimeError":  # that: of a device
        outside = any(text in reason(error) for text in OUTSIDE_TEXTS)
    home = isinstance(error, RuntimeError) and "home directory" in reason(error)  # of `~NAME`, from pathlib
    if not isinstance(error, UserError | MemoryError) and not outside and not home:
        return None
    said = f"not enough memory. {reason(error)}" if isinstance(error, MemoryError) else reason(error)
    return f"error: {bounded(said)}"


def reason(error: BaseException) -> str:
    """What an exception says, whatever kind it is."""
    try:
        return str(error)
    except BaseException:  # an exception of a file of the user
        return "(it has no text)"


def bounded(message: str) -> str:
    """A message that fits a screen: long lines and long messages without their middle, no control characters."""
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
    last = (most - len(mark)) // 3  # what to do is often said at the end
    return text[: most - len(mark) - last] + mark + text[-last:]
