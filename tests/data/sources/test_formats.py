"""Documents of JSON lines and parquet: all of them, in order, or an error that says where and why."""

import gzip
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.data.sources import formats
from quietstar_jax.data.sources.common import Memory
from quietstar_jax.data.sources.files import find_files
from quietstar_jax.data.sources.formats import lines_between
from quietstar_jax.data.sources.texts import TextOf, is_blank
from quietstar_jax.errors import DataError
from tests.data.reading import DOCUMENTS, fails, lines, opened, put, read


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
    assert len(pickle.dumps(large)) < 2000
    fails(put(tmp_path / f"cut-{name}", pack(lines(DOCUMENTS))[:-6]), "cannot be decompressed: ")
    fails(put(tmp_path / f"not-{name}", b"plain text"), "cannot be decompressed")
    fails(put(tmp_path / f"nothing-{name}", pack(b"")), "empty after decompression")
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
        patch.setattr(formats, "BLOCK_BYTES", scan)
        patch.setattr(formats, "cached_array", lambda directory, name, make: make())
        documents = [text for text in documents if not is_blank(text)]
        if not documents:
            fails(path, "contains no text: all of its")
            return
        source = opened(path)
        assert [source[i] for i in range(len(source))] == documents


@settings(deadline=None, max_examples=50)
@given(documents=st.lists(st.text(max_size=20), min_size=1, max_size=12), cuts=st.lists(st.integers(0, 400)))
def test_ranges_of_bytes_have_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], cuts: list[int]
) -> None:
    path = put(tmp_path_factory.mktemp("ranges") / "a.jsonl", lines(documents, end=""))
    (file,) = find_files(str(path))
    bounds = [0, *sorted(min(cut, file.size) for cut in cuts), file.size]
    found = [list(lines_between(file, a, b, TextOf("text"))) for a, b in itertools.pairwise(bounds)]
    assert [text for part in found for text in part] == ["" if is_blank(text) else text for text in documents]


def test_a_broken_line_of_a_range_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", lines(["a", "b", "c"]) + b'{"text": 1}\n' + lines(["d"]))
    (file,) = find_files(str(path))
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: 'text' contains int"):
        list(lines_between(file, file.size // 3, file.size, TextOf("text")))


def test_memory_keeps_what_was_used_last() -> None:
    memory, loaded = Memory(10), []

    def get(key: str, size: int) -> str:
        def load() -> tuple[str, int]:
            loaded.append(key)
            return key, size

        return memory.get(key, load)

    for key, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4), ("huge", 100), ("huge", 100)):
        assert get(key, size) == key
    assert loaded == ["a", "b", "c", "b", "huge"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl is empty"),
        (b"\n", r"a\.jsonl contains no records"),
        (b'{"text": ""}\n{"text": null}\n', r"a\.jsonl contains no text: all of its 2 documents are empty"),
        (b'[\n"a",\n"b"\n]\n', r"a\.jsonl, element 1 of the array: a JSON str, not an object"),
        (b'[{"text": "a"}, {"text": \n', r"a\.jsonl, element 2 of the array: broken JSON"),
        (b'[{"text": "a"}]\n[{"text": "a"}]', r"a\.jsonl: text follows the JSON array"),
        (b'"a"\n', r"a\.jsonl, line 1: a JSON str, not an object\. Write \{\.\.\.\}, with a key"),
        (b'{"body": "a", "id": 1}\n', r"a\.jsonl, line 1: no field 'text'; it has body, id\. Set .data\.text_key"),
        (b'{"m": {"body": "a", "id": 1}}\n', r"a\.jsonl, line 1: no field 'text'; it has m\.body, m\.id\."),
        (b'{"text": ["a"]}\n', r"a\.jsonl, line 1: 'text' contains a list, not text\. Set .data\.text_key"),
        (b'{"text": [{"role": "user", "content": "a"}]}\n', r"line 1: 'text' contains a conversation, not text\."),
    ],
)
def test_broken_json_lines_at_the_door(tmp_path: Path, content: bytes, message: str) -> None:
    fails(put(tmp_path / "a.jsonl", content), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl, line 2: broken JSON \(.*\)"),
        (b"\0" * 20, r"a\.jsonl, line 2: broken JSON \(it contains NUL bytes"),
        (b'"text"', r"a\.jsonl, line 2: a JSON str, not an object"),
        (b'{"body": "a"}', r"a\.jsonl, line 2: no field 'text'; it has body"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 2: not UTF-8 at byte 24\. Convert it"),
        (b'{"text": "a\\ud800"}', r"a\.jsonl, line 2: character 1 is half of a surrogate pair"),
        (b"[" * 100_000, r"a\.jsonl, line 2: broken JSON"),
    ],
)
def test_broken_json_lines_where_they_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    fails(path, message)


def table(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"n": list(range(len(values))), "text": pa.array(values, kind)})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_parquet(tmp_path: Path, kind: pa.DataType, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MEMORY", memory := Memory(budget))
    pq.write_table(table(DOCUMENTS, kind), tmp_path / "a.parquet", row_group_size=2)
    source = opened(tmp_path / "a.parquet")
    assert read(source) == DOCUMENTS
    assert len(memory._kept) == (1 if budget == 1 else 3)


def test_errors_of_parquet(tmp_path: Path) -> None:
    def write(values: list[Any], kind: pa.DataType | None = None) -> Path:
        pq.write_table(table(values, kind), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    fails(write(["a"]), r"no field 'body'; it has n, text\. Set .data\.text_key", text_key="body")
    fails(write([1]), r"row 1: 'text' contains int, not text\. Set .data\.text_key")
    fails(write([], pa.string()), "has no rows")
    assert read(opened(write(["a", None, "b"], pa.string()))) == ["a", "b"]
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", r"a\.parquet, row 1: not UTF-8 at byte 1 of the text", index=0)
    fails(put(tmp_path / "a.parquet", b"PAR1 no"), "cannot be read as parquet: ")
    fails(put(tmp_path / "a.parquet", b""), "is empty")


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
