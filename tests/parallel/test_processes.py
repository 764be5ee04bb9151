"""Several processes make one run: the same losses, one reader per sequence, and an end for all where one is gone."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quietstar_jax.errors import EXIT_RETRY, EXIT_USER_ERROR, STOPPED
from tests.support.commands import Command, run_command, start_command

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds for a run on a machine that does other things too


@contextlib.contextmanager
def started(workdir: Path, count: int, *settings: str, devices: int = 1) -> Iterator[list[Command]]:
    """The real command line in `count` processes with `devices` each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = ["train", "--config", "tests/parallel/tiny_run.py", f"--config.workdir={workdir}", *settings]
    if count > 1:
        command += ["--config.distributed.processes=given", f"--config.distributed.coordinator=localhost:{port}",
                    f"--config.distributed.num_processes={count}"]  # fmt: skip
    processes = []
    try:
        for i in range(count):
            own = [f"--config.distributed.process_id={i}"] if count > 1 else []
            processes.append(start_command(*command, *own, devices=devices))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(workdir: Path, count: int, *settings: str, devices: int = 1) -> list[str]:
    """What each of them printed; all end well."""
    with started(workdir, count, *settings, devices=devices) as processes:
        ended = [process.communicate(timeout=PATIENCE) for process in processes]
        for process, (_, errors) in zip(processes, ended, strict=True):
            assert process.returncode == 0, errors[-2000:]
        # Gloo itself says on every process whom it found.
        return ["\n".join(line for line in out.splitlines() if not line.startswith("[Gloo]")) for out, _ in ended]


def records(workdir: Path, kind: str = "train") -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def losses(workdir: Path, kind: str = "train") -> dict[int, float]:
    name = "loss" if kind == "train" else "loss_with_thoughts"
    return {record["step"]: record[name] for record in records(workdir, kind)}


def wait_for_step(workdir: Path, step: int, processes: list[Command]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(record["step"] >= step for record in records(workdir)):
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    finish(workdir, 1)
    return workdir


def assert_same_run(workdir: Path, alone: Path) -> None:
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-5)
    evaluated = losses(workdir, "evaluation")  # also where a run of fewer steps ended
    assert {step: evaluated[step] for step in (3, 7)} == pytest.approx(losses(alone, "evaluation"), rel=1e-5)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, alone)]
    for name in ("useful_sampled_thought_rate", "answer_accuracy_with_thoughts", "unique_thought_rate"):
        assert summaries[0][name] == summaries[1][name], name


@pytest.mark.slow
def test_4_processes_are_one_run_that_one_process_goes_on_with(alone, tmp_path):
    printed = finish(tmp_path, 4, "--config.phases[1].steps=2")
    assert "held-out text" in printed[0]
    assert printed[1:] == ["", "", ""]
    (tmp_path / "summary.json").unlink()
    finish(tmp_path, 1)
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_2_processes_with_2_devices_where_both_hold_the_same_rows(alone, tmp_path):
    """The positions are split between the processes and the sequences within each: one reader for both."""
    finish(tmp_path, 2, "--config.mesh.position=2", "--config.mesh.fsdp=2", devices=2)
    assert_same_run(tmp_path, alone)


LONG = ("--config.phases[1].steps=3000", "--config.checkpoint.every_steps=20")


@pytest.mark.some(1)
@pytest.mark.parametrize(("victim", "resumed_by"), [(0, 1), (1, 2)])
def test_one_process_killed_stops_the_other_and_the_run_resumes(tmp_path, victim, resumed_by):
    with started(tmp_path, 2, *LONG) as processes:
        wait_for_step(tmp_path, 25, processes)
        processes[victim].send_signal(signal.SIGKILL)
        _, errors = processes[1 - victim].communicate(timeout=30)  # heartbeat_seconds of the configuration, and a bit
        assert processes[1 - victim].returncode not in (0, EXIT_USER_ERROR)
    assert "lost the connection to another one" in errors or "another task died" in errors, errors
    before, saved = losses(tmp_path), latest(tmp_path)
    assert saved >= 20
    finish(tmp_path, resumed_by, f"--config.phases[1].steps={saved + 5}")
    after = losses(tmp_path)
    assert list(after) == list(range(1, saved + 9))
    assert after == pytest.approx({step: before.get(step, loss) for step, loss in after.items()}, rel=1e-5)


def latest(workdir: Path) -> int:
    return max(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.mark.parametrize(
    ("number", "heard_by", "status"), [(signal.SIGTERM, 1, EXIT_RETRY), (signal.SIGINT, 0, STOPPED)]
)
def test_told_to_stop_all_save_the_same_step(tmp_path, number, heard_by, status):
    with started(tmp_path, 2, *LONG) as processes:
        wait_for_step(tmp_path, 5, processes)
        processes[heard_by].send_signal(number)
        ended = [process.communicate(timeout=PATIENCE) for process in processes]
        for process, (_, errors) in zip(processes, ended, strict=True):
            assert process.returncode == status, errors[-2000:]
            assert f"after step {latest(tmp_path)}, which is saved" in errors


def test_all_stop_at_the_same_step_when_thoughts_collapse(tmp_path):
    """The first process alone has the records of the metrics, and alone writes a profile."""
    settings = ("--config.thought.sampling_temperature=1e-4", "--config.logging.stop_on_collapse=True",
                "--config.phases[1].steps=9", "--config.checkpoint.every_steps=100",
                "--config.logging.profile_steps=(5,20)")  # fmt: skip
    for _ in range(2):  # the second time before the first step
        with started(tmp_path, 2, *settings) as processes:
            ended = [process.communicate(timeout=PATIENCE) for process in processes]
            for process, (_, errors) in zip(processes, ended, strict=True):
                assert process.returncode == EXIT_USER_ERROR, errors[-2000:]
                assert "collapsed at step 6" in errors
                assert "state after step 7 is saved" in errors
        assert latest(tmp_path) == 7
    assert len(list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_processes_that_do_not_find_each_other_say_so(tmp_path):
    command = ("train", "--config", "tests/parallel/tiny_run.py", f"--config.workdir={tmp_path}")
    run = functools.partial(run_command, *command)
    given = ["--config.distributed.processes=given", "--config.distributed.coordinator=localhost:1",
             "--config.distributed.num_processes=2", "--config.distributed.process_id=1",
             "--config.distributed.start_seconds=2"]  # fmt: skip
    for settings in (["--config.distributed.processes=cluster"], given, [*given, "--config.distributed.process_id=2"]):
        ended = run(*settings)
        assert ended.returncode == EXIT_USER_ERROR, ended.stderr[-2000:]
        assert "config.distributed" in ended.stderr
