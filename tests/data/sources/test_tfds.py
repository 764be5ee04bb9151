"""Prepared tensorflow-datasets in both formats, read without TensorFlow."""

import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import grain
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from quietstar_jax.data.sources import tfds as tfds_source
from quietstar_jax.data.sources import tfrecord
from quietstar_jax.data.sources.files import one_file
from quietstar_jax.data.sources.tfrecord import Stretch, TfRecords
from tests.data.reading import fails, opened, put, read


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
    assert tfds_source._prepared_directory("", "tiny/en", str(prepared)) == f"{prepared}/tiny/en/10.0.0"


def test_default_data_dir(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(prepared))
    assert len(opened("tfds:tiny/de:train")) == 6


def test_errors_of_tfds(prepared: Path, tmp_path: Path) -> None:
    at: dict[str, Any] = {"data_dir": str(prepared)}
    fails("tfds:tiny", "is not `tfds:NAME")
    fails(
        "tfds:other:train",
        r"not found in .*it is not prepared.*tfds build NAME --file_format=array_record",
        **at,
    )
    fails("tfds:tiny:train", r"prepared are tiny/de/1\.0\.0, tiny/en/10\.0\.0, tiny/en/2\.0\.0", **at)
    fails("tfds:tiny/en:3.0.0:train", "not found in .*prepared are tiny/en/10.0.0, tiny/en/2.0.0", **at)
    fails("tfds:tiny/en:test", "split 'test' cannot be read; there are train, validation", **at)
    fails("tfds:tiny/en:train[:x]", r"split 'train\[:x\]' cannot be read", **at)
    fails("tfds:tiny/en:train[:0%]", r"split 'train\[:0%\]' cannot be read", **at)
    fails("tfds:tiny/en:train", r"no field 'body'; it has .*text.*data\.text_key", text_key="body", **at)
    fails("tfds:tiny/en:train", "example 0: 'n' contains int, not text", text_key="n", index=0, **at)
    fails("tfds:tiny/en:train", "example 0: not UTF-8 at byte 1", text_key="raw", index=0, **at)
    info = json.loads((prepared / "tiny/de/1.0.0/dataset_info.json").read_text())
    info["fileFormat"] = "riegeli"
    put(tmp_path / "features.json", (prepared / "tiny/de/1.0.0/features.json").read_bytes())
    for name in ("tiny-train.riegeli-00000-of-00001", "tiny-validation.riegeli-00000-of-00001"):
        put(tmp_path / name, b"x")
    put(tmp_path / "dataset_info.json", json.dumps(info).encode())
    fails(f"tfds:{tmp_path}:train", "is stored as riegeli, which is not supported. Prepare it")
    put(tmp_path / "dataset_info.json", b"{")
    fails(f"tfds:{tmp_path}:train", "cannot be read as a dataset: ")


OWN = "tensorflow_datasets.core.features.text_feature.Text"


