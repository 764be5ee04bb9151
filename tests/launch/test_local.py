"""`launch/local.sh`, run for real: two processes that make one run, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quietstar_jax.errors import EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[2]


def start(tmp_path: Path, steps: int, *more: str) -> subprocess.Popen:
    config = tmp_path / "tiny.py"
    config.write_text(
        "from pathlib import Path\n"
        "from tests.training.tiny import tiny_config_dict\n"
        "def get_config():\n"
        f"    config = tiny_config_dict(Path({str(tmp_path / 'run')!r}))\n"
        f"    config.phases = config.phases[:1]\n"
        f"    config.phases[0].steps = {steps}\n"
        "    config.distributed.heartbeat_seconds = 10\n"
        "    return config\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PORT": str(port), "PROCESSES": "2", "RESTART_SECONDS": "0",
        "MAX_RESTARTS": "2", "LOGS": str(tmp_path / "logs"),
    }  # fmt: skip
    return subprocess.Popen(
        [ROOT / "launch/local.sh", "--config", config, *more],
        env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until(holds: Callable[[], bool], launcher: subprocess.Popen, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert launcher.poll() is None, launcher.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)


def process_number(number: int, launcher: subprocess.Popen) -> int:
    """The id of a training process below the launcher."""
    found = subprocess.run(["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in found.splitlines()[1:]]
    below = {launcher.pid}
    for pid, parent, _ in sorted(rows, key=lambda row: int(row[0])):
        if int(parent) in below:
            below.add(int(pid))
    [pid] = [
        int(pid)
        for pid, _, command in rows
        if int(pid) in below and f"process_id={number}" in command and command.startswith(sys.executable)
    ]
    return pid


@pytest.mark.slow
def test_a_killed_process_makes_all_start_again_and_the_run_is_finished(tmp_path):
    steps = 100
    launcher = start(tmp_path, steps)
    checkpoints = tmp_path / "run/checkpoints"
    wait_until(lambda: any(path.name.isdigit() for path in checkpoints.glob("*")), launcher)
    os.kill(process_number(1, launcher), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    assert "launch: status" in said
    assert "restart 1 of at most 2" in said
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == steps


def test_an_error_that_must_be_mended_stops_at_once(tmp_path):
    launcher = start(tmp_path, 2, "--config.mesh.tensor=3")
    said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == EXIT_USER_ERROR, said
    assert "config.mesh" in said
    assert "restart" not in said
