"""Command lines of the package without their start, which takes longer than most of what tests ask of them.

A process imports what the commands import and forks for each command line; the child then does what `python -m` does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """As of `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def run_command(
    module: str, *arguments: object, cwd: Path = ROOT, after: tuple[float, int] | None = None, **environment: str
) -> Ended:
    """`python -m quietstar_jax.MODULE ARGUMENTS...` to its end.

    Args:
      after: (seconds, signal) sends the signal after so many seconds, if the command still runs.
      environment: of a process of its own, shared by all commands that ask for the same.
    """
    server = _server(tuple(sorted(environment.items())))
    assert server.stdin
    assert server.stdout
    request = [f"quietstar_jax.{module}", str(cwd), after, *map(str, arguments)]
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return Ended(*json.loads(server.stdout.readline()))


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **dict(environment), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def _answer(module: str, cwd: str, after: tuple[float, int] | None, *arguments: str) -> Ended:
    folder = tempfile.mkdtemp()  # of no object, whose end in the child would remove it
    out, err = Path(folder, "out"), Path(folder, "err")
    child = os.fork()
    if not child:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        sys.argv = [module, *arguments]
        os.setpgid(0, 0)
        _run(module)
    ended = 0, 0
    if after:
        deadline = time.monotonic() + after[0]
        while ended == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.005)
            ended = os.waitpid(child, os.WNOHANG)
        if ended == (0, 0):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, after[1])
    status = os.waitstatus_to_exitcode((ended if ended != (0, 0) else os.waitpid(child, 0))[1])
    answer = Ended(status, out.read_text(), err.read_text())
    shutil.rmtree(folder)
    return answer


def _run(module: str) -> None:
    """Never returns: the child must not come back to the loop of its parent."""
    status: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    try:
        atexit._run_exitfuncs()  # as at the end of a process: JAX and orbax end their threads
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))  # type: ignore[call-overload]


if __name__ == "__main__":
    # Everything but the modules of the commands, which define their flags when they are run.
    from absl import app  # noqa: F401
    from ml_collections import config_flags  # noqa: F401

    import quietstar_jax.planning.search
    import quietstar_jax.training.loop
    import quietstar_jax.training.summary  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), flush=True)
