"""Folders that mean harm: nothing in them blocks, fills the memory, or ends in anything but one message."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import UserError
from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.hf.json_file import MAX_JSON_BYTES
from quietstar_jax.hf.safetensors_file import read_header
from tests.hf.checkpoints import TINY, load, random_tensors, write, write_index, write_sharded
from tests.hf.runs import write_tokenizer

FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
         "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja"]  # fmt: skip


def refusal(call: Callable[[], Any]) -> str:
    """Why a call was refused, "" where it was not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def put_pipe(file: Path) -> None:
    os.mkfifo(file)


def put_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def put_socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # the name of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


def put_endless(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


@pytest.mark.parametrize("put", [put_pipe, put_device, put_socket, put_endless])
@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path, name, put):
    write(tmp_path, random_tensors(TINY))
    write_tokenizer(tmp_path, TINY.vocab_size)
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    large_weights = put is put_endless and name == "model.safetensors"  # a sparse file, refused for what it holds
    for message in (refusal(lambda: load(tmp_path)), refusal(lambda: load_tokenizer(str(tmp_path)))):
        assert name in message or (large_weights and not message)
        assert len(message) < 1000


def test_a_header_is_read_from_a_regular_file(tmp_path):
    put_pipe(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


NAMES = st.one_of(
    st.sampled_from(["a" * 300, "a" * 5000, "a/" * 3000, "é" * 200, "\ud800", "..", "/", "a/../b", ".", "", "\0", "-"]),
    st.text(max_size=400),
)


@settings(max_examples=150, deadline=None)
@given(NAMES, st.sampled_from(["", ".safetensors"]), NAMES)
def test_names_in_an_index(tmp_path_factory, file, suffix, tensor):
    folder = tmp_path_factory.getbasetemp() / "names"
    if not folder.exists():
        write_sharded(folder, random_tensors(TINY))
    write_index(folder, {tensor: file + suffix})
    with pytest.raises(UserError) as error:
        open_checkpoint(str(folder))
    assert len(str(error.value)) < 1500


@settings(max_examples=150, deadline=None)
@given(NAMES)
def test_names_of_folders(name):
    with pytest.raises(UserError):
        open_checkpoint(f"./{name}/nowhere")


LONG = {"text": "x" * 10**5, "name": {"z" * 10**5: 1}, "number": 10**5000, "list": [0] * 10**5, "lines": "\n" * 10**5}
FIELDS = st.sampled_from(
    ["model_type", "hidden_act", "num_hidden_layers", "vocab_size", "layer_types", "rope_scaling", "rope_theta",
     "architectures", "tie_word_embeddings", "sliding_window", "rms_norm_eps", "max_position_embeddings"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(FIELDS, st.sampled_from(sorted(LONG)), min_size=1), st.sampled_from(["llama", "qwen2", "phi3"]))
def test_messages_stay_short(kinds, family):
    fields = {"model_type": family} | {field: LONG[kind] for field, kind in kinds.items()}
    message = refusal(lambda: architecture_from_hf(fields, "folder"))
    assert len(message) < 2000, message[:3000]


def test_long_names_of_tensors(tmp_path):
    write(tmp_path, {})
    save_file(
        {**random_tensors(TINY), "x" * 10**6: random_tensors(TINY)["model.norm.weight"]}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert len(str(error.value)) < 2000


def test_a_config_that_never_ends(tmp_path):
    write(tmp_path, random_tensors(TINY))
    text = json.dumps({"model_type": "llama", "padding": "x" * MAX_JSON_BYTES})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json has 1000\d+ bytes"):
        open_checkpoint(str(tmp_path))
