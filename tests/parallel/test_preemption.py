"""A signal makes a run save and end with a status that says whether to start it again; nothing changes: bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time

import pytest

from quietstar_jax.errors import EXIT_RETRY, STOPPED, PreemptedError
from quietstar_jax.parallel.preemption import PreemptionNotice
from quietstar_jax.training.loop import train
from tests.parallel.test_processes import PATIENCE, ROOT, finish, latest, records, started, wait_for_step
from tests.training.tiny import tiny_config


@pytest.mark.slow
def test_a_signal_to_the_command_line_saves_and_says_to_start_again(tmp_path):
    seldom = ("--config.checkpoint.every_steps=100000", "--config.phases[1].steps=3000")
    with started(tmp_path, 1, *seldom) as (process,):
        wait_for_step(tmp_path, 5, [process])
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == EXIT_RETRY, errors[-2000:]
    saved = latest(tmp_path)
    assert f"after step {saved}, which is saved" in errors
    assert records(tmp_path)[-1]["step"] == saved
    finish(tmp_path, 1, f"--config.phases[1].steps={saved}")
    assert [record["step"] for record in records(tmp_path)] == list(range(1, saved + 4))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(tiny_config(workdir))
    return [records(workdir, kind) for kind in ("train", "evaluation")]


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("asked", "number", "status"),
    [(2, signal.SIGTERM, EXIT_RETRY), (4, signal.SIGINT, STOPPED), (30, signal.SIGHUP, EXIT_RETRY)],
    ids=["a step", "an evaluation", "the next phase"],
)
def test_resumed_bit_for_bit_wherever_the_notice_comes(uninterrupted, tmp_path, monkeypatch, asked, number, status):
    """The notice comes when the run asks for it for the n-th time: after steps, and before batches of evaluation."""
    signal_now = PreemptionNotice.signal_now

    def notice(self: PreemptionNotice) -> int:
        if self._asked + 1 == asked:
            signal.raise_signal(number)
        return signal_now(self)

    with monkeypatch.context() as patched:
        patched.setattr(PreemptionNotice, "signal_now", notice)
        with pytest.raises(PreemptedError) as error:
            train(tiny_config(tmp_path))
    assert error.value.status == status
    train(tiny_config(tmp_path))
    assert [records(tmp_path, kind) for kind in ("train", "evaluation")] == uninterrupted
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 7


@pytest.mark.slow
def test_signals_at_random_moments_cost_nothing(uninterrupted, tmp_path):
    """During reading, compiling, steps, saving, the summary: one line each time, and the same figures."""
    draw = random.Random(13)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        with started(tmp_path, 1) as (process,):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(0.2, 8))
            process.send_signal(number)
            _, errors = process.communicate(timeout=PATIENCE)
        during_imports = -signal.SIGTERM  # they have nothing to save, and only Ctrl-C is worth a line there
        assert process.returncode in (0, EXIT_RETRY, 128 + number, during_imports), errors[-2000:]
        assert "Traceback" not in errors
        stopped = [line for line in errors.splitlines() if line.startswith("Stopped by")]
        assert len(stopped) == (process.returncode > 0), errors[-2000:]
    finish(tmp_path, 1)
    assert [records(tmp_path, kind) for kind in ("train", "evaluation")] == uninterrupted


def test_a_closed_terminal_saves_and_ends(tmp_path):
    ours, theirs = pty.openpty()
    on_terminal = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", on_terminal, "-m", "quietstar_jax.train", "--config", "tests/parallel/tiny_run.py",
               f"--config.workdir={tmp_path}", "--config.phases[0].steps=100000", "--config.logging.progress_bar=True",
               "--config.checkpoint.every_steps=100000"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=theirs)
    os.close(theirs)
    try:
        deadline = time.monotonic() + PATIENCE
        while not records(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < deadline
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 4096)
        os.close(ours)
        assert process.wait(timeout=PATIENCE) == EXIT_RETRY
    finally:
        process.kill()
        process.wait()
    assert latest(tmp_path) == records(tmp_path)[-1]["step"]
