"""Files that are whole or absent, JSON lines, and locks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import logging

from quietstar_jax import io

WRITER = """
import sys, time
from pathlib import Path
from quietstar_jax import io
with io.replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


FOLDER_WRITER = """
import sys, time
from pathlib import Path
from quietstar_jax import io
with io.new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def fail_while_writing(path: Path, error: BaseException) -> None:
    with io.replacing(path) as temporary:
        temporary.write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("no")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    io.write_text(path, "first")
    with pytest.raises(type(error)):
        fail_while_writing(path, error)
    assert names(tmp_path) == ["file"]
    assert path.read_text() == "first"
    io.write_json(path, {"å": 1})
    assert json.loads(path.read_text("utf-8")) == {"å": 1}
    assert names(tmp_path) == ["file"]


def test_a_value_that_is_no_json_changes_nothing(tmp_path: Path) -> None:
    io.write_text(tmp_path / "file", "first")
    with pytest.raises(TypeError):
        io.write_json(tmp_path / "file", {"a": object()})
    assert (tmp_path / "file").read_text() == "first"


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    io.write_text(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, ".hidden", "with space"])
def test_any_name_can_be_replaced(tmp_path: Path, name: str) -> None:
    io.write_text(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def make(path: Path, text: str) -> None:
    with io.new_folder(path) as temporary:
        (temporary / "weights").write_text(text)


@pytest.mark.parametrize(("code", "write"), [(WRITER, io.write_text), (FOLDER_WRITER, make)])
def test_what_a_killed_writer_left_goes_with_the_next_write(
    tmp_path: Path, code: str, write: Callable[[Path, str], None]
) -> None:
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        write(path, "other")  # the writer lives: what it has written stays
        assert len(names(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    shutil.rmtree(path) if path.is_dir() else None
    write(path, "next")
    assert names(tmp_path) == ["file"]


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        make(tmp_path / "a" / "b", object())  # type: ignore[arg-type]
    assert names(tmp_path / "a") == []


def test_a_temporary_file_of_another_machine_goes_when_it_is_old(tmp_path: Path) -> None:
    new, old = (tmp_path / f".file.0123456789ab-{number}-01234567.partial" for number in (1, 2))
    other = tmp_path / f".other.{io.machine()}-{2**22 + 1}-01234567.partial"
    for path in (new, old, other):
        path.write_text("half")
    hours_ago = time.time() - 2 * io.ABANDONED_SECONDS
    os.utime(old, (hours_ago, hours_ago))
    io.write_text(tmp_path / "file", "text")
    assert names(tmp_path) == sorted(["file", new.name, other.name])


@pytest.mark.parametrize(
    ("content", "kept", "warned"),
    [
        (b"", [], None),
        (b'{"a": 1}\n{"a": 2}\n', [1, 2], None),
        (b'{"a": 1}\r\n\r\n{"a": 2}', [1, 2], None),
        (b'{"a": 1}\n{"a": 2', [1], None),  # its writer was killed
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', [1, 3], "line 2"),
        (b'\xff\xfe\n{"a": 1}\n\x00\x00\n[1]\n3\n{"a": 2}\n', [1, 2], "line 1, 3, 4, 5"),
        (b"[" * 100_000 + b'\n{"a": 1}\n', [1], "line 1"),
    ],
)
def test_a_bad_line_costs_that_line(
    tmp_path: Path, content: bytes, kept: list[int], warned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert [row["a"] for row in io.read_json_lines(tmp_path / "rows.jsonl")] == kept
    assert [warned is not None and warned in line for line in said] == [True] * (warned is not None)


def test_lines_are_appended_after_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": ')
    with io.JsonLinesWriter(path) as rows:
        rows.write({"a": "ä"})
        assert [row["a"] for row in io.read_json_lines(path)] == [1, "ä"]
    assert path.read_text("utf-8").count("\n") == 2
