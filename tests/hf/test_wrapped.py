"""Weights as people store them: under either name of a tied matrix, behind wrappers' prefixes, beside other heads."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from quietstar_jax.architecture import Architecture
from quietstar_jax.errors import UserError
from quietstar_jax.hf.canonical import WRAPPERS
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.models.decoder import Decoder
from tests.hf.checkpoints import TINY, load, random_tensors, refusal, write

TIED = Architecture(**{**vars(TINY), "tie_embeddings": True})
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE, OTHER = random_tensors(TINY)[EMBEDDING], random_tensors(TINY)[HEAD]


def head_and_embedding(model: Decoder) -> tuple[np.ndarray, np.ndarray]:
    embedding = np.asarray(model.embedding[...])
    return embedding, embedding if model.architecture.tie_embeddings else np.asarray(model.lm_head[...]).T


# (tied by config.json, stored under the embedding's name, under the head's) -> what is used; None = refused
TIES = {
    "tied, embedding only": (True, BASE, None, (BASE, BASE)),
    "tied, head only": (True, None, OTHER, (OTHER, OTHER)),
    "tied, both equal": (True, BASE, BASE, (BASE, BASE)),
    "tied, both different": (True, BASE, OTHER, (BASE, OTHER)),
    "tied, neither": (True, None, None, None),
    "untied, both": (False, BASE, OTHER, (BASE, OTHER)),
    "untied, embedding only": (False, BASE, None, None),
    "untied, head only": (False, None, OTHER, None),
    "untied, neither": (False, None, None, None),
}


@pytest.mark.parametrize("case", TIES)
def test_embedding_and_head(case, tmp_path, caplog):
    tied, embedding, head, used = TIES[case]
    tensors = {name: value for name, value in random_tensors(TINY).items() if name not in (EMBEDDING, HEAD)}
    tensors |= {name: value for name, value in ((EMBEDDING, embedding), (HEAD, head)) if value is not None}
    write(tmp_path, tensors, TIED if tied else TINY)
    if used is None:
        message = refusal(tmp_path)
        assert "missing" in message
        assert ("set tie_word_embeddings to true" in message) == (case == "untied, embedding only")
    else:
        for found, expected in zip(head_and_embedding(load(tmp_path)), used, strict=True):
            np.testing.assert_array_equal(found, expected)
    warned = [record for record in caplog.records if "both are used" in record.getMessage()]
    assert len(warned) == (case == "tied, both different")
    check_against_transformers(tmp_path, used)


def check_against_transformers(folder: Path, used: tuple[np.ndarray, np.ndarray] | None) -> None:
    """transformers uses the same two matrices, or has to make one up, which we refuse."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, torch.nn.Module)
    assert bool(report["missing_keys"]) == (used is None), report
    for matrix, expected in zip((model.get_input_embeddings(), model.lm_head), used or (), strict=False):
        np.testing.assert_array_equal(matrix.weight.detach().numpy(), expected)


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
@pytest.mark.parametrize("tied", [True, False])
def test_names_that_save_model_left_out(kept, tied, tmp_path):
    tensors = random_tensors(TINY)
    left_out = HEAD if kept == EMBEDDING else EMBEDDING
    del tensors[left_out]
    write(tmp_path, tensors, TIED if tied else TINY)
    save_file(tensors, tmp_path / "model.safetensors", {left_out: kept, "format": "pt", "a": "b"})
    embedding, head = head_and_embedding(load(tmp_path))
    np.testing.assert_array_equal(embedding, tensors[kept])
    np.testing.assert_array_equal(head, tensors[kept])


def same_model(folder: Path, expected: dict[str, np.ndarray]) -> None:
    opened = open_checkpoint(str(folder))
    for name, value in expected.items():
        np.testing.assert_array_equal(opened.read(name), value, err_msg=name)
    assert len(jax.tree.leaves(load(folder))) > 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3), st.data())
def test_parts_that_wrappers_add(tmp_path_factory, prefix, data):
    """At the beginning of all names, and anywhere within some of them."""
    tensors, stored = random_tensors(TINY), {}
    for name, value in tensors.items():
        parts = name.split(".")
        where = data.draw(st.integers(0, len(parts) - 1))
        within = data.draw(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=1))
        stored[".".join([*prefix, *parts[:where], *within, *parts[where:]])] = value
    folder = write(tmp_path_factory.mktemp("wrapped"), stored)
    same_model(folder, tensors)


@pytest.mark.parametrize("prefix", ["pretrained_model.", "base_model.model.", "policy.", "model.", "_orig_mod.policy."])
def test_a_model_within_another(prefix, tmp_path, caplog):
    tensors = random_tensors(TINY)
    write(tmp_path, {prefix + name: value for name, value in tensors.items()})
    same_model(tmp_path, tensors)
    assert [record for record in caplog.records if "begin with" in record.getMessage()]


def test_a_base_model_has_no_prefix(tmp_path):
    tensors = random_tensors(TIED)
    write(tmp_path, {name.removeprefix("model."): value for name, value in tensors.items()}, TIED)
    same_model(tmp_path, tensors)


