"""Prepared documents are the documents, whatever interrupted their preparation; what does not fit is refused."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from quietstar_jax.data.documents import open_documents
from quietstar_jax.data.packing import Position
from quietstar_jax.data.pipeline import training_sequences, validation_batches
from quietstar_jax.data.prepare import main
from quietstar_jax.data.pretokenized import write as preparation
from quietstar_jax.data.pretokenized.read import PreparedDocuments
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data_config import PACKINGS, DataConfig
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from tests.data.reading import lines, put
from tests.data.words import (
    EOS,
    LENGTHS,
    TOKENIZER,
    config,
    documents,
    interleaved,
    same,
    sequences,
    take,
    words_tokenizer,
    write,
)

ROOT = Path(__file__).resolve().parents[2]


def prepared(output: Path, *sources: str, shards: int = 0, workers: int = 1, tokenizer: Tokenizer = TOKENIZER) -> Path:
    preparation.prepare(sources, tokenizer, "", output, DataConfig(), shards=shards, workers=workers)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir())}


def texts_of(folder: Path, tokenizer: Tokenizer = TOKENIZER) -> list[list[int]]:
    found = PreparedDocuments(folder, tokenizer)
    read = [found[i].tolist() for i in range(len(found))]
    assert found.counts().tolist() == [len(text) for text in read]
    return read


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", documents(LENGTHS))


@pytest.mark.parametrize("shards", [0, 1, 2, 3, 7, 50])
def test_any_number_of_shards_has_every_document(corpus: str, tmp_path: Path, shards: int) -> None:
    folder = prepared(tmp_path / "out", corpus, shards=shards)
    assert texts_of(folder) == documents(LENGTHS)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) == max(shards, 1)
    assert (manifest["documents"], manifest["tokens"], manifest["empty_documents"]) == (11, sum(LENGTHS), 0)
    assert {item.suffix for item in folder.iterdir()} == {".json", ".npy", ".array_record"}


def test_all_kinds_of_sources(tmp_path: Path) -> None:
    def content(first: int) -> bytes:
        return lines([str(first + i) for i in range(4)])

    put(tmp_path / "a" / "1.jsonl", content(100))
    put(tmp_path / "a" / "2.jsonl.gz", gzip.compress(content(200)))
    put(tmp_path / "a" / "3.json.zst", zstandard.compress(content(300)))
    pq.write_table(pa.table({"text": [str(400 + i) for i in range(4)]}), tmp_path / "b.parquet", row_group_size=3)
    for i in range(4):
        put(tmp_path / "c" / f"{i}.txt", str(500 + i).encode())
    sources = [str(tmp_path / name) for name in ("a", "b.parquet", "c")]
    for shards in (1, 5):
        folder = prepared(tmp_path / f"out{shards}", *sources, shards=shards)
        assert texts_of(folder) == [[100 * k + i] for k in (1, 2, 3, 4, 5) for i in range(4)]
    pytest.importorskip("datasets")
    folder = prepared(tmp_path / "hub", f"hf:{tmp_path / 'a'}:train")
    assert sorted(texts_of(folder)) == [[100 * k + i] for k in (1, 2, 3) for i in range(4)]


def test_embedded_corpus(tmp_path: Path) -> None:
    from quietstar_jax.data.tokenization import load_tokenizer
    from quietstar_jax.data_config import SyntheticConfig

    tokenizer = load_tokenizer("synthetic")
    small = DataConfig(synthetic=SyntheticConfig(documents=7))
    preparation.prepare(["synthetic"], tokenizer, "", tmp_path / "out", small, shards=3, workers=1)
    found = open_documents("synthetic", small, tokenizer, split="train", seed=0)
    assert texts_of(tmp_path / "out", tokenizer) == [found[i].tolist() for i in range(7)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_training_is_the_same_as_on_the_text(corpus: str, tmp_path: Path, packing: str) -> None:
    folder = str(prepared(tmp_path / "out", corpus, shards=3))
    expected = take(corpus, 60, packing=packing)
    same(take(folder, 60, packing=packing), expected)
    same(take(f"prepared:{folder}", 60, packing=packing), expected)
    parts = [take(folder, 20, packing=packing, process=(index, 3)) for index in range(3)]
    same(interleaved(parts), expected)
    iterator = sequences(folder, packing=packing)
    iterator.next_batch(17)
    state = iterator.get_state()
    assert Position(17, state["document"], state["offset"]) is not None
    again = sequences(folder, packing=packing)
    again.set_state(state)
    same(again.next_batch(43), {key: value[17:] for key, value in expected.items()})
    for text, tokens in zip(validate(corpus, packing), validate(folder, packing), strict=True):
        same(text, tokens)


def validate(source: str, packing: str) -> list[Any]:
    return list(validation_batches(config(source, packing=packing), TOKENIZER, batch_size=4))


def test_text_beside_prepared_documents(corpus: str, tmp_path: Path) -> None:
    folder = str(prepared(tmp_path / "out", corpus))
    for packing in PACKINGS:
        both = take("", 40, train=(folder, corpus), packing=packing)
        same(both, take("", 40, train=(corpus, corpus), packing=packing))
    counted = [training_sequences(config(*texts), TOKENIZER, seed=0).counted_tokens for texts in ((folder,), (corpus,))]
    assert counted == [sum(LENGTHS), None]


def test_documents_without_tokens_are_left_out(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", write(tmp_path / "a.jsonl", [[], [2, 3], [], [4], []]))
    assert texts_of(folder) == [[2, 3], [4]]
    assert json.loads((folder / "manifest.json").read_text())["empty_documents"] == 3
    with pytest.raises(DataError, match=r"no token.*data.text_key"):
        prepared(tmp_path / "none", write(tmp_path / "b.jsonl", [[], []]))


def test_large_vocabulary(tmp_path: Path) -> None:
    tokenizer = words_tokenizer(70_000)
    folder = prepared(tmp_path / "out", write(tmp_path / "a.jsonl", [[2, 69_999]]), tokenizer=tokenizer)
    assert texts_of(folder, tokenizer) == [[2, 69_999]]


# ----------------------------------------------------------------------------------------------------- interruption


def command(source: str, tokenizer: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "quietstar_jax.data.prepare", "--data", source, "--tokenizer", str(tokenizer),
        "--output", str(output), *more,
    ]  # fmt: skip


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 of the command and, by themselves, of its two workers; another number of workers goes on."""
    TOKENIZER.save(tmp_path / "tokenizer")
    texts = [[2 + (i * j) % 900 for j in range(300)] for i in range(8_000)]
    source, output = write(tmp_path / "a.jsonl", texts), tmp_path / "out"
    arguments = command(source, tmp_path / "tokenizer", output, "--shards", "12", "--workers", "2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while len(list(output.glob("tokens-*.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it made no progress"
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    with pytest.raises(DataError, match=r"has not finished. Run the same command again"):
        sequences(str(output))
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()
              for child in children):  # fmt: skip
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.05)

    # A shard is complete with its .json file: a record file without one was renamed just before the kill.
    complete = [item.with_suffix(".array_record") for item in output.glob("tokens-*.json")]
    stamps = {item: item.stat().st_mtime_ns for item in complete}
    assert len(stamps) >= 2
    tokenizer = tokenizer_of(tmp_path)
    prepared(output, source, shards=12, tokenizer=tokenizer)
    assert all(item.stat().st_mtime_ns == stamp for item, stamp in stamps.items())
    whole = prepared(tmp_path / "whole", source, shards=12, tokenizer=tokenizer)
    assert contents(output) == contents(whole)
    assert texts_of(output) == texts


