"""Mixing: nothing at first, small weights kept in bfloat16, the paper's form worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quietstar_jax.architecture import Architecture
from quietstar_jax.methods.mixings import hidden_states, log_probabilities
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.thoughts.mixing import MixingHead, mixing_weight

ARCHITECTURE = Architecture(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1)


def hidden(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, 8)).astype(dtype)


def test_a_fresh_head_gives_weight_zero_and_the_base_logits_exactly() -> None:
    decoder, head = Decoder(ARCHITECTURE, nnx.Rngs(0)), MixingHead(8, nnx.Rngs(1))
    base, thought = hidden(2, 1, 3, 2), hidden(3, 1, 4, 3, 2)
    weight = mixing_weight(head, base, thought)
    np.testing.assert_array_equal(weight, np.zeros((1, 4, 3, 2), np.float32))
    mixed = hidden_states(decoder.logits, base, thought, weight)[0]
    np.testing.assert_array_equal(mixed, jnp.broadcast_to(decoder.logits(base)[:, None], mixed.shape))


def test_mixed_logits_are_those_of_the_mixed_hidden_state() -> None:
    decoder = Decoder(ARCHITECTURE, nnx.Rngs(0))
    base, thought = hidden(2, 1, 3, 2), hidden(3, 1, 4, 3, 2)
    weight = jax.random.normal(jax.random.key(4), (1, 4, 3, 2))
    state = (1 - weight[..., None]) * base[:, None] + weight[..., None] * thought
    np.testing.assert_allclose(
        hidden_states(decoder.logits, base, thought, weight)[0], decoder.logits(state), rtol=1e-5, atol=1e-6
    )


def test_bfloat16_keeps_a_small_weight() -> None:
    decoder = Decoder(ARCHITECTURE, nnx.Rngs(0))
    base, thought = hidden(2, 1, 3, 2, dtype="bfloat16"), hidden(3, 1, 4, 3, 2, dtype="bfloat16")
    without = hidden_states(decoder.logits, base, thought, jnp.zeros((1, 4, 3, 2)))[0]
    change = hidden_states(decoder.logits, base, thought, jnp.full((1, 4, 3, 2), 1e-4))[0] - without
    exact = 1e-4 * decoder.logits((thought - base[:, None]).astype("float32"))
    np.testing.assert_allclose(change, exact, rtol=0.1, atol=1e-7)


def test_log_probabilities_by_hand() -> None:
    base, thought = jnp.log(jnp.array([[[[0.25, 0.75]]]])), jnp.log(jnp.array([[[[[0.5, 0.5]]]]]))
    mixed, weight = log_probabilities(lambda x: x, base, thought, jnp.zeros((1, 1, 1, 1)))
    assert float(weight[0, 0, 0, 0]) == 0.5
    np.testing.assert_allclose(mixed[0, 0, 0, 0], np.log([0.25, 0.75]) / 2 + np.log(0.5) / 2, rtol=1e-6)
