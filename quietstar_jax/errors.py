"""Errors that a user can mend, and the exit statuses of command lines.

A launcher starts a run again that ended with `START_AGAIN`, or was killed (a status above 128); with 0 it is done, with
any other something is to be mended first.
"""

import errno
import sys
from collections.abc import Callable

MEND_FIRST = 2  # exit status: started again, it would only fail again
START_AGAIN = 75  # exit status: started again, the run goes on where it stopped (EX_TEMPFAIL of sysexits.h)

MOST_LINES, MOST_CHARACTERS, LONGEST_LINE = 25, 2000, 600  # of a message on the terminal
OUTSIDE = frozenset(  # errors of the system that no change of this program would prevent
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
     errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)  # fmt: skip


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


def short(value: object, spell: Callable[[object], str] = repr) -> str:
    """A value from a file, spelled so that it cannot fill the screen."""
    try:
        text = spell(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of very many digits"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def run_command(command: Callable[[], object]) -> None:
    """Runs a command line; it returns its exit status, or None for 0.

    What a user can mend ends with a message and the status of the error. So do errors of the file system (no space, no
    permission, a name that is too long) and too little memory. Any other exception is a defect, with its traceback and
    status 1.
    """
    try:
        sys.exit(command())  # type: ignore[arg-type]
    except (UserError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in OUTSIDE:
            raise
        if isinstance(error, RuntimeError) and "home directory" not in reason(error):  # of `~NAME`, from pathlib
            raise
        said = f"not enough memory. {reason(error)}" if isinstance(error, MemoryError) else reason(error)
        print(f"error: {bounded(said)}", file=sys.stderr)
        sys.exit(getattr(error, "status", MEND_FIRST))


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