def tokenizer_of(folder: Path) -> Tokenizer:
    from quietstar_jax.data.tokenization import load_tokenizer

    return load_tokenizer(str(folder / "tokenizer"))


@pytest.mark.parametrize("moment", ["shard", "counts", "manifest", "clean"])
def test_stopped_at_any_moment(corpus: str, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    whole, output = prepared(tmp_path / "whole", corpus, shards=3), tmp_path / "out"
    ordinary = preparation.write_json

    def until_manifest(path: Path, value: dict[str, Any]) -> None:
        return stop() if path.name == "manifest.json" else ordinary(path, value)

    with monkeypatch.context() as patch:
        name = {"shard": "_sha256", "counts": "write_array", "manifest": "write_json", "clean": "_clean"}[moment]
        patch.setattr(preparation, name, until_manifest if moment == "manifest" else stop)
        with pytest.raises(Stopped):
            prepared(output, corpus, shards=3)
    if moment != "clean":
        with pytest.raises(DataError, match="has not finished"):
            sequences(str(output))
    assert contents(prepared(output, corpus, shards=3)) == contents(whole)
    assert contents(prepared(output, corpus, shards=3)) == contents(whole)  # once more changes nothing


def test_another_preparation_is_refused(corpus: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", corpus, shards=3)
    before = contents(folder)
    with pytest.raises(DataError, match=r"with other settings .*\n  - preparation\.shard_count: 3 -> 2|parts\.count"):
        prepared(folder, corpus, shards=2)
    write(Path(corpus), documents([1, *LENGTHS]))
    with pytest.raises(DataError, match=r"sources\[0\]\.bytes: \d+ -> \d+"):
        prepared(folder, corpus, shards=3)
    assert contents(folder) == before
    with pytest.raises(DataError, match=r"is not empty .it has a.txt.. Choose a new folder"):
        prepared(put(tmp_path / "other" / "a.txt", b"x").parent, corpus)
    assert contents(tmp_path / "other") == {"a.txt": b"x"}
    with pytest.raises(DataError, match="is already prepared"):
        prepared(tmp_path / "again", str(folder))
    put(tmp_path / "file", b"")
    with pytest.raises(DataError, match="cannot be written"):
        prepared(tmp_path / "file", corpus)


def test_one_at_a_time(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            prepared(tmp_path / "out", corpus)
    prepared(tmp_path / "out", corpus)


def test_broken_documents_and_workers(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    path = Path(write(tmp_path / "a.jsonl", documents([4] * 12)))
    path.write_text(path.read_text().replace('"46 47', "46 47"))
    arguments = ["--data", str(path), "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    for more in (["--workers", "1"], ["--workers", "2", "--shards", "4"]):
        with pytest.raises(DataError, match=r"a\.jsonl, line 12: broken JSON"):
            main([*arguments[:-1], f"{arguments[-1]}{more[1]}", *more])
    with pytest.raises(ConfigError, match=r"--shards is .-1"):
        main([*arguments, "--shards", "-1"])
    with pytest.raises(ConfigError, match=r"--output is .*URL"):
        main([*arguments[:-1], "gs://bucket/tokens"])


def test_command_line(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    packed = put(tmp_path / "b.jsonl.gz", gzip.compress(lines(["7 8"])))
    main(command(str(packed), tmp_path / "tokenizer", tmp_path / "out", "--shards", "4")[3:])
    said = capsys.readouterr().out
    assert "1 documents, 2 tokens in 1 shards (4 were requested: " in said
    assert f"--config.data.train=\"('{tmp_path}/out',)\"" in said


# ------------------------------------------------------------------------------------------------------- bad folders


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda manifest: "{", "manifest.json cannot be used: .*Remove the folder and prepare it again"),
        (lambda manifest: {**manifest, "format": "quietstar_jax tokens 9"}, "this version reads 'quietstar_jax tokens"),
        (lambda manifest: {k: v for k, v in manifest.items() if k != "shards"}, "field 'shards' is missing"),
        (lambda manifest: {**manifest, "tokens": 1}, "tokens is not the sum over the shards"),
        (lambda manifest: {**manifest, "dtype": "float64"}, "a field has an impossible value"),
        (lambda manifest: {**manifest, "tokenizer": {}}, "field 'fingerprint' is missing"),
    ],
)
def test_broken_manifests(corpus: str, tmp_path: Path, damage: Any, message: str) -> None:
    folder = prepared(tmp_path / "out", corpus)
    path = folder / "manifest.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(DataError, match=message):
        sequences(f"prepared:{folder}")


def test_broken_folders(corpus: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", corpus)
    (shard,) = folder.glob("*.array_record")
    content, counts = shard.read_bytes(), (folder / "token_counts.npy").read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"has \d+ bytes, but \d+ according to manifest.json"):
        sequences(str(folder))
    half = len(content) // 2
    shard.write_bytes(content[:half] + b"\0" * (len(content) - half))
    with pytest.raises(DataError, match=r"Record . of .*array_record cannot be read"):
        sequences(str(folder)).next_batch(1)
    shard.write_bytes(content)
    for broken, message in ((b"x", "cannot be read"), (counts[:-4], "cannot be read")):
        (folder / "token_counts.npy").write_bytes(broken)
        with pytest.raises(DataError, match=f"token_counts.npy {message}"):
            sequences(str(folder))
    np.save(folder / "token_counts.npy", np.ones(11, np.int32))
    with pytest.raises(DataError, match=r"does not fit manifest\.json"):
        sequences(str(folder))
    shard.unlink()
    with pytest.raises(DataError, match=r"array_record is missing"):
        sequences(str(folder))
    for spec, message in (
        (f"prepared:{tmp_path}", "has no manifest.json"),
        ("prepared:/absent", "There is no folder '/absent'"),
        ("prepared:gs://bucket/tokens", "must be on a local disk"),
    ):
        with pytest.raises(DataError, match=message):
            sequences(spec)


def test_other_tokenizers_are_refused(corpus: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path / "out", corpus)
    with pytest.raises(DataError, match=r"was prepared with the tokenizer 'words' \(1000 tokens.*\(999 tokens"):
        training_sequences(config(str(folder)), words_tokenizer(999), seed=0)
    thinking = words_tokenizer()
    thinking.fast.add_tokens(["<|startthought|>"], special_tokens=True)
    more = Tokenizer("words that think", thinking.fast)
    training_sequences(config(str(folder)), more, seed=0).next_batch(1)
    theirs = prepared(tmp_path / "theirs", corpus, tokenizer=more)
    with pytest.raises(DataError, match=r"missing tokens: <\|startthought\|>"):
        sequences(str(theirs))


def test_prepared_data_that_changed_is_noticed(corpus: str, tmp_path: Path) -> None:
    first = prepared(tmp_path / "out", corpus)
    state = sequences(str(first)).get_state()
    write(Path(corpus), documents([*LENGTHS[:-1], LENGTHS[-1] + 1]))
    second = prepared(tmp_path / "again", corpus)
    sequences(str(first)).set_state(state)
    with pytest.raises(CheckpointError, match=r"other content in .*again"):
        sequences(str(second)).set_state(state)
    assert EOS not in texts_of(second)[0]
