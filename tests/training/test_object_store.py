"""A work directory in an object store: every file of it, its lock, and the commands that read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from quietstar_jax import io, lock
from quietstar_jax.errors import CheckpointError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.lock import Lock, LockedError
from quietstar_jax.training.loop import train
from tests.object_store import bucket  # noqa: F401 (a fixture)
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("bucket")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.2), ("STALE", 4), ("SETTLE", 0.1)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


def test_files_lines_and_folders(bucket: Path) -> None:  # noqa: F811
    root = io.place("gs://bucket/run", "config.workdir")
    io.write_json(root / "a.json", [1])
    assert json.loads((bucket / "run" / "a.json").read_text()) == [1]
    (bucket / "run" / "rows.jsonl").write_text('{"a": 1}\n{"a"')
    with io.JsonLinesWriter(root / "rows.jsonl", every_seconds=0) as rows:
        rows.write({"a": 2})
        assert [row["a"] for row in io.read_json_lines(root / "rows.jsonl")] == [1, 2]
        rows.write({"a": 3})
    assert (bucket / "run" / "rows.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    with io.folder_to_write(root / "folder") as folder:
        (folder / "x").write_text("y")
    with io.folder_to_read(root / "folder") as folder:
        assert [(item.name, item.read_text()) for item in folder.iterdir()] == [("x", "y")]


def test_what_fails_while_it_is_written_leaves_the_object_as_it_was(bucket: Path) -> None:  # noqa: F811
    path = epath.Path("gs://bucket/file")
    io.write_text(path, "first")
    with pytest.raises(TypeError):
        io.write_json(path, object())
    assert path.read_text() == "first"
    assert [item.name for item in bucket.iterdir()] == ["file"]


def test_one_holder_of_a_lock(bucket: Path) -> None:  # noqa: F811
    path = epath.Path("gs://bucket/run.lock")
    with Lock(path, "here", print) as held:
        with pytest.raises(LockedError, match="is running"), Lock(path, "here", print):
            pass
        held.check()
        (bucket / "run.lock").write_text(json.dumps({"nonce": "of another", "process": 3, "host": "h"}))
        with pytest.raises(LockedError, match="taken over by process 3 on h"):
            held.check()
    said: list[str] = []
    with Lock(path, "here", said.append):
        assert "process 3 on h" in said[-1]
    assert list(bucket.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_resumes_and_is_read(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    url = "gs://bucket/some/run"
    config = tiny_config(url)
    first = train(config)
    run = bucket / "some" / "run"
    assert sorted(item.name for item in run.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "summary.json", "tokenizer",
    ]  # fmt: skip
    records = io.read_json_lines(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"][-1] == config.total_steps
    again = train(config)  # restores the last step
    assert again["loss_with_thoughts"] == pytest.approx(first["loss_with_thoughts"])
    assert load_model(url).step == config.total_steps
    export(io.place(url, "--checkpoint"), tmp_path / "exported", ExportOptions())
    with pytest.raises(CheckpointError, match="is not a run with checkpoints"):
        load_model("gs://bucket/other")
    assert {item.name for item in tmp_path.iterdir()} == {"store", "exported"}
