"""A real pretrained Llama (260 thousand parameters): its logits and greedy text as torch computed them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.models.decoder import base_pass
from tests.hf.checkpoints import load_decoder
from tests.material import material


@pytest.fixture(scope="module")
def folder():
    return material("models/stories260k")


@pytest.fixture(scope="module")
def forward(folder):
    files = open_checkpoint(str(folder))
    decoder = load_decoder(files, architecture_from_hf(files.config))

    @jax.jit
    def run(tokens, mask):
        hidden, *_ = base_pass(decoder, tokens, mask, dtype=jnp.float32)
        return hidden, decoder.logits(hidden)

    return run


def test_golden_logits(folder, forward):
    golden = np.load(folder / "golden_torch_fp32.npz")
    mask = golden["attention_mask"].astype(bool)
    hidden, logits = forward(jnp.asarray(golden["input_ids"]), jnp.asarray(mask))
    assert np.abs(np.asarray(logits) - golden["logits"])[mask].max() < 1e-4
    assert np.abs(np.asarray(hidden) - golden["hidden_5"])[mask].max() < 1e-4  # the last one is after the final norm


def test_greedy_continuation(folder, forward):
    golden = np.load(folder / "golden_greedy_ids.npy")
    tokens = np.zeros((1, len(golden)), np.int32)
    tokens[0, 0] = golden[0]
    for i in range(1, len(golden)):
        mask = np.arange(len(golden))[None] < i
        tokens[0, i] = np.asarray(forward(jnp.asarray(tokens), jnp.asarray(mask))[1])[0, i - 1].argmax()
    np.testing.assert_array_equal(tokens[0], golden)
