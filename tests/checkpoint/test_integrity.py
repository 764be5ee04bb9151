"""A saved step is used only where each of its files is as it was written; writing fails with one message."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
from etils import epath

from quietstar_jax.checkpoint import manifest, steps
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.errors import CheckpointError
from tests.checkpoint.saved import SavedSteps

FAULTS = ("flip", "truncate", "empty", "extend", "delete", "folder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedSteps:
    return SavedSteps(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory) -> Path:
    """A work directory with the steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("whole")
    saved.save(workdir, [2, 4, 6])
    return workdir


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _all_warnings_are_new(monkeypatch):
    monkeypatch.setattr(steps, "_logged", set())


def step_files(workdir: Path, step: int) -> list[Path]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def harm(file: Path, fault: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if fault == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif fault == "truncate":
        del content[draw.randrange(len(content)) :]
    elif fault == "empty":
        content.clear()
    elif fault == "extend":
        content += draw.randbytes(draw.randrange(1, 99))
    file.unlink()
    if fault == "folder":
        file.mkdir()
    elif fault != "delete":
        file.write_bytes(content)


def test_a_whole_step_is_restored(saved, whole):
    assert saved.restore(whole) == 6
    assert open_run(whole, 4).step == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_of_a_step_is_checked(whole, tmp_path, fault):
    """Every fault in every file is found, and named with its file."""
    draw = random.Random(fault)
    for number, file in enumerate(step_files(whole, 6)):
        folder = shutil.copytree(whole / "checkpoints/6", tmp_path / str(number) / "6")
        name = file.relative_to(whole / "checkpoints/6")
        harm(folder / name, fault, draw)
        found = manifest.damage(epath.Path(folder), 6)
        if fault == "delete" and file.name == manifest.NAME:
            assert not found  # as a step of an earlier version: a warning, see below
        else:
            assert found.startswith(f"{name}: "), (name, found)


@pytest.mark.parametrize("seed", range(12))
def test_training_falls_back_and_readers_name_the_step_to_use(saved, workdir, caplog, seed):
    """A random fault in a random file of a random step."""
    draw = random.Random(seed)
    step = draw.choice([4, 6])
    file = draw.choice([path for path in step_files(workdir, step) if path.name != manifest.NAME])
    harm(file, draw.choice(FAULTS), draw)
    name = str(file.relative_to(workdir / "checkpoints" / str(step)))
    if not name.startswith("opt_state/"):  # which no command but training reads
        with pytest.raises(CheckpointError) as error:
            open_run(workdir, step)
        assert f"{step}/{name}: " in str(error.value)
        assert f"`step` {10 - step}" in str(error.value)  # 4 where 6 is damaged, 6 where 4 is
    if step == 6:
        assert saved.restore(workdir) == 4
        assert (workdir / "checkpoints/6.broken-1").is_dir()
        assert [record.getMessage() for record in caplog.records if name in record.getMessage()] != []
        assert len([record for record in caplog.records if "resumes from step 4" in record.getMessage()]) == 1
    else:
        assert saved.restore(workdir) == 6
        assert not list((workdir / "checkpoints").glob("*.broken-*"))


def test_several_damaged_steps_are_set_aside_each_time(saved, workdir):
    for number in (1, 2):
        for step in (4, 6):
            harm(step_files(workdir, step)[-1], "flip", random.Random(step))
        assert saved.restore(workdir) == 2
        saved.save(workdir, [4, 6])
        names = {path.name for path in (workdir / "checkpoints").iterdir()}
        assert {"2", "4", "6", f"4.broken-{number}", f"6.broken-{number}"} <= names
        assert saved.restore(workdir) == 6
        assert steps.saved_steps(epath.Path(workdir / "checkpoints")) == [2, 4, 6]


def test_where_no_step_is_whole_nothing_is_set_aside(saved, workdir):
    for step in (2, 4, 6):
        harm(step_files(workdir, step)[-1], "flip", random.Random(step))
    with pytest.raises(CheckpointError, match="All checkpoints are damaged") as error:
        saved.restore(workdir)
    assert all(f"checkpoints/{step}/" in str(error.value) for step in (2, 4, 6))
    with pytest.raises(CheckpointError, match="All other steps are damaged"):
        open_run(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_step_without_a_manifest_is_read_with_one_warning(saved, workdir, caplog):
    """As earlier versions saved it; what tensorstore cannot read is still found, and a wrong step number."""
    (workdir / "checkpoints/6/manifest.json").unlink()
    assert saved.restore(workdir) == 6
    assert open_run(workdir).step == 6
    assert len([record for record in caplog.records if "has no manifest" in record.getMessage()]) == 1
    progress = workdir / "checkpoints/6/progress/metadata"
    progress.write_text(progress.read_text().replace("6", "8"))
    with pytest.raises(CheckpointError, match="it is of step 8, not 6"):
        open_run(workdir)
    assert saved.restore(workdir) == 4
    (workdir / "checkpoints/4/manifest.json").unlink()
    largest = max(step_files(workdir, 4), key=lambda path: path.stat().st_size)
    harm(largest, "empty", random.Random(0))
    assert saved.restore(workdir) == 2


def test_a_renamed_step_is_not_another_step(saved, workdir):
    (workdir / "checkpoints/6").rename(workdir / "checkpoints/8")
    with pytest.raises(CheckpointError, match=r"it is of step 6, not 8.*`step` 4"):
        open_run(workdir)
    assert saved.restore(workdir) == 4


def test_what_may_not_be_read_is_no_damage(saved, workdir, monkeypatch):
    """A permission that is missing is mended by the user; the step stays the newest."""

    def refuse(file):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(manifest, "_checksum", refuse)
    with pytest.raises(CheckpointError, match=r"step 6 .*Permission denied"):
        saved.restore(workdir)
    assert (workdir / "checkpoints/6").is_dir()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_pruning_keeps_the_target_of_a_link(saved, workdir, asynchronous):
    shutil.move(workdir / "checkpoints", workdir / "disk")
    (workdir / "checkpoints").symlink_to(workdir / "disk")
    shutil.move(workdir / "disk/6", workdir / "elsewhere")
    (workdir / "checkpoints/6").symlink_to(workdir / "elsewhere")
    assert saved.restore(workdir) == 6
    saved.save(workdir, [8, 10], keep_latest=1, keep_every_steps=4, asynchronous=asynchronous)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "4", "8"]
    assert manifest.damage(epath.Path(workdir / "elsewhere"), 6) == ""
    assert saved.restore(workdir) == 10


def test_a_step_that_cannot_be_removed_is_named_once(saved, workdir, monkeypatch, caplog):
    rmtree = epath.Path("/").__class__.rmtree

    def refuse(path, *arguments, **settings):
        if path.name == "2" + steps.REMOVED:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rmtree(path, *arguments, **settings)

    monkeypatch.setattr(epath.Path("/").__class__, "rmtree", refuse)
    saved.save(workdir, [8, 10], keep_latest=2)
    assert steps.saved_steps(epath.Path(workdir / "checkpoints")) == [8, 10]
    assert len([record for record in caplog.records if "cannot be removed" in record.getMessage()]) == 1
    monkeypatch.undo()
    saved.save(workdir, [12], keep_latest=2)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "12"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limit", [10, 700, 3_000, 9_000, 20_000])
def test_a_disk_that_takes_no_more_is_one_message(saved, whole, tmp_path, capfd, limit, asynchronous):
    """No file may grow beyond a limit: some write fails, in Python or in tensorstore."""
    workdir = shutil.copytree(whole, tmp_path / "copy")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written(.|\n)*resumes from step 6") as error:
            saved.save(workdir, [8], asynchronous=asynchronous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert steps.saved_steps(epath.Path(workdir / "checkpoints")) == [2, 4, 6]
    saved.save(workdir, [8])
    assert saved.restore(workdir) == 8


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_manifest_that_cannot_be_written_leaves_no_step(saved, workdir, monkeypatch, number, asynchronous):
    code = getattr(errno, number)

    def refuse(folder):
        raise OSError(code, os.strerror(code), str(folder))

    monkeypatch.setattr(manifest, "write", refuse)
    with pytest.raises(CheckpointError, match=os.strerror(code)):
        saved.save(workdir, [8, 10], asynchronous=asynchronous)
    monkeypatch.undo()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert saved.restore(workdir) == 6


def test_a_work_directory_that_disappears_is_one_message(saved, whole, tmp_path):
    """It is not made anew, with nothing in it but the newest step."""
    workdir = shutil.copytree(whole, tmp_path / "copy")
    state = saved.state

    def gone(step):
        shutil.rmtree(workdir)
        return state(step)

    saved.state = gone
    try:
        with pytest.raises(CheckpointError, match="the work directory has disappeared"):
            saved.save(workdir, [8])
    finally:
        del saved.state
    assert not workdir.exists()