HEADS = ["v_head.summary.weight", "value_head.weight", "score.weight", "reward_head.weight", "medusa_head.0.weight",
         "critic_head.weight", "classifier.weight", "qa_outputs.bias"]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_beside_a_whole_model(head, tmp_path, caplog):
    tensors = random_tensors(TINY)
    write(tmp_path, tensors | {head: np.zeros((1, 8), np.float32)})
    with caplog.at_level(logging.WARNING):
        same_model(tmp_path, tensors)
    assert any(head in record.getMessage() for record in caplog.records)


def zeros(*names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, 8), np.float32) for name in names}


LAYER = "model.layers.0."
MIXING = zeros("start_embedding", "end_embedding", "talk_head.0.weight")
WITHOUT_HEAD = {name: value for name, value in random_tensors(TINY).items() if name != HEAD}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
# What the file holds, what config.json says besides, and words of the one message.
STRANGE = {
    "a fork's mixing head": (random_tensors(TINY) | MIXING, {}, ["Quiet-STaR", "mixing head", "talk_head.0.weight"]),
    "another mixing head": (random_tensors(TINY) | zeros("mixing_head.weight"), {}, ["Quiet-STaR", "mixing_head"]),
    "an adapter in the model's file": (zeros(f"{LAYER}q_proj.lora_A.weight"), {}, ["adapter", "merge_and_unload"]),
    "gptq": (zeros(f"{LAYER}q_proj.qweight", f"{LAYER}q_proj.scales"), {}, ["quantized", "unquantized"]),
    "fp8": (random_tensors(TINY) | zeros(f"{LAYER}q_proj.weight_scale_inv"), {}, ["quantized"]),
    "experts": (zeros(f"{LAYER}mlp.experts.0.up_proj.weight"), {}, ["mixture of experts"]),
    "a classifier": (WITHOUT_HEAD | zeros("score.weight"), CLASSIFIER, ["SequenceClassification", "language model"]),
    "a tied classifier": (WITHOUT_HEAD | zeros("score.weight"), CLASSIFIER | {"tie_word_embeddings": True},
                          ["SequenceClassification", "language model"]),
    "two models": ({f"{who}.{name}": value for name, value in random_tensors(TINY).items() for who in ("a", "b")}, {},
                   ["several models", "a.model.", "b.model."]),
    "a name twice": (random_tensors(TINY) | {"module.lm_head.weight": OTHER}, {}, ["two tensors", "module.lm_head"]),
    "another model": (zeros(*(f"transformer.h.{i}.attn.weight" for i in range(99))), {}, ["missing", "more"]),
    "an unknown part": (random_tensors(TINY) | zeros("lm_head.bias"), {}, ["lm_head.bias: unexpected"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_one_message_says_what_the_tensors_are(case, tmp_path):
    tensors, more, words = STRANGE[case]
    write(tmp_path, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    message = refusal(tmp_path)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 12, message


def test_a_classifier_that_kept_its_language_model_head(tmp_path, caplog):
    tensors = random_tensors(TINY)
    write(tmp_path, tensors | zeros("score.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | CLASSIFIER))
    same_model(tmp_path, tensors)


FOLDERS = {
    "adapter_model.safetensors adapter_config.json": ["PEFT adapter", "LORA", "owner/base", "merge_and_unload"],
    "model-q4.gguf config.json": ["GGUF", "llama.cpp"],
    "pytorch_model.bin config.json": ["pickled", "pytorch_model.bin", "save_pretrained"],
    "consolidated.00.pth params.json tokenizer.model": ["original format", "Hugging Face version"],
    "consolidated.safetensors params.json": ["original format"],
    "__0_0.distcp .metadata": ["distributed checkpoint"],
    "zero_to_fp32.py global_step10": ["DeepSpeed"],
    "model.onnx": ["ONNX"],
    "flax_model.msgpack config.json": ["Flax"],
    "model.fp16.safetensors config.json": ["model.fp16.safetensors", "model.safetensors"],
    "model-00001-of-00002.safetensors config.json": ["index.json"],
    "tokenizer.json": ["tokenizer", "no weights"],
    "checkpoint-500/config.json trainer_state.json": ["checkpoint-500", "Give one of these"],
    "refs/main snapshots/abc/config.json": ["snapshots"],
    "README.md": ["no weights", "README.md"],
}


@pytest.mark.parametrize("files", FOLDERS)
def test_one_message_says_what_the_folder_is(files, tmp_path):
    for name in files.split():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
        file.write_text(json.dumps(adapter if name == "adapter_config.json" else {}))
    with pytest.raises(UserError) as error:
        open_checkpoint(str(tmp_path))
    assert all(word in str(error.value) for word in [str(tmp_path), *FOLDERS[files]]), str(error.value)
    assert len(str(error.value)) < 1000


def test_an_adapter_beside_a_model(tmp_path):
    write(tmp_path, random_tensors(TINY))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refusal(tmp_path)
    assert "both a model and a PEFT adapter" in message
