"""Files here and behind URLs are found in one order; what is wrong is said at the door."""

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quietstar_jax.data.sources import open_source
from quietstar_jax.data.sources.files import File, find_files
from quietstar_jax.data_config import DataConfig
from tests.data.reading import DOCUMENTS, fails, lines, opened, put, read


def test_text_files(tmp_path: Path) -> None:
    put(tmp_path / "b.md", b"# two")
    put(tmp_path / "a.txt", b"\xef\xbb\xbfone\n")
    put(tmp_path / "deep" / "c.txt", "drei ü".encode())
    put(tmp_path / "picture.png", b"ignored")
    put(tmp_path / ".hidden" / "d.txt", b"ignored")
    assert read(opened(tmp_path)) == ["one\n", "# two", "drei ü"]
    assert read(opened(tmp_path / "*.txt")) == ["one\n"]
    assert read(opened(tmp_path / "**" / "*.txt")) == ["one\n", "drei ü"]


def test_folder(tmp_path: Path) -> None:
    put(tmp_path / "a" / "2.jsonl", lines(["c"]))
    put(tmp_path / "a" / "1.jsonl.gz", gzip.compress(lines(["a", "b"])))
    put(tmp_path / "t.txt", b"text")
    assert read(opened(tmp_path / "a")) == ["a", "b", "c"]
    assert read(opened(tmp_path / "*")) == ["text"]  # folders that a glob meets are not entered


def test_a_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    assert read(opened(put(tmp_path / "a[1].txt", b"found"))) == ["found"]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "a.txt", b"home")
    assert read(opened("~/a.txt")) == ["home"] == read(opened("~/*.txt"))


def test_errors_of_files_and_folders(tmp_path: Path) -> None:
    fails(tmp_path / "absent.jsonl", r"no file or folder '.*absent\.jsonl'\. Check the path")
    fails(tmp_path / "*.jsonl", r"No file matches '.*\*\.jsonl'")
    fails(tmp_path, r"folder .* no text.*\.jsonl")
    for name in ("a.pdf", "a.parquet.gz", "a"):
        fails(put(tmp_path / name, b"a,b"), f"{name} has an unsupported format.*.jsonl.*hf:FOLDER")
    fails(tmp_path / "*.pdf", r"a\.pdf has an unsupported format")
    fails(put(tmp_path / "a.csv", b"a,b\n"), r"a\.csv contains no records")
    (tmp_path / "a.csv").unlink()
    fails(put(tmp_path / "a.txt", b""), r"a\.txt is empty")
    fails(put(tmp_path / "b.txt", b"abc\xff"), r"b\.txt: not UTF-8 at byte 3", index=0)
    put(tmp_path / "a.jsonl", lines(["a"]))
    fails(tmp_path, r"several kinds of text \(a\.jsonl, a\.txt\)\..* a glob: .*/\*\*/\*\.jsonl")


# ------------------------------------------------------------------------------------------------------------ URLs


@pytest.fixture
def remote() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for name, content in (
        ("a/2.jsonl", lines(["c"])),
        ("a/1.jsonl.gz", gzip.compress(lines(["a", "b"]))),
        ("a/.hidden.jsonl", lines(["x"])),
        ("deep/b/t.txt", b"text"),
        ("empty.jsonl", b""),
        ("u.pdf", b"a"),
    ):
        system.pipe_file(f"/corpus/{name}", content)
    yield system
    system.rm("/corpus", recursive=True)


def test_urls(remote: Any) -> None:
    assert read(opened("memory://corpus/a")) == ["a", "b", "c"]
    assert read(opened("memory://corpus/a/2.jsonl")) == ["c"]
    assert read(opened("memory://corpus/a/[0-9]*")) == ["a", "b", "c"]
    assert read(opened("memory://corpus/**/*.txt")) == ["text"]
    whole = opened("memory://corpus/a")
    assert [piece.name for piece in whole.pieces()] == ["memory:///corpus/a/1.jsonl.gz", "memory:///corpus/a/2.jsonl"]


def test_parquet_and_scheme_of_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet", row_group_size=2)
    assert read(opened(f"file://{tmp_path}/a.parquet")) == DOCUMENTS
    assert read(opened(f"file://{tmp_path}")) == DOCUMENTS


def test_errors_of_urls(remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fails("memory://corpus/absent.jsonl", "no file or folder 'memory://corpus/absent.jsonl'. Check the URL")
    fails("memory://corpus/*.parquet", "No file matches")
    fails("memory://corpus/u.pdf", "unsupported format")
    fails("memory://corpus/empty.jsonl", "empty.jsonl is empty")
    fails("memory://corpus/deep/b/*.csv", "No file matches")
    fails("nonsense://a/b.jsonl", r"nonsense://a/b.jsonl: .*nonsense.*gs:// \(`pip install gcsfs`\), s3://")
    for url, package in (("gs://bucket/a.jsonl", "gcsfs"), ("s3://bucket/a.jsonl", "s3fs")):
        monkeypatch.setitem(sys.modules, package, None)
        fails(url, f"Reading {url} needs another package.*{package}")

    def unreachable(*_: Any, **__: Any) -> bool:
        raise OSError("no route to host")

    monkeypatch.setattr(type(remote), "isfile", unreachable)
    fails("memory://corpus/a", "cannot be listed: no route to host. Check the URL, the network, your credentials")


def test_identity_of_files(tmp_path: Path, remote: Any) -> None:
    """A copy is the same, whenever it was made; any change of a small file shows, as does one at a large file's end."""
    path = put(tmp_path / "a.txt", b"abc")

    def identity(found: Path, samples: int = 4) -> bytes:
        return File(str(found), found.stat().st_size).identity(samples)

    before = identity(path)
    assert identity(put(tmp_path / "copy.txt", b"abc")) == before
    assert identity(put(path, b"abd")) != before
    large = bytes(range(256)) * 256
    assert len({identity(put(path, large[:i] + b"!" + large[i:])) for i in (0, len(large) // 3, len(large))}) == 3
    (file,) = find_files("memory://corpus/deep")
    before = file.identity(4)
    remote.pipe_file("/corpus/deep/b/t.txt", b"next")
    assert find_files("memory://corpus/deep")[0].identity(4) != before
    monkey = {"etag": "one", "type": "file", "size": 4, "name": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(remote), "info", lambda *_, **__: monkey)
        first = file.identity(4)
        assert file.identity(1) == first  # nothing but the checksum counts
        monkey["etag"] = "two"
        assert file.identity(4) != first


# ---------------------------------------------------------------------------------------------------------- others


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, spec in (
        ("pyarrow", put(tmp_path / "a.parquet", b"x")),
        ("zstandard", put(tmp_path / "a.jsonl.zst", b"x")),
        ("tensorflow_datasets", "tfds:tiny:train"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        fails(spec, rf"Reading .* needs {module.replace('_', '-')}: `pip install")


def test_synthetic() -> None:
    config = DataConfig()
    train = open_source("synthetic", config, split="train", seed=1)
    held_out = open_source("synthetic", config, split="validation", seed=1)
    assert len(train) == config.synthetic.documents
    assert len(held_out) == config.synthetic.validation_documents
    assert isinstance(train[0], str)
    assert train[0] != held_out[0]
    assert train[0] != open_source("synthetic", config, split="train", seed=2)[0]
