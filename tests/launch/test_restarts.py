"""The launch scripts, run with stand-ins for the cloud: runs are started again exactly when that helps."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from quietstar_jax.errors import EXIT_RETRY, EXIT_USER_ERROR, STOPPED
from tests.launch.scripts import LAUNCH, VARIABLES, dry_run, heredoc, launch, tools


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, 0), (EXIT_RETRY, 1), (137, 1), (STOPPED, 0), (EXIT_USER_ERROR, 0), (1, 0)]
)
@pytest.mark.parametrize(("restarts", "may"), [("0", 1), ("50", 0)])
def test_a_slurm_job_requeues_itself_when_that_helps(tmp_path, status, requeued, restarts, may):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{shlex.quote(str(tmp_path / "requeued"))}\n')
    for tool in ("srun", "scontrol"):
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    ended = subprocess.run(
        ["bash", "-c", heredoc(dry_run("slurm"))],
        check=False, capture_output=True, env={**environment, "SLURM_RESTART_COUNT": restarts},
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert (tmp_path / "requeued").exists() == bool(requeued and may)


@pytest.mark.parametrize(
    ("statuses", "final", "requeued"),
    [([1, 134], 1, False), ([EXIT_RETRY, EXIT_USER_ERROR], EXIT_USER_ERROR, False), ([EXIT_RETRY, 137], 137, True),
     ([0, EXIT_RETRY], EXIT_RETRY, True), ([0, 0], 0, False)],
)  # fmt: skip
def test_a_slurm_job_is_not_requeued_for_the_error_of_one_task(tmp_path, statuses, final, requeued):
    """With an srun that runs the tasks and, as the real one does, ends with the highest status."""
    python = tmp_path / "my python"
    python.write_text("#!/bin/sh\nexit $RANK_STATUS\n")
    python.chmod(0o755)
    srun = f"""while [[ $1 == --* ]]; do shift; done
    for status in {" ".join(map(str, statuses))}; do RANK_STATUS=$status "$@"; done
    exit {max(statuses)}"""
    mark = shlex.quote(str(tmp_path / "requeued"))
    path = tools(tmp_path / "bin", srun=srun, scontrol=f"touch {mark}")
    (tmp_path / "my logs").mkdir()
    batch = heredoc(dry_run("slurm", PYTHON=str(python), LOGS=str(tmp_path / "my logs")))
    ended = subprocess.run(
        ["bash", "-c", batch], check=False, capture_output=True, env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}
    )
    assert ended.returncode == final, ended.stderr
    assert (tmp_path / "requeued").exists() == requeued
    assert not list((tmp_path / "my logs").iterdir())


def test_a_slurm_task_hands_sigterm_on_and_waits(tmp_path):
    up = shlex.quote(str(tmp_path / "up"))
    run = f"trap 'sleep 0.3; exit {EXIT_RETRY}' TERM; touch {up}; while true; do sleep 0.05; done"
    task = subprocess.Popen([LAUNCH / "slurm_task.sh", tmp_path / "final", "bash", "-c", run])
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    task.terminate()
    assert task.wait(timeout=30) == EXIT_RETRY
    assert not (tmp_path / "final").exists()


GONE = "!(describe) NOT_FOUND: Resource was not found"
RUNS = ["ACTIVE", "active"]


@pytest.mark.parametrize(
    ("answers", "calls", "status"),
    [
        ([GONE, "ACTIVE", "", "ACTIVE", "inactive", *RUNS, "ACTIVE", "0", GONE], "create delete", 0),
        (["ACTIVE", "1", "ACTIVE", GONE], "delete delete", 1),  # the first deletion fails
        ([*RUNS, "!quota exceeded", "!503", *RUNS, "ACTIVE", "!ssh: timed out", "ACTIVE", "0", GONE], "delete", 0),
        ([*RUNS, "SUSPENDING", "SUSPENDED", "SUSPENDED", GONE, *RUNS, "ACTIVE", "0", GONE],
         "delete delete create delete", 0),
        (["FAILED", "!503", GONE, "PROVISIONING", "ACTIVE", "2", GONE], "delete create delete", EXIT_USER_ERROR),
        (["ACTIVE", "inactive", GONE], "delete", EXIT_USER_ERROR),  # nothing has run for IDLE_SECONDS
        ([GONE, GONE, GONE], "create create", EXIT_USER_ERROR),  # refused, until MAX_RESTARTS
    ],
    ids=["ends", "delete-fails", "errors", "preempted", "failed", "idle", "refused"],
)  # fmt: skip
def test_slices_are_deleted_only_when_lost_or_done(tmp_path, answers, calls, status):
    """A gcloud that gives these answers, in turn, to `describe` and `ssh`; one with ! is an error."""
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    gcloud = f"""cd {shlex.quote(str(tmp_path))}
    case "$4" in
      describe | ssh)
        read -r answer <answers && sed -i 1d answers || {{ kill $PPID; exit 1; }}
        if [[ $answer == !* ]]; then echo "ERROR: ${{answer#!}}" >&2; exit 1; fi
        echo "$answer" ;;
      create) echo create >>calls; [[ $(head -1 answers) != !* ]] ;;
      delete) echo delete >>calls; [[ $(head -1 answers) == !* ]] ;;
    esac"""
    ended = launch(
        "queued_resource", "--config", "c.py", PATH=tools(tmp_path / "bin", gcloud=gcloud, git="exit 0"),
        POLL_SECONDS="0.02", IDLE_SECONDS="0" if answers[1] == "inactive" else "9", MAX_RESTARTS="1",
        RESTART_SECONDS="0", MAX_RESTART_SECONDS="0",
    )  # fmt: skip
    assert ended.returncode == status, ended.stderr
    assert (tmp_path / "calls").read_text().split() == calls.split()
    assert all(answer[1:] in ended.stderr for answer in answers if answer.startswith("!") and answer != GONE)


HOST = {
    "mountpoint": "exit 1", "mkdir": "exit 0", "mount": "exit 0", "apt_get": "exit 0", "python3": "exit 0",
}  # fmt: skip


def tpu_host(tmp_path: Path, train: str, **scripts: str) -> subprocess.Popen:
    repository = tmp_path / "repository"
    shutil.copytree(LAUNCH, repository / "launch")
    (repository / ".venv").mkdir()
    tools(repository / ".venv/bin", python=train)
    path = tools(tmp_path / "bin", **{**HOST, **scripts})
    return subprocess.Popen(
        [repository / "launch/tpu_host.sh", "--config", "c.py"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **VARIABLES, "PATH": path, "RESTART_SECONDS": "0", "MAX_RESTART_SECONDS": "0"},
    )  # fmt: skip


@pytest.mark.parametrize("status", [0, 1, EXIT_USER_ERROR])
def test_a_host_leaves_the_status_of_its_run(tmp_path, status):
    host = tpu_host(tmp_path, f"exit {status}")
    host.communicate(timeout=30)
    assert host.returncode == status
    assert (tmp_path / "repository/exit_status").read_text() == f"{status}\n"


@pytest.mark.parametrize(("failures", "status"), [(3, 0), (4, 100)])
def test_a_host_insists_on_its_installation_and_says_when_it_failed(tmp_path, failures, status):
    count = shlex.quote(str(tmp_path / "count"))
    fails = f'[[ "$*" != *install* ]] || {{ echo x >>{count}; (($(wc -l <{count}) > {failures})) || exit 100; }}'
    host = tpu_host(tmp_path, "exit 0", apt_get=fails)
    _, said = host.communicate(timeout=30)
    assert host.returncode == status, said
    assert (tmp_path / "repository/exit_status").read_text() == f"{status}\n"


@pytest.mark.parametrize(
    ("during", "leaves", "left"),
    [("train", EXIT_RETRY, None), ("train", 143, None), ("train", 0, "0\n"), ("train", 1, "1\n"),
     ("install", EXIT_RETRY, None)],
)  # fmt: skip
def test_a_host_told_to_leave_does_not_say_that_the_run_ended(tmp_path, during, leaves, left):
    up = tmp_path / "up"
    train = f"trap 'exit {leaves}' TERM; touch {shlex.quote(str(up))}; while true; do sleep 0.05; done"
    install = f"touch {shlex.quote(str(up))}; sleep 0.5"
    host = tpu_host(tmp_path, train, **({"apt_get": install} if during == "install" else {}))
    while not up.exists():
        time.sleep(0.02)
    host.terminate()
    host.communicate(timeout=30)
    file = tmp_path / "repository/exit_status"
    assert host.returncode == leaves
    assert (file.read_text() if file.exists() else None) == left


def again(script: str, **variables: str) -> subprocess.CompletedProcess:
    command = f"set -euo pipefail; source {shlex.quote(str(LAUNCH / 'common.sh'))}; {script}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, "RESTART_SECONDS": "0", "MAX_RESTART_SECONDS": "0", **variables},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "final"),
    [([0], 0), ([EXIT_RETRY, EXIT_RETRY, 0], 0), ([137, 0], 0), ([1], 1), ([EXIT_USER_ERROR], EXIT_USER_ERROR),
     ([STOPPED], STOPPED), ([EXIT_RETRY, EXIT_USER_ERROR], EXIT_USER_ERROR), ([EXIT_RETRY] * 4, EXIT_RETRY)],
)  # fmt: skip
def test_a_run_is_started_again_while_that_helps(tmp_path, statuses, final):
    count = tmp_path / "count"
    attempt = (
        f"attempt() {{ echo x >>{count}; statuses=({' '.join(map(str, statuses))}); "
        f'return "${{statuses[$(wc -l <{count}) - 1]}}"; }}; '
    )
    ended = again(f"{attempt} again attempt", MAX_RESTARTS="3")
    assert ended.returncode == final, ended.stderr
    assert len(count.read_text().split()) == len(statuses)


def test_sigterm_reaches_the_run_and_ends_the_restarts(tmp_path):
    saved = tmp_path / "saved"
    run = f"""attempt() {{
        trap 'echo x >>{saved}; exit {EXIT_RETRY}' TERM
        touch {tmp_path}/up
        while true; do sleep 0.05; done
    }}
    (again attempt) & launcher=$!
    while [[ ! -e {tmp_path}/up ]]; do sleep 0.05; done
    kill -TERM $launcher; wait_for $launcher"""
    ended = again(run)
    assert ended.returncode == EXIT_RETRY, ended.stderr
    assert saved.read_text().split() == ["x"]
