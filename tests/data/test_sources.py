"""Sources read the documents that are there, in order, and say where and why where they cannot."""

import gzip
import json
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.config import DataConfig
from quietstar_jax.data import sources
from quietstar_jax.data.sources import RandomAccessSource, open_source, open_sources
from quietstar_jax.errors import DataError

DOCUMENTS = ["first", "zweite Zeile\nmit Umbruch", "", "四", "last \u2028 one"]


def opened(spec: object, **changes: Any) -> RandomAccessSource:
    return open_source(str(spec), DataConfig(**changes), split="train", seed=0)


def read(source: RandomAccessSource) -> list[str]:
    """All documents, twice over: in order, and backwards from a copy that went through pickle."""
    ahead = [source[i] for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in reversed(range(len(copy)))] == ahead[::-1]
    assert source[np.int64(0)] == ahead[0]  # type: ignore[index]  # what a sampler may hand over
    for outside in (len(ahead), -len(ahead) - 1):
        with pytest.raises(IndexError):
            source[outside]
    return ahead


def lines(documents: Sequence[str], end: str = "\n", key: str = "text", ascii_only: bool = False) -> bytes:
    return (
        "\n".join(json.dumps({key: text, "n": 1}, ensure_ascii=ascii_only) for text in documents).encode()
        + end.encode()
    )


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fails(spec: object, message: str, index: int | None = None, **changes: Any) -> None:
    """Opening the source fails, or where `index` is given, only reading that document does."""
    if index is None:
        with pytest.raises(DataError, match=message):
            opened(spec, **changes)
        return
    source = opened(spec, **changes)
    with pytest.raises(DataError, match=message):
        source[index]


# ------------------------------------------------------------------------------------------------------ JSON lines


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str, end: str) -> None:
    assert read(opened(put(tmp_path / name, lines(DOCUMENTS, end)))) == DOCUMENTS


def test_windows_line_ends_and_other_key(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", lines(DOCUMENTS, key="body").replace(b"\n", b"\r\n"))
    assert read(opened(path, text_key="body")) == DOCUMENTS


def two_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.json.zst", two_frames)])
def test_compressed(tmp_path: Path, name: str, pack: Any) -> None:
    path = put(tmp_path / name, pack(lines(DOCUMENTS)))
    source = opened(path)
    assert read(source) == DOCUMENTS
    large = opened(put(tmp_path / f"large-{name}", pack(lines(["x" * 100_000]))))
    assert len(large[0]) == 100_000
    assert len(pickle.dumps(large)) < 1000
    fails(put(tmp_path / f"cut-{name}", pack(lines(DOCUMENTS))[:-6]), "cannot be decompressed: .*copy it anew")
    fails(put(tmp_path / f"not-{name}", b"plain text"), "cannot be decompressed")
    fails(put(tmp_path / f"nothing-{name}", pack(b"")), "decompresses to nothing")
    fails(put(tmp_path / f"bad-{name}", pack(lines(["a"]) + b"{\n")), "line 2: broken JSON")


@settings(deadline=None, max_examples=50)
@given(
    documents=st.lists(st.text(max_size=20), min_size=1, max_size=20), scan=st.integers(1, 40), escaped=st.booleans()
)
def test_any_documents_at_any_scan_size(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], scan: int, escaped: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(lines(documents, ascii_only=escaped))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SCAN_BYTES", scan)
        source = opened(path)
    assert [source[i] for i in range(len(source))] == documents


def test_large_file_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.jsonl", lines([f"document {i}" for i in range(1000)]))
    largest = 0
    ordinary_open = Path.open

    def watched(self: Path, *args: Any) -> Any:
        stream = ordinary_open(self, *args)
        ordinary_read = stream.read

        class Watch:
            seek = stream.seek

            def read(self, size: int = -1) -> bytes:
                nonlocal largest
                assert size >= 0
                largest = max(largest, size)
                return ordinary_read(size)

            def __enter__(self) -> "Watch":
                return self

            def __exit__(self, *error: object) -> None:
                stream.close()

        return Watch()

    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr(sources, "SCAN_BYTES", 256)
    source = opened(path)
    assert source[999] == "document 999"
    assert source[0] == "document 0"
    assert largest == 256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl is empty"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', r"a\.jsonl, line 2: the line is blank"),
        (b'{"text": "a"}\n{"text": "b"}\n\n', r"a\.jsonl, line 3: the line is blank"),
        (b'{"text": "a"}\n\r\n{"text": "b"}\n', r"a\.jsonl, line 2: the line is blank"),
        (b"\n", r"a\.jsonl, line 1: the line is blank"),
        (b'[\n"a",\n"b"\n]\n', r"a\.jsonl, line 1: broken JSON .*one large JSON array has to be written out"),
        (b'\xef\xbb\xbf{"text": "a"}\n', r"a\.jsonl, line 1: broken JSON \(Unexpected UTF-8 BOM"),
        (b'["a"]\n', r"a\.jsonl, line 1: a JSON list, not an object\. Write \{'text': \.\.\.\}"),
        (b'{"body": "a", "id": 1}\n', r"a\.jsonl, line 1: no key 'text'; it has body, id\. Set data\.text_key"),
        (b'{"text": ["a"]}\n', r"a\.jsonl, line 1: 'text' holds list, not text\. Set data\.text_key"),
    ],
)
def test_broken_json_lines_at_the_door(tmp_path: Path, content: bytes, message: str) -> None:
    fails(put(tmp_path / "a.jsonl", content), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl, line 2: broken JSON \(.*\)\. Every line holds one JSON object"),
        (b"      ", r"a\.jsonl, line 2: the line is blank"),
        (b'"text"', r"a\.jsonl, line 2: a JSON str, not an object"),
        (b'{"body": "a"}', r"a\.jsonl, line 2: no key 'text'; it has body"),
        (b'{"text": null}', r"a\.jsonl, line 2: 'text' holds NoneType, not text"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 2: not UTF-8 at byte 24\. Convert it"),
        (b'{"text": "a\\ud800"}', r"a\.jsonl, line 2: character 1 is half of a surrogate pair"),
        (b"[" * 100_000, r"a\.jsonl, line 2: broken JSON"),
    ],
)
def test_broken_json_lines_where_they_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    fails(path, message, index=1)
    assert opened(path)[2] == "c"


