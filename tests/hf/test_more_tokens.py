"""A tokenizer with more tokens than the model has embeddings: opened, unless a text contains such a token."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from quietstar_jax.data.documents import open_documents
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import load_model
from tests.hf.checkpoints import TINY, random_tensors, write
from tests.hf.runs import END, START, start_run, write_tokenizer

ROWS = TINY.vocab_size


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model of 20 rows whose tokenizer has a padding token and another special token beyond them."""
    write(tmp_path / "hf", random_tensors(TINY))
    write_tokenizer(tmp_path / "hf", ROWS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token_id == ROWS
    return tmp_path / "hf"


def test_it_opens_and_pads_with_the_end_of_text(folder, caplog):
    model = load_model(folder)
    assert (model.vocabulary.pad_id, model.tokenizer.pad_id) == (1, 1)
    assert [record for record in caplog.records if "2 tokens ([PAD], ...)" in record.getMessage()]
    assert model.tokenizer.encode("w5 w6") == [5, 6]
    generated = Generator(model).generate(["w5 w6"], max_tokens=3)
    assert len(generated) == 1


def test_a_text_with_such_a_token_is_refused_wherever_it_is_read(folder, tmp_path):
    model = load_model(folder)
    told = r"contains the token '<tool>' \(near 'w5 <tool> w6'\), id 21.*20"
    for tokenizer in (model.tokenizer, pickle.loads(pickle.dumps(model.tokenizer))):
        with pytest.raises(DataError, match=told):
            tokenizer.encode("w5 <tool> w6")
        with pytest.raises(DataError, match=told):
            tokenizer.encode_many(["w5", "w5 <tool> w6"])
    with pytest.raises(DataError, match=told):
        Generator(model).generate(["w5 <tool> w6"], max_tokens=3)
    run, _ = start_run(tmp_path / "run", folder)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("w5", "w5 <tool> w6")))
    spec = str(tmp_path / "text.jsonl")
    documents = open_documents(spec, DataConfig(cache_dir=""), run.tokenizer, split="train", seed=0)
    assert documents[0].tolist() == [5]
    with pytest.raises(DataError, match=rf"text\.jsonl, document 1: .*{told}"):
        documents[1]


def test_a_run_and_its_exports(folder, tmp_path):
    start_run(tmp_path / "run", folder)
    assert load_model(tmp_path / "run").tokenizer.encode("w5") == [5]
    before = load_file(folder / "model.safetensors")
    for kind in ("base", "quietstar"):
        export(tmp_path / "run", tmp_path / kind, ExportOptions(kind))
        after = load_file(tmp_path / kind / "model.safetensors")
        for name, value in before.items():
            np.testing.assert_array_equal(after[name][: len(value)], value)
    assert len(load_file(tmp_path / "base/model.safetensors")["lm_head.weight"]) == ROWS
    thinking = load_model(tmp_path / "quietstar")
    assert thinking.architecture.vocab_size == ROWS
    assert thinking.vocabulary.meta_tokens == (ROWS + 2, ROWS + 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "quietstar")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "<tool>", START, END]) == [ROWS, ROWS + 1, ROWS + 2, ROWS + 3]
    base = load_model(tmp_path / "base")
    assert all(bool(jnp.all(base.params[name] == thinking.params[name])) for name in base.params if "decoder" in name)


def test_the_end_of_text_needs_an_embedding(folder):
    shutil.copytree(folder, folder.parent / "ended")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<tool>"
    tokenizer.save_pretrained(folder.parent / "ended")
    with pytest.raises(DataError, match="ends a text with '<tool>'"):
        load_model(folder.parent / "ended")


def test_ids_within_are_not_looked_at_again():
    tokenizer = load_tokenizer("synthetic")
    assert tokenizer.within(tokenizer.vocab_size) is tokenizer
