"""Datasets of the package `datasets`, from local folders: no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from quietstar_jax.data.sources.hub import HubRows, Name, parse, stream, stream_parts
from quietstar_jax.data_config import DataConfig
from tests.data.reading import fails, opened, put, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of train and one of test; `datasets` finds its own cache in the test run's folder."""
    pytest.importorskip("datasets")
    import datasets

    root = tmp_path_factory.mktemp("hub")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    for name, texts in (("train-0", "abc"), ("train-1", "de"), ("test", "f")):
        rows = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts))
        put(root / "corpus" / f"{name}.jsonl", rows.encode())
    return root / "corpus"


def test_rows_and_streams(folder: Path) -> None:
    assert read(opened(f"hf:{folder}:train")) == list("abcde")
    assert read(opened(f"hf:{folder}:train[1:3]")) == ["b", "c"]
    assert stream_parts(f"hf:{folder}:train", "text") == 2
    parts = [stream(f"hf:{folder}:train", "text", part, 2) for part in (0, 1)]
    assert [[row.fields["text"] for row in part] for part in parts] == [list("abc"), list("de")]


def test_saved_to_disk(folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": text} for text in "xyz"])
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "all")
    rows.save_to_disk(tmp_path / "one")
    assert read(opened(f"hf:{tmp_path}/all:train")) == read(opened(f"hf:{tmp_path}/one:train")) == list("xyz")
    assert [row.fields["text"] for row in stream(f"hf:{tmp_path}/all:train", "text", 0, 1)] == list("xyz")
    fails(f"hf:{tmp_path}/all:test", "cannot be loaded: no split 'test'; it has train")


def test_content_tells(folder: Path) -> None:
    def identity(spec: str) -> bytes:
        return HubRows(spec, "text").pieces()[0].identity(1)

    assert identity(f"hf:{folder}:train") == identity(f"hf:{folder}:train")
    assert len({identity(f"hf:{folder}:{split}") for split in ("train", "test", "train[:4]")}) == 3


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("hf:owner/name:train", Name("owner/name", None, None, "train")),
        ("hf:name:train", Name("name", None, None, "train")),
        ("hf:owner/name/config:train[:5%]", Name("owner/name", "config", None, "train[:5%]")),
        ("hf:owner/name@v1.2:train", Name("owner/name", None, "v1.2", "train")),
        ("hf:owner/name@v1.2/config:train", Name("owner/name", "config", "v1.2", "train")),
    ],
)
def test_names(spec: str, name: Name) -> None:
    assert parse(spec) == name


def test_folder_with_configuration(tmp_path: Path) -> None:
    assert parse(f"hf:{tmp_path}/en:train") == Name(str(tmp_path), "en", None, "train")


def test_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails("hf:name", "is not `hf:NAME")
    fails(f"hf:{folder}:nope", "cannot be loaded: Unknown split .*Check name, configuration and split")
    fails(f"hf:{folder}/other:train", "cannot be loaded: BuilderConfig 'other' not found")
    fails(f"hf:{folder}:train", "no field 'body'; it has text, n. Set .data.text_key", text_key="body")
    fails(f"hf:{folder}:train", "row 0: 'n' contains int, not text", index=0, text_key="n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(f"hf:{folder}:train", "needs datasets: `pip install datasets`")
    assert DataConfig().text_key == "text"