# ------------------------------------------------------------------------------------------ files, folders, globs


def test_text_files(tmp_path: Path) -> None:
    put(tmp_path / "b.md", b"# two")
    put(tmp_path / "a.txt", b"\xef\xbb\xbfone\n")
    put(tmp_path / "deep" / "c.txt", "drei ü".encode())
    put(tmp_path / "picture.png", b"ignored")
    put(tmp_path / ".hidden" / "d.txt", b"ignored")
    assert read(opened(tmp_path)) == ["one\n", "# two", "drei ü"]
    assert read(opened(tmp_path / "*.txt")) == ["one\n"]
    assert read(opened(tmp_path / "**" / "*.txt")) == ["one\n", "drei ü"]


def test_folder_and_several_sources(tmp_path: Path) -> None:
    put(tmp_path / "a" / "2.jsonl", lines(["c"]))
    put(tmp_path / "a" / "1.jsonl.gz", gzip.compress(lines(["a", "b"])))
    put(tmp_path / "t.txt", b"text")
    config = DataConfig()
    both = open_sources([str(tmp_path / "t.txt"), str(tmp_path / "a")], config, split="train", seed=0)
    assert read(both) == ["text", "a", "b", "c"]
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
    fails(tmp_path, "folder .* holds no text. Readable are")
    for name in ("a.csv", "a.txt.gz", "a"):
        fails(put(tmp_path / name, b"a,b"), f"{name} is of a kind that cannot be read. Readable are .jsonl")
    fails(tmp_path / "*.csv", r"a\.csv is of a kind")
    fails(put(tmp_path / "a.txt", b""), r"a\.txt is empty")
    fails(put(tmp_path / "b.txt", b"abc\xff"), r"b\.txt: not UTF-8 at byte 3", index=0)
    put(tmp_path / "a.jsonl", lines(["a"]))
    fails(tmp_path, r"several kinds of text \(a\.jsonl, a\.txt\)\. Say which is meant with a glob")
    with pytest.raises(DataError, match=r"No validation sources are given\. Set data\.validation"):
        open_sources([], DataConfig(), split="validation", seed=0)


# --------------------------------------------------------------------------------------------------------- parquet


