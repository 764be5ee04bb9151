"""Calls the launch scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

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


def tools(folder: Path, **scripts: str) -> str:
    """A PATH on which the tools named (- written as _) are these bash scripts."""
    folder.mkdir(exist_ok=True)
    for tool, script in scripts.items():
        path = folder / tool.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
