"""Every way in which the files of a checkpoint can be broken, and where they come from."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quietstar_jax.errors import CheckpointError
from quietstar_jax.hf import files as hf_files
from quietstar_jax.hf.files import open_checkpoint
from tests.hf.checkpoints import TINY, load_decoder, random_tensors, refusal, write, write_index, write_sharded


def test_quantized_tensors_are_refused(tmp_path):
    tensors = {name: value.astype(ml_dtypes.float8_e4m3fn) for name, value in random_tensors(TINY).items()}
    message = refusal(write(tmp_path, tensors))
    assert all(part in message for part in ("weight: dtype F8_E4M3", "and 13 more", "Use the unquantized checkpoint"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is F8_E4M3"):
        open_checkpoint(str(tmp_path)).read("model.norm.weight")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1, -200])
def test_truncated_file(kept, tmp_path):
    file = write(tmp_path, random_tensors(TINY)) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert "truncated" in message


def test_a_file_that_shrinks_after_opening(tmp_path):
    file = write(tmp_path, random_tensors(TINY)) / "model.safetensors"
    opened = open_checkpoint(str(tmp_path))
    file.write_bytes(file.read_bytes()[:-4])
    last = max(opened.tensors.values(), key=lambda info: info.offset)
    with pytest.raises(CheckpointError, match=f"ends within tensor {re.escape(last.name)}"):
        opened.read(last.name)


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw(b"{nonsense"), ["broken safetensors header"]),
        (raw(b"\xff\xfe"), ["broken safetensors header"]),
        (raw(b"[" * 100_000), ["broken safetensors header"]),
        (raw([1, 2]), ["not a JSON object"]),
        (raw({"t": 3}), ["tensor t"]),
        (raw({"t": {"dtype": 1, "shape": [], "data_offsets": [0, 0]}}), ["tensor t", "dtype"]),
        (raw({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}), ["tensor t", "shape"]),
        (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"), ["tensor t", "data_offsets"]),
        (raw({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), ["tensor t", "F32[2]"]),
        (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), ["tensor t", "gap"]),
        (raw({n: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for n in "st"}, b"1"), ["tensor t", "overlaps"]),
        (raw({"t": {"dtype": "X9", "shape": [1], "data_offsets": [4, 0]}}, b"1234"), ["tensor t"]),
        (raw({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"), ["4 bytes"]),
        (raw(b'{"t": {}, "t": {}}'), ["gives t more than once"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["Git LFS", "git lfs pull"]),
    ],
)  # fmt: skip
def test_broken_headers(content, words, tmp_path):
    file = write(tmp_path, {}) / "model.safetensors"
    file.write_bytes(content)
    message = refusal(tmp_path)
    assert all(word in message for word in ["model.safetensors", *words]), message


def test_missing_shards_are_listed(tmp_path):
    write_sharded(tmp_path, random_tensors(TINY))
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    message = refusal(tmp_path)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in message


def test_a_tensor_in_two_shards(tmp_path):
    write_sharded(tmp_path, random_tensors(TINY))
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "lm_head.weight": np.zeros((20, 8), np.float32)}, second)
    message = refusal(tmp_path)
    assert all(word in message for word in ("lm_head.weight", "model-00001", "model-00002"))


def test_the_index_promises_what_a_shard_does_not_hold(tmp_path):
    weight_map = write_sharded(tmp_path, random_tensors(TINY))
    write_index(tmp_path, weight_map | {"extra": "model-00001-of-00002.safetensors"})
    assert "extra, listed in model-00001-of-00002.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "path", ["../model.safetensors", "/etc/model.safetensors", "a/../../m.safetensors", "C:\\m.safetensors",
             "..\\m.safetensors", "weights.bin", "", 3, None, "m\0.safetensors"],
)  # fmt: skip
def test_the_index_cannot_leave_the_folder(path, tmp_path):
    write_sharded(tmp_path, random_tensors(TINY))
    write_index(tmp_path, {"lm_head.weight": path})
    message = refusal(tmp_path)
    assert all(word in message for word in ("index.json", "lm_head.weight", repr(path)))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}", '{"a": 1, "a": 2}', "[" * 100_000])
def test_broken_index(text, tmp_path):
    write_sharded(tmp_path, random_tensors(TINY))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refusal(tmp_path)


def test_folders_without_what_is_needed(tmp_path):
    assert "it has nothing" in refusal(tmp_path)
    write(tmp_path, {})
    (tmp_path / "config.json").unlink()
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 2, "vocab_size": 3}')
    message = refusal(tmp_path)
    assert "gives vocab_size more than once" in message
    assert "not valid JSON" not in message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", "", __file__])
def test_a_path_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(name)


def test_hub_ids(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(write(tmp_path / "0123abc", random_tensors(TINY)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    opened = open_checkpoint("someone/model", "main")
    assert (opened.commit, asked["name"], asked["revision"]) == ("0123abc", "someone/model", "main")
    from huggingface_hub.utils import filter_repo_objects

    listed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
              "merges.txt", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "run.py",
              "tokenizer.pkl"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(listed, **patterns)) == listed[:5]
    with pytest.raises(CheckpointError, match="revision"):
        open_checkpoint(str(tmp_path / "0123abc"), "main")


def cached(root: Path, commit: str = "0" * 39 + "1") -> Path:
    """A hub cache as `huggingface_hub` leaves it, with one complete snapshot; returns the snapshot."""
    repository = root / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write_sharded(snapshot, random_tensors(TINY))
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub's client reads the cache in `tmp_path` and has no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("revision", ["", "main", "0" * 39 + "1"])
def test_a_cached_hub_id_opens_offline_at_its_commit(offline, revision):
    snapshot = cached(offline)
    opened = open_checkpoint("someone/model", revision)
    assert (opened.folder, opened.commit) == (snapshot, "0" * 39 + "1")
    np.testing.assert_array_equal(opened.read("model.norm.weight"), random_tensors(TINY)["model.norm.weight"])


def test_what_the_cache_lacks_is_said_offline(offline):
    snapshot = cached(offline)
    with pytest.raises(CheckpointError, match=r"someone/model.*revision 'v2'"):
        open_checkpoint("someone/model", "v2")
    with pytest.raises(CheckpointError, match=r"someone/other.*could not be downloaded"):
        open_checkpoint("someone/other")
    (snapshot / "model-00002-of-00002.safetensors").unlink()  # a download that was cut off
    with pytest.raises(CheckpointError, match=r"missing: .*model-00002-of-00002\.safetensors"):
        open_checkpoint("someone/model")


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("bad id")])
def test_the_hub_fails(error, monkeypatch):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"someone/model.*{error}"):
        hf_files.download("someone/model", "v1")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_load_or_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    whole = (write(folder, random_tensors(TINY)) / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, header), st.integers(0, 255)), max_size=3)):
        if position < len(damaged):
            damaged[position] = byte
    (folder / "model.safetensors").write_bytes(bytes(damaged))
    try:
        opened = open_checkpoint(str(folder))
        load_decoder(opened, TINY)
    except CheckpointError:
        pass