def table(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"n": list(range(len(values))), "text": pa.array(values, kind)})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_parquet(tmp_path: Path, kind: pa.DataType, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROW_GROUP_BYTES", budget)
    pq.write_table(table(DOCUMENTS, kind), tmp_path / "a.parquet", row_group_size=2)
    source = opened(tmp_path / "a.parquet")
    assert read(source) == DOCUMENTS
    assert isinstance(source, sources.ParquetRows)
    assert len(source._groups) == (1 if budget == 1 else 3)


def test_errors_of_parquet(tmp_path: Path) -> None:
    def write(values: list[Any], kind: pa.DataType | None = None) -> Path:
        pq.write_table(table(values, kind), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    fails(write(["a"]), r"no column 'body'; it has n, text\. Set data\.text_key", text_key="body")
    fails(write([1]), r"column 'text' holds int64, not text\. Set data\.text_key")
    fails(write([], pa.string()), "has no rows")
    fails(write(["a", None], pa.string()), r"a\.parquet, row 2: 'text' holds NoneType, not text", index=1)
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", r"a\.parquet, row 1: not UTF-8 at byte 1 of the text", index=0)
    fails(put(tmp_path / "a.parquet", b"PAR1 no"), "cannot be read as parquet: .*anew")
    fails(put(tmp_path / "a.parquet", b""), "is empty")


# -------------------------------------------------------------------------------------------- tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with the dataset `tiny` (configs de, en; two versions of en), prepared without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar[list[Any]] = [
            tfds.core.BuilderConfig(name=name, version=v) for name, v in (("de", "1.0.0"), ("en", "2.0.0"))
        ]

        def _info(self) -> Any:
            features = {"text": tfds.features.Text(), "raw": tfds.features.Text(), "n": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples(6), "validation": self._generate_examples(2)}

        def _generate_examples(self, count: int) -> Any:
            for i in range(count):
                yield i, {"text": f"{self.builder_config.name} {i} é", "raw": b"a\xff", "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    for name in ("de", "en"):
        Tiny(config=name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    (folder / "tiny" / "en" / "10.0.0").mkdir()
    for item in (folder / "tiny" / "en" / "2.0.0").iterdir():
        (folder / "tiny" / "en" / "10.0.0" / item.name).write_bytes(item.read_bytes())
    return folder


def test_tfds(prepared: Path) -> None:
    def found(spec: str) -> list[str]:
        return sorted(read(opened(spec, data_dir=str(prepared))))

    english = [f"en {i} é" for i in range(6)]
    assert found("tfds:tiny/en:train") == found("tfds:tiny/en:2.0.0:train") == english
    assert found("tfds:tiny/de:validation") == ["de 0 é", "de 1 é"]
    assert len(found("tfds:tiny/en:train[:50%]")) == 3
    assert len(found("tfds:tiny/en:train+validation")) == 8
    assert found(f"tfds:{prepared}/tiny/en/2.0.0:train") == english


def test_newest_version_is_taken(prepared: Path) -> None:
    assert sources._prepared_directory("", "tiny/en", prepared).name == "10.0.0"


def test_default_data_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    assert len(opened("tfds:tiny/de:train")) == 6


def test_errors_of_tfds(prepared: Path, tmp_path: Path) -> None:
    at: dict[str, Any] = {"data_dir": str(prepared)}
    fails("tfds:tiny", "is not `tfds:NAME")
    fails(
        "tfds:other:train",
        r"not found in .*nothing of it is prepared.*tfds build NAME --file_format=array_record",
        **at,
    )
    fails("tfds:tiny:train", r"prepared are tiny/de/1\.0\.0, tiny/en/10\.0\.0, tiny/en/2\.0\.0", **at)
    fails("tfds:tiny/en:3.0.0:train", "not found in .*prepared are tiny/en/10.0.0, tiny/en/2.0.0", **at)
    fails("tfds:tiny/en:test", "split 'test' cannot be read; there are train, validation", **at)
    fails("tfds:tiny/en:train[:x]", r"split 'train\[:x\]' cannot be read", **at)
    fails("tfds:tiny/en:train[:0%]", r"split 'train\[:0%\]' cannot be read", **at)
    fails("tfds:tiny/en:train", r"no feature 'body'; it has .*text.*Set data\.text_key", text_key="body", **at)
    fails("tfds:tiny/en:train", "example 0: 'n' holds int, not text", text_key="n", index=0, **at)
    fails("tfds:tiny/en:train", "example 0: not UTF-8 at byte 1", text_key="raw", index=0, **at)
    info = json.loads((prepared / "tiny/de/1.0.0/dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    put(tmp_path / "dataset_info.json", json.dumps(info).encode())
    put(tmp_path / "features.json", (prepared / "tiny/de/1.0.0/features.json").read_bytes())
    fails(f"tfds:{tmp_path}:train", "is stored as tfrecord, which needs TensorFlow. Prepare it as array_record")


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


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("gsm8k/train.jsonl", "question", 7473),
        ("openstax-ccby/val.jsonl", "text", 35),
        ("c4-sample/*n.jsonl", "text", 1200),
    ],
)
def test_real_files(name: str, key: str, count: int) -> None:
    folder = Path(os.environ.get("QUIETSTAR_MATERIAL", "/nonexistent")) / "data"
    if not (folder / name).parent.is_dir():
        pytest.skip("QUIETSTAR_MATERIAL does not hold this data")
    source = opened(folder / name, text_key=key)
    assert len(source) == count
    assert all(source[i] for i in range(0, count, 7))
