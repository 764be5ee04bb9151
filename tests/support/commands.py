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
import signal
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


class Command:
    """As a `subprocess.Popen` whose output is read at the end."""

    def __init__(self, folder: Path, pid: int):
        self._folder, self.pid = folder, pid
        self.returncode: int | None = None
        self._output = ("", "")

    def poll(self) -> int | None:
        status = self._folder / "status"
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
            self._output = ((self._folder / "out").read_text(), (self._folder / "err").read_text())
            shutil.rmtree(self._folder)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return status

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        self.wait(timeout)
        return self._output

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_command(
    module: str, *arguments: object, cwd: Path = ROOT, devices: int | None = None, **environment: str
) -> Command:
    """`python -m quietstar_jax.MODULE ARGUMENTS...`; or a module of tests, by its whole name.

    Args:
      devices: of the CPU.
      environment: of a process of its own, shared by all commands that ask for the same.
    """
    server = _server(tuple(sorted(environment.items())))
    assert server.stdin
    assert server.stdout
    name = module if module.startswith("tests.") else f"quietstar_jax.{module}"
    server.stdin.write(json.dumps([name, str(cwd), devices, *map(str, arguments)]) + "\n")
    server.stdin.flush()
    folder, pid = json.loads(server.stdout.readline())
    return Command(Path(folder), pid)


def run_command(
    module: str, *arguments: object, after: tuple[float, int] | None = None, cwd: Path = ROOT,
    devices: int | None = None, **environment: str,
) -> Ended:  # fmt: skip
    """As `start_command`, to its end.

    Args:
      after: (seconds, signal) sends the signal after so many seconds, if the command still runs.
    """
    command = start_command(module, *arguments, cwd=cwd, devices=devices, **environment)
    if after:
        try:
            command.wait(after[0])
        except subprocess.TimeoutExpired:
            command.send_signal(after[1])
    output = command.communicate()
    return Ended(command.wait(), *output)


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **dict(environment), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def _start(module: str, cwd: str, devices: int | None, *arguments: str) -> tuple[str, int]:
    """Forks a process that forks the command, waits for it and writes its status."""
    folder = tempfile.mkdtemp()  # of no object, whose end in the child would remove it
    read, write = os.pipe()
    if os.fork():
        os.wait()
        os.close(write)
        with os.fdopen(read) as stream:
            return folder, int(stream.read())
    if os.fork():
        os._exit(0)  # what it leaves has no parent that would have to wait for it
    child = os.fork()
    if child:
        os.setpgid(child, child)
        os.write(write, str(child).encode())
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        Path(folder, "new").write_text(str(status))
        os.rename(Path(folder, "new"), Path(folder, "status"))
        os._exit(0)
    os.setpgid(0, 0)  # here as well, since it is not known which of the two comes first
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.close(read)
    os.close(write)
    os.chdir(cwd)
    if devices:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = [module, *arguments]
    _run(module)
    raise AssertionError("not reached")


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
    import quietstar_jax.studies.runner
    import quietstar_jax.training.loop
    import quietstar_jax.training.summary  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_start(*json.loads(line))), flush=True)
