"""Mixing: nothing at first, small weights kept in bfloat16, the paper's form worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.thoughts.mixing import mix_hidden_states, mix_log_probabilities, mixing_weight
from quietstar_jax.thoughts.model import MixingHead

ARCHITECTURE = Architecture(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1)


def hidden(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, 8)).astype(dtype)


def test_a_fresh_head_gives_weight_zero_and_the_base_logits_exactly() -> None:
    decoder, head = Decoder(ARCHITECTURE, nnx.Rngs(0)), MixingHead(8, nnx.Rngs(1))
    base, thought = hidden(2, 1, 3, 2), hidden(3, 1, 4, 3, 2)
    weight = mixing_weight(head, base, thought)
    np.testing.assert_array_equal(weight, np.zeros((1, 4, 3, 2), np.float32))
    mixed = mix_hidden_states(decoder, base, thought, weight)
    np.testing.assert_array_equal(mixed, jnp.broadcast_to(decoder.logits(base)[:, None], mixed.shape))


def test_mixed_logits_are_those_of_the_mixed_hidden_state() -> None:
    decoder = Decoder(ARCHITECTURE, nnx.Rngs(0))
    base, thought = hidden(2, 1, 3, 2), hidden(3, 1, 4, 3, 2)
    weight = jax.random.normal(jax.random.key(4), (1, 4, 3, 2))
    state = (1 - weight[..., None]) * base[:, None] + weight[..., None] * thought
    np.testing.assert_allclose(
        mix_hidden_states(decoder, base, thought, weight), decoder.logits(state), rtol=1e-5, atol=1e-6
    )


def test_bfloat16_keeps_a_small_weight() -> None:
    decoder = Decoder(ARCHITECTURE, nnx.Rngs(0))
    base, thought = hidden(2, 1, 3, 2, dtype="bfloat16"), hidden(3, 1, 4, 3, 2, dtype="bfloat16")
    without = mix_hidden_states(decoder, base, thought, jnp.zeros((1, 4, 3, 2)))
    change = mix_hidden_states(decoder, base, thought, jnp.full((1, 4, 3, 2), 1e-4)) - without
    exact = 1e-4 * decoder.logits((thought - base[:, None]).astype("float32"))
    np.testing.assert_allclose(change, exact, rtol=0.1, atol=1e-7)


def test_log_probabilities_by_hand() -> None:
    mixed = mix_log_probabilities(jnp.log(jnp.array(0.25)), jnp.log(jnp.array(1.0)), jnp.array(0.5))
    np.testing.assert_allclose(mixed, np.log(0.5), rtol=1e-6)