@pytest.mark.parametrize("spelling", ["class", "nested", "snake_case", "legacy", "json_in_text"])
@pytest.mark.parametrize("behind_url", [False, True])
def test_a_dataset_runs_no_code(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, behind_url: bool
) -> None:
    """A module inside of the folder would be imported, as the working directory is where modules are looked for."""
    whole, folder = prepared / "tiny/de/1.0.0", tmp_path / "hostile"
    for item in whole.iterdir():
        put(folder / item.name, item.read_bytes())
    put(folder / "own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n".encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    features = json.loads((whole / "features.json").read_text())
    inner = features["featuresDict"]["features"]
    if spelling == "class":
        inner["text"]["pythonClassName"] = "hostile.own.Text"
    elif spelling == "nested":
        sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
        inner["n"] = {"pythonClassName": sequence, "sequence": {"feature": {"pythonClassName": "hostile.own.Text"}}}
    elif spelling == "snake_case":
        inner["text"]["python_class_name"] = inner["text"].pop("pythonClassName").replace(OWN, "hostile.own.Text")
    else:
        legacy = {"type": "hostile.own.Text", "content": {}}
        features = {"type": features["pythonClassName"], "content": {"text": legacy}}
        if spelling == "json_in_text":
            features = {"pythonClassName": features["type"], "jsonFeature": {"json": json.dumps({"text": legacy})}}
    put(folder / "features.json", json.dumps(features).encode())
    spec = f"tfds:file://{folder}:train" if behind_url else f"tfds:{folder}:train"
    fails(spec, r"features\.json names the feature class 'hostile\.own\.Text', which is not one of tensorflow_datasets")
    assert not (tmp_path / "ran").exists()


def test_broken_array_records(prepared: Path, tmp_path: Path) -> None:
    whole = prepared / "tiny/de/1.0.0"
    for item in whole.iterdir():
        put(tmp_path / item.name, item.read_bytes())
    (shard,) = tmp_path.glob("tiny-train*")
    content = shard.read_bytes()
    for cut in (len(content) // 2, len(content) - 100):
        put(shard, content[:cut])
        fails(f"tfds:{tmp_path}:train", "Record 0 of .* cannot be read: .*Copy the file again", index=0)
    put(shard, b"")
    fails(f"tfds:{tmp_path}:train", "is empty. Copy the file again")
    shard.unlink()
    fails(f"tfds:{tmp_path}:train", "is missing. Copy it again")


# -------------------------------------------------------------------------------------------------------- tfrecord


def masked(data: bytes) -> bytes:
    """The checksum of a tfrecord, bit by bit: CRC-32C (Castagnoli, reflected), rotated by 15 and offset."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(records: Iterable[bytes]) -> bytes:
    heads = [(struct.pack("<Q", len(record)), record) for record in records]
    return b"".join(head + masked(head) + record + masked(record) for head, record in heads)


@pytest.fixture
def tfrecords(prepared: Path, tmp_path: Path) -> Path:
    """The same examples as tiny/en, in two tfrecord files (of 4 and 2)."""
    folder, whole = tmp_path / "tiny" / "1.0.0", prepared / "tiny/en/2.0.0"
    info = json.loads((whole / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] = ["4", "2"]
    records = list(ArrayRecordDataSource([str(next(whole.glob("tiny-train*")))]))
    put(folder / "tiny-train.tfrecord-00000-of-00002", framed(records[:4]))
    put(folder / "tiny-train.tfrecord-00001-of-00002", framed(records[4:]))
    put(folder / "dataset_info.json", json.dumps(info).encode())
    put(folder / "features.json", (whole / "features.json").read_bytes())
    return folder


def test_tfrecords(prepared: Path, tfrecords: Path, tmp_path: Path) -> None:
    expected = read(opened(f"tfds:{prepared}/tiny/en/2.0.0:train"))
    source = opened("tfds:tiny:train", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert read(source) == expected
    assert len(list((tmp_path / "cache").glob("tfrecord-*.npy"))) == 2
    assert read(opened("tfds:tiny:train[50%:]", data_dir=str(tmp_path))) == expected[3:]
    assert [piece.name.rpartition("-train")[2] for piece in source.pieces()] == [
        ".tfrecord-00000-of-00002", ".tfrecord-00001-of-00002",
    ]  # fmt: skip
    assert "tensorflow" not in sys.modules


def test_behind_a_url(prepared: Path, tfrecords: Path, tmp_path: Path) -> None:
    expected = read(opened(f"tfds:{tfrecords}:train"))
    system = fsspec.filesystem("memory")
    try:
        system.put(str(tmp_path / "tiny"), "/data/tiny", recursive=True)
        system.put(str(prepared / "tiny/de/1.0.0"), "/data/arrays", recursive=True)
        source = opened("tfds:tiny:train", data_dir="memory://data", cache_dir=str(tmp_path / "cache"))
        assert read(source) == expected
        assert read(opened("tfds:memory://data/tiny/1.0.0:train[:3]")) == expected[:3]
        fails("tfds:memory://data/arrays:train", "array_record files .* mount memory://")
        fails("tfds:tiny/xx:train", "it is not prepared", data_dir="memory://data")
        system.rm("/data/tiny/1.0.0/tiny-train.tfrecord-00001-of-00002")
        fails("tfds:tiny:train", "tfrecord-00001-of-00002 cannot be read", data_dir="memory://data")
        system.rm("/data/tiny/1.0.0/features.json")
        fails("tfds:tiny:train", "cannot be read as a dataset", data_dir="memory://data")
    finally:
        system.rm("/data", recursive=True)


def test_an_index_that_was_kept_is_used_and_may_be_lost(
    tfrecords: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cache = f"tfds:{tfrecords}:train", tmp_path / "cache"
    first = read(opened(spec, cache_dir=str(cache)))
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord, "_record_starts", lambda file: pytest.fail("walked again"))
        assert read(opened(spec, cache_dir=str(cache))) == first
    for item in cache.iterdir():
        put(item, b"damaged")
    assert read(opened(spec, cache_dir=str(cache))) == first
    put(tmp_path / "file", b"")
    assert read(opened(spec, cache_dir=str(tmp_path / "file"))) == first  # nothing can be written there


def test_a_file_that_others_wrote() -> None:
    """grain ships a tfrecord file of the first lines of the look-and-say sequence for its own tests."""
    path = Path(grain.__file__).parent / "_src/python/testdata/morris_sequence_first_5.tfrecord"
    if not path.is_file():
        pytest.skip("this grain ships no tfrecord file")
    (file,) = [one_file(str(path))]
    records = TfRecords([Stretch(file, 0, 5, 5)], "")
    assert [records[i] for i in range(5)] == [b"1", b"1 1", b"2 1", b"1 2 1 1", b"1 1 1 2 2 1"]


def test_broken_tfrecords(tfrecords: Path) -> None:
    spec, shard = f"tfds:{tfrecords}:train", tfrecords / "tiny-train.tfrecord-00001-of-00002"
    content = shard.read_bytes()
    for broken, message in (
        (content[:-30], "ends in the middle of record 1"),
        (content[:-3], "ends in the middle of record 1"),
        (content + b"abc", "ends in the middle of record 2"),
        (content[:1] + b"!" + content[2:], "record 0: the checksum of its length is wrong"),
        (content[:40] + bytes([content[40] ^ 1]) + content[41:], "record 0: the checksum is wrong"),
        (content + framed([b""]), "contains 3 records, but 2 "),
        (framed([b"\xff" * 20, b""]), "example 4 cannot be read"),
    ):
        put(shard, broken)
        fails(spec, message)
