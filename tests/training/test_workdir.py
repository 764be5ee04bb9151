"""The work directory: where it may be, one run in it, and all processes in one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from quietstar_jax import io
from quietstar_jax.config import Config
from quietstar_jax.errors import EXIT_USER_ERROR, ConfigError, UserError
from quietstar_jax.lock import LockedError
from quietstar_jax.training.workdir import LOCK, open_workdir

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", "runs/a"),
        ("/x/y", "/x/y"),
        ("~/a", os.path.expanduser("~/a")),
        ("file:///x/y%20z", "/x/y z"),
        ("file://localhost/x", "/x"),
        ("file:/x", "/x"),
        ("./gs:/x", "gs:/x"),
        ("a:b", "a:b"),
    ],
)
def test_local_folders(text: str, expected: str) -> None:
    assert io.place(text, "config.workdir") == Path(expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory://a/b", "memory: is not a supported scheme"),
        ("gcs://bucket/a", "gcs: is not a supported scheme"),
        ("GS://bucket/a", "GS: is not a supported scheme"),
        ("https://host/a", "https: is not a supported scheme"),
        ("hf://a/b", "hf: is not a supported scheme"),
        ("file://host/a", "file: is not a supported scheme"),
        ("s4:/a", "s4: is not a supported scheme"),
        ("gs:/bucket/a", "has no bucket. Write gs://BUCKET/FOLDER"),
        ("gs://", "has no bucket"),
        ("s3:///a", "has no bucket"),
        ("/gs/a", "Choose another"),
        ("~nobody-of-this-name/a", "cannot be a path"),
        ("a\0b", "cannot be a path"),
    ],
)
def test_what_is_no_place_is_refused_by_name(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^config.workdir .*") as refused, open_workdir(Config(workdir=text)):
        pass
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "package"), io.STORES.items())
def test_a_store_without_its_package_names_it(
    scheme: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install {package}"):
        io.place(f"{scheme}://bucket/run", "config.workdir")
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time_and_nothing_left(tmp_path: Path) -> None:
    config = Config(workdir=str(tmp_path / "deep" / "run"))
    with open_workdir(config) as workdir:
        workdir.check()
        holder = json.loads((workdir.path / LOCK).read_text())
        assert holder["process"] == os.getpid()
        assert holder["host"] == socket.gethostname()
        (workdir.path / LOCK).write_text(json.dumps(holder | {"nonce": "of another"}))
        with pytest.raises(LockedError, match="was taken over by process"):
            workdir.check()
        assert json.loads((workdir.path / LOCK).read_text())["nonce"] == "of another"
    assert (workdir.path / LOCK).exists()  # of the other one
    (workdir.path / LOCK).unlink()
    with open_workdir(config):
        pass
    assert list(workdir.path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "below a file", "link to nothing", "read-only", "full", "name too long"])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("link")
    path = {"file": "file", "below a file": "file/run", "link to nothing": "link", "name too long": "x" * 300}.get(kind)
    if kind in ("read-only", "full"):
        path, number = ("run", 30 if kind == "read-only" else 28)
        real = Path.open

        def refuse(self: Path, mode: str = "r", *rest: object, **named: object) -> object:
            if mode == "x":  # root may write to every folder
                raise OSError(number, os.strerror(number))
            return real(self, mode, *rest, **named)

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"config.workdir .* cannot be written: .*Choose another folder"):
        open_workdir(Config(workdir=str(tmp_path / path))).__enter__()
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    with open_workdir(Config(workdir=str(tmp_path / "run"))) as workdir:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match=r"config.workdir .*run has disappeared"):
            workdir.check()


def test_processes_that_do_not_share_their_work_directory_end_with_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    program = "import runpy, sys; from quietstar_jax.training import workdir; workdir.SHARED_SECONDS = 2; " \
        "sys.argv = ['train', *sys.argv[1:]]; runpy.run_module('quietstar_jax.train', run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", program, "--config", "tests/parallel/tiny_run.py",
               "--config.distributed.processes=given", f"--config.distributed.coordinator=localhost:{port}",
               "--config.distributed.num_processes=2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [*command, f"--config.distributed.process_id={i}", f"--config.workdir={tmp_path / str(i)}"],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, errors in enumerate(ended):
        assert processes[i].returncode == EXIT_USER_ERROR, errors[-2000:]
        assert "is not the same folder in all processes" in errors
        assert f"{socket.gethostname()} (process 1) did not see within 2 s" in errors
        assert "Traceback" not in errors
    assert list((tmp_path / "0").iterdir()) == []
    assert not (tmp_path / "1").exists()
