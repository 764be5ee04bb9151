"""The launch scripts: what a dry run prints."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from quietstar_jax.errors import EXIT_RETRY, EXIT_USER_ERROR, STOPPED
from tests.launch.scripts import AWKWARD, LAUNCH, SCRIPTS, VARIABLES, dry_run, heredoc, launch, shell_words


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_variable(script):
    text = launch(script, "--help").stdout.partition("\nVariables")[2]
    declared = re.findall(r"^([A-Z_]+)=\$", (LAUNCH / f"{script}.sh").read_text(), re.M)
    of_all = ["MAX_RESTARTS", "RESTART_SECONDS", "MAX_RESTART_SECONDS"]
    assert re.findall(r"^  ([A-Z_]+)=", text, re.M) == [*declared, *of_all]
    required = {line.split("=")[0].strip() for line in text.splitlines() if "=(required)" in line}
    assert required == {*declared} & {*VARIABLES}


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
