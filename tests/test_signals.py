"""Ctrl-C, SIGTERM and SIGHUP: one line, the status that shells expect, no traceback; a second Ctrl-C at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
COMMANDS = ("train", "data.prepare", "evaluate", "generate", "export", "report", "study", "aot", "lm_eval")
# What a command does when the signal comes; `ready` has been printed just before.
WORK = {
    "waits": "time.sleep(60)",
    "cleans up": """
try:
    time.sleep(60)
finally:
    print("cleaned", flush=True)""",
    "makes an error of it": """
try:
    time.sleep(60)
except BaseException as error:
    raise RuntimeError("a library failed") from error""",
    "makes an error of it that a user could mend": """
try:
    time.sleep(60)
except BaseException as error:
    raise errors.DataError("cannot be read") from error""",
    "is in a callback that swallows it": """
class Slow:
    def __del__(self):
        time.sleep(60)
slow = Slow()
del slow
print("went on")""",
}


def start(work: str) -> subprocess.Popen:
    """A command of its own that prints `ready`, then does the work."""
    lines = ["print('ready', flush=True)", *work.strip().splitlines()]
    body = "".join(f"    {line}\n" for line in lines)
    script = (
        f"import hashlib, time\nfrom quietstar_jax import errors\ndef command():\n{body}errors.run_command(command)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("work", WORK)
def test_a_command_ends_with_one_line_whatever_it_does(work, number):
    process = start(WORK[work])
    time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.strip().count("\n") == 0, errors
    assert {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}[number] in errors
    assert output == ("cleaned\n" if work == "cleans up" else "")


def test_a_second_ctrl_c_ends_at_once_also_inside_compiled_code():
    process = start("hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")  # minutes, without a look at signals
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same press, which a launcher has passed on
    time.sleep(0.6)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert errors == "\nEnded immediately.\n"


def test_nohup_is_respected():
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c",
         "import time; from quietstar_jax import errors\n"
         "def command():\n    print('ready', flush=True); time.sleep(1); print('done')\nerrors.run_command(command)"],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "done\n"), errors


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_imports_what_it_needs(command):
    """After a random one of its first imports; without it each would end in a traceback."""
    imports = random.Random(command).randrange(30)
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", f"quietstar_jax.{command}", "--help"], cwd=ROOT, env=ENVIRONMENT,
        text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stderr:
        if line.rstrip().endswith(" quietstar_jax"):  # imported as a package; the command's module comes next
            break
    for _ in range(imports):
        process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    said = [line for line in errors.splitlines() if line and not line.startswith("import time:")]
    assert (process.returncode, said) == (130, ["Stopped by Ctrl-C."])
