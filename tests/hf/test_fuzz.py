"""Invented headers, indices and settings: read as what they say, or refused with a reason; never anything else.

Together with the damaged files of `test_files.py` and the configs of `test_config_json.py` the suite tries 2,850
inputs.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from quietstar_jax.config import from_config_dict
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.hf.files import CheckpointFiles, open_checkpoint
from quietstar_jax.hf.safetensors_file import ITEM_BYTES, read_header, read_tensor
from quietstar_jax.training.base import check_thoughts
from tests.hf.checkpoints import TINY, random_tensors, write_index, write_sharded

JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})
SIZES = st.integers(0, 3) | st.sampled_from([2**31, 2**63, 10**30])
DTYPES = st.sampled_from([*ITEM_BYTES, "X9", "f32"])
SHAPES = st.lists(SIZES, max_size=4) | st.just([1] * 70)


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """(what came back, "") or (None, why it was refused)."""
    try:
        value = call()
    except (CheckpointError, ConfigError) as error:
        event("refused")
        return None, str(error)
    event("read")
    return value, ""


@st.composite
def headers(draw: Any) -> dict[str, Any]:
    """Tensors that lie one after another, with now and then a field that is wrong."""
    header: dict[str, Any] = {}
    begin = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype, shape = draw(DTYPES), draw(SHAPES)
        end = begin + min(int(np.prod([min(n, 99) for n in shape])) * ITEM_BYTES.get(dtype, 1), 10_000)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
        if draw(st.integers(0, 4)) == 0:
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
                JUNK | SHAPES | st.lists(JUNK | SIZES, max_size=3)
            )
    return header


@settings(max_examples=1500, deadline=None)
@given(headers(), st.integers(0, 100), st.booleans())
def test_invented_headers(tmp_path_factory, header, size, fits):
    text = json.dumps(header).encode()
    ends = [item["data_offsets"][1] for item in header.values() if _is_pair(item.get("data_offsets"))]
    file = tmp_path_factory.getbasetemp() / "invented.safetensors"
    size = min(max(ends, default=0), 100_000) if fits else size
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    tensors, refusal = outcome(lambda: read_header(file))
    if refusal:
        assert "invented.safetensors" in refusal
        return
    assert set(tensors) == set(header) - {"__metadata__"}
    for name, info in tensors.items():
        array, refusal = outcome(functools.partial(read_tensor, info))
        assert (refusal and name in refusal) or (array.shape == tuple(header[name]["shape"]) and not array.any())


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n < 2**40 for n in value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, write_sharded(folder, random_tensors(TINY))


PATHS = st.sampled_from(["model-00001-of-00002.safetensors", "../model.safetensors", "/etc/passwd", "config.json", ".",
                         "./model-00002-of-00002.safetensors", "a/b.safetensors", "..safetensors"])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_invented_indices(sharded, data):
    folder, weight_map = sharded
    names = st.sampled_from(sorted(weight_map)) | st.text(max_size=3)
    write_index(folder, weight_map | data.draw(st.dictionaries(names, PATHS | JUNK, max_size=2)))
    opened, refusal = outcome(lambda: open_checkpoint(str(folder)))
    if refusal:
        assert str(folder) in refusal
    else:
        assert all(info.file.resolve().is_relative_to(folder.resolve()) for info in opened.tensors.values())


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["thought_embedding_scale", "thought_mixing", "thought_token_ids", "thought_length"]),
        JUNK | st.sampled_from(["hidden_states", [4, 5], 10**400, 7.0]),
    )
)
def test_invented_settings_of_thoughts(fields):
    config = from_config_dict({})
    files = CheckpointFiles(Path("folder"), fields, {})
    _, refusal = outcome(lambda: check_thoughts(files, config, (4, 5)))
    if refusal:
        assert "thought" in refusal
    else:
        assert np.isfinite(float(fields.get("thought_embedding_scale", 1)))
        assert fields.get("thought_token_ids") in (None, [4, 5])
