"""The launch scripts: what a dry run prints, and that runs are started again exactly when that helps."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from quietstar_jax.errors import EXIT_RETRY, EXIT_USER_ERROR, STOPPED

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("local", "slurm", "gke_jobset", "xpk", "tpu_host", "tpu_vm", "queued_resource")
AWKWARD = [
    "--config",
    "configs/a.py",
    "--config.data.train=('my text/*.jsonl',)",
    """--config.workdir=/runs/"b$c'd\\e""",
]
VARIABLES = {
    "PROJECT": "p", "ZONE": "us-west4-a", "CLUSTER": "c", "IMAGE": "i/q:1", "CLAIM": "runs",
    "SOURCE": "gs://b/q.tar.gz", "SHARED": "10.0.0.2:/runs",
}  # fmt: skip


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(LAUNCH / f"{script}.sh"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **VARIABLES, **variables},
    )  # fmt: skip


def dry_run(script: str, *arguments: str, **variables: str) -> str:
    ended = launch(script, "--dry-run", *(arguments or AWKWARD), **variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shell_words(line: str) -> list[str]:
    """The words that bash makes of a line; shlex does not know $'...'."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return printed.stdout.split("\0")[:-1]


def heredoc(printed: str) -> str:
    return printed.split("<<'EOF'\n")[1].split("\nEOF\n")[0]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if path.stem in SCRIPTS:
        assert "set -euo pipefail" in path.read_text()
        assert os.access(path, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is absent")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", "--external-sources", *sorted(LAUNCH.glob("*.sh"))], cwd=LAUNCH, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_touches_nothing_and_is_shell_again(script, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("gcloud", "kubectl", "xpk", "sbatch", "apt-get", "mount"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\ntouch " + shlex.quote(str(tmp_path / "touched")) + "\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    printed = dry_run(script, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", LOGS=str(tmp_path / "logs"))
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "logs").exists()
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "local"])
@pytest.mark.parametrize("form", ["--config.workdir={}", "--config.workdir {}"])
def test_a_work_directory_that_only_one_host_has_is_refused(script, form):
    def ended(workdir: str) -> subprocess.CompletedProcess:
        arguments = [
            "--config",
            "c.py",
            "--config.workdir=/runs/overridden",
            *form.format(workdir).split(" "),
            "--more",
        ]
        return launch(script, "--dry-run", *arguments, NODES="2")

    relative = () if script == "slurm" else ("runs/mine",)  # where the repository is shared, so is a folder in it
    elsewhere = () if script in ("slurm", "xpk") else ("/home/me/run", "/runsome/mine")
    for workdir in ("/tmp/run", "/dev/shm/run", *relative, *elsewhere):
        assert ended(workdir).returncode == EXIT_USER_ERROR, workdir
        assert f"config.workdir {workdir} is another folder on each host" in ended(workdir).stderr
    for workdir in ("/runs/mine", "gs://bucket/run"):
        assert ended(workdir).returncode == 0, ended(workdir).stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named(script):
    ended = launch(script, "--dry-run")
    assert ended.returncode == 2
    assert "nothing to run" in ended.stderr
    ended = launch(script, "--dry-run", "--config", "c.py", **dict.fromkeys(VARIABLES, ""))
    if script in ("local", "slurm"):
        assert ended.returncode == 0
    else:
        assert ended.returncode == 2
        assert "is empty. Set it" in ended.stderr


def test_help_is_the_head_of_the_script():
    assert "launch/slurm.sh [--dry-run] --config" in launch("slurm", "--help").stdout


def test_local_processes_know_each_other():
    lines = dry_run("local", PROCESSES="3", DEVICES="4").splitlines()
    commands = [shlex.split(line.removesuffix("&")) for line in lines if "quietstar_jax.train" in line]
    assert len(commands) == 3
    for i, command in enumerate(commands):
        assert command[:3] == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"]
        assert all(argument in command for argument in AWKWARD)
        assert f"--config.distributed.process_id={i}" in command
        assert "--config.distributed.num_processes=3" in command


def test_slurm_runs_a_task_per_gpu_and_requeues():
    printed = dry_run("slurm", NODES="4", GPUS="8", ACCOUNT="a b", TIME="1:00:00")
    options = shlex.split(next(line for line in printed.splitlines() if line.startswith("sbatch")).split("<<")[0])
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@300", "--requeue",
            "--account=a b"} <= set(options)  # fmt: skip
    batch = heredoc(printed)
    step = shlex.split(next(line for line in batch.splitlines() if line.startswith("srun")).removesuffix("&"))
    assert all(argument in step for argument in AWKWARD)
    assert step[-1] == "--config.distributed.processes=cluster"
    assert {"--gpu-bind=none", "--cpus-per-task=12"} <= set(step)


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


@pytest.mark.parametrize(
    ("topology", "chips", "slices", "hosts"), [("4x4", "4", "1", 4), ("2x2x4", "4", "3", 4), ("2x4", "8", "1", 1)]
)
def test_a_jobset_has_a_job_per_slice_and_a_pod_per_host(topology, chips, slices, hosts):
    printed = dry_run("gke_jobset", TOPOLOGY=topology, CHIPS_PER_HOST=chips, SLICES=slices, SPOT="true", QUEUE="q")
    jobset = yaml.safe_load(heredoc(printed))
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == int(slices)
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy takes nothing else
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": topology,
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": int(chips)}
    patient = "--config.distributed.start_seconds=86400"
    assert container["args"] == [*AWKWARD, patient, "--config.distributed.processes=cluster"]
    assert {item["name"] for item in pod["volumes"]} == {item["name"] for item in container["volumeMounts"]}


def test_a_jobset_starts_again_what_saved_or_was_killed_and_nothing_else():
    jobset = yaml.safe_load(heredoc(dry_run("gke_jobset", MAX_RESTARTS="7")))["spec"]
    assert jobset["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    evicted, ended = job["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Count"
    assert ended["action"] == "FailJob"
    assert ended["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert ended["onExitCodes"]["operator"] == "NotIn"
    assert {EXIT_RETRY, 129, 132, 134, 136, 137, 139, 141, 143} <= set(ended["onExitCodes"]["values"])
    assert not {1, EXIT_USER_ERROR, STOPPED} & set(ended["onExitCodes"]["values"])
    assert job["backoffLimit"] == 0


def test_a_jobset_waits_as_long_as_it_is_told_and_takes_any_name():
    names = {"NAME": "no", "NAMESPACE": "1e3", "QUEUE": "on", "CLAIM": "0x1f"}  # YAML sees no strings in these
    own = ["--config", "c.py", "--config.distributed.start_seconds=60"]
    jobset = yaml.safe_load(heredoc(dry_run("gke_jobset", *own, **names)))
    assert jobset["metadata"]["name"] == "no"
    assert jobset["metadata"]["namespace"] == "1e3"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "on"}
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "0x1f"}
    assert pod["containers"][0]["args"] == [*own, "--config.distributed.processes=cluster"]


def test_a_topology_that_is_none_is_refused():
    for topology in ("16", "4x4x4x4", "x", "3x3"):
        ended = launch("gke_jobset", "--dry-run", "--config", "c.py", TOPOLOGY=topology)
        assert ended.returncode == 2
        assert "TOPOLOGY" in ended.stderr


def test_xpk_hands_the_command_over_whole():
    words = shlex.split(dry_run("xpk"))
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command)[:4] == ["exec", "python", "-m", "quietstar_jax.train"]
    assert shlex.split(command)[4:-1] == AWKWARD
    assert f"--restart-on-exit-codes={EXIT_RETRY}" in words


@pytest.mark.parametrize("script", ["tpu_vm", "queued_resource"])
def test_hosts_of_a_slice_are_given_the_arguments_as_they_were(script, tmp_path):
    """Runs what a host would run, with stand-ins for the cloud."""
    for tool, does in (("gcloud", "exit 0"), ("tar", "exit 0"), ("mkdir", "exit 0"), ("sudo", '"$@"'),
                       ("systemd-run", f'printf "%s\\0" "$@" >{shlex.quote(str(tmp_path / "unit"))}')):  # fmt: skip
        (tmp_path / tool).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / tool).chmod(0o755)
    printed = dry_run(script, PYTHON_VERSION="3.12", RESTART_SECONDS="7", MAX_RESTART_SECONDS="8")
    if script == "tpu_vm":
        ssh = next(line for line in printed.splitlines() if "--worker=all" in line)
        text = next(word for word in shell_words(ssh) if word.startswith("--command=")).removeprefix("--command=")
    else:
        text = heredoc(printed)
    subprocess.run(["bash", "-c", text], check=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    unit = (tmp_path / "unit").read_bytes().decode().split("\0")[:-1]
    assert [word.replace("$$", "$") for word in unit[-len(AWKWARD) :]] == AWKWARD  # systemd reads $$ as $
    given = (
        "SHARED=10.0.0.2:/runs",
        "MAX_RESTARTS=50",
        "PYTHON_VERSION=3.12",
        "RESTART_SECONDS=7",
        "MAX_RESTART_SECONDS=8",
    )
    assert {f"--setenv={variable}" for variable in given} <= set(unit)


def test_queued_resources_are_asked_for_again():
    printed = dry_run("queued_resource", SLICES="2", SPOT="true")
    creates = [shlex.split(line) for line in printed.splitlines() if "queued-resources create" in line]
    assert len(creates) == 2
    assert {"--node-count=2", "--node-prefix=quietstar", "--spot", "--scopes=cloud-platform"} <= set(creates[0])
    [single] = {line for line in dry_run("queued_resource").splitlines() if "queued-resources create" in line}
    assert "--node-id=quietstar" in single


def tools(folder: Path, **scripts: str) -> str:
    """A PATH on which the tools named (- written as _) are these bash scripts."""
    folder.mkdir(exist_ok=True)
    for tool, script in scripts.items():
        path = folder / tool.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


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
