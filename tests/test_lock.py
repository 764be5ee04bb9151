"""A lock that hosts share: one holder, taken over when that is dead, and a woken holder that notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quietstar_jax import io, lock
from quietstar_jax.errors import EXIT_RETRY, EXIT_USER_ERROR
from quietstar_jax.lock import GoneError, Lock, LockedError

HOLDER = """
import sys, time
from pathlib import Path
from quietstar_jax import lock
from quietstar_jax.errors import UserError
lock.BEAT_SECONDS, lock.STALE_SECONDS, lock.SETTLE_SECONDS = 0.2, 2, 0.3
try:
    with lock.Lock(Path(sys.argv[1]), "config.workdir here", lambda line: print(line, flush=True)) as held:
        print("held", flush=True)
        while not Path(sys.argv[1]).with_name("stop").exists():
            time.sleep(0.05)
            held.check()
except UserError as error:
    print(error, flush=True)
    sys.exit(error.status)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.2), ("STALE", 2), ("SETTLE", 0.3)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with start(path) as process:
        assert lines(process, 1) == ["held"]
        yield process
        process.kill()


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip("\n") for _ in range(count)]


def held(path: Path) -> list[str]:
    """What is said when the lock is taken and released."""
    said: list[str] = []
    with Lock(path, "config.workdir here", said.append) as taken:
        assert json.loads(path.read_text())["nonce"] == taken.nonce
        taken.check()
    assert not path.exists()
    return said


def test_a_living_holder_is_named_and_left_alone(path: Path, holder: subprocess.Popen[str]) -> None:
    before = json.loads(path.read_text())
    with pytest.raises(LockedError, match=rf"in use by process {holder.pid} on .*, started 20.* is running") as refused:
        held(path)
    assert refused.value.status == EXIT_USER_ERROR
    assert json.loads(path.read_text()) == before
    path.with_name("stop").touch()
    assert holder.wait(timeout=30) == 0
    assert held(path) == []


def test_a_killed_holder_of_this_machine_is_replaced_immediately(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    begun = time.monotonic()
    assert [f"process {holder.pid} on " in line and "has ended" in line for line in held(path)] == [True]
    assert time.monotonic() - begun < 1.5  # of STALE_SECONDS nothing


def test_a_killed_holder_whose_parent_did_not_notice(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()  # a zombie until its parent waits for it
    time.sleep(0.3)
    assert len(held(path)) == 1


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_same_process_id_of_another_process_is_not_the_holder(path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    change(path, process_started="1")
    assert [f"process {holder.pid} on " in line and "has ended" in line for line in held(path)] == [True]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"process": "x"}', '{"machine": "other", "process": 1}', "\udcff"])
def test_a_dead_holder_elsewhere_is_replaced_when_it_is_stale(path: Path, content: str) -> None:
    path.write_bytes(content.encode(errors="surrogateescape"))
    begun = time.monotonic()
    said = held(path)
    assert lock.STALE_SECONDS <= time.monotonic() - begun < lock.STALE_SECONDS + 5
    assert "Waiting at most 2 s" in said[0]
    assert "takes over" in said[1]


def test_a_living_holder_elsewhere_may_be_gone_later(path: Path, holder: subprocess.Popen[str]) -> None:
    os.utime(path)
    text = path.read_text()
    path.write_text(text.replace(io.machine(), "0" * 12))
    with pytest.raises(LockedError, match="is running") as refused:
        held(path)
    assert refused.value.status == EXIT_RETRY


def test_a_suspended_holder_is_replaced_and_stops_when_it_wakes(path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    with start(path) as second:
        assert "Waiting at most 2 s" in lines(second, 1)[0]
        assert f"process {holder.pid} on " in lines(second, 2)[0]
        before = path.read_text()
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.wait(timeout=30) == EXIT_USER_ERROR
        assert f"taken over by process {second.pid}" in lines(holder, 1)[0]
        assert path.read_text() == before
        path.with_name("stop").touch()
        assert second.wait(timeout=30) == 0


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_at_once_one_holds(path: Path, stale: bool) -> None:
    if stale:
        path.write_text(json.dumps({"machine": io.machine(), "process": 2**22 + 1, "nonce": "x"}))
    processes = [start(path) for _ in range(4)]
    try:
        deadline = time.monotonic() + 60
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (alive,) = [process for process in processes if process.poll() is None]
        assert json.loads(path.read_text())["process"] == alive.pid
        assert {process.returncode for process in processes if process is not alive} == {EXIT_USER_ERROR}
        path.with_name("stop").touch()
        assert alive.wait(timeout=30) == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_removed_file_comes_back_and_a_removed_folder_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder / "run.lock", "config.workdir here", print) as taken:
        (folder / "run.lock").unlink()
        taken.check()
        assert json.loads((folder / "run.lock").read_text())["nonce"] == taken.nonce
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(GoneError, match="here has disappeared"):
            taken.check()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_file_that_names_nobody_is_not_taken_for_another_holder(path: Path, content: str) -> None:
    with Lock(path, "config.workdir here", print) as taken:
        path.write_text(content)  # as while it is being written
        taken.check()
        assert json.loads(path.read_text())["nonce"] == taken.nonce


def test_signs_of_life_of_two_threads_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an object store is written again with each sign of life, which here takes a while."""
    url = tmp_path / "run.lock"
    monkeypatch.setattr(lock.io, "is_url", lambda path: True)

    def slowly(path: Path, text: str) -> None:
        Path(path).write_text("")
        time.sleep(0.01)
        Path(path).write_text(text)

    monkeypatch.setattr(lock.io, "write_text", slowly)
    with Lock(url, "config.workdir here", print) as taken:
        threads = [threading.Thread(target=lambda: [taken.check() for _ in range(10)]) for _ in range(3)]
        seen = []
        monkeypatch.setattr(lock, "read", lambda path, read=lock.read: seen.append(read(path)) or seen[-1])
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(holder.get("nonce") == taken.nonce for holder, _ in seen)
