"""Mixing: nothing at first, small weights kept in bfloat16, the paper's form worked by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quietstar_jax.architecture import Architecture
from quietstar_jax.methods.mixings import MIXINGS, hidden_states, log_probabilities, probabilities
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.thoughts.mixing import MixingHead, centered_bias, mixing_weight
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.score import mix

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


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_soft_cap_of_logits_is_that_of_the_prediction(mixing: str) -> None:
    """Whatever is mixed: with logits far above the cap, the mixed ones are within it, and never sums of capped ones."""
    capped = dataclasses.replace(ARCHITECTURE, logit_cap=2.0)
    model, plain = (init_quiet_star(a, [0], [0], 1.0, jax.random.key(0)) for a in (capped, ARCHITECTURE))
    model.mixing_head.out.set_value(0.5 * jnp.ones((8, 1)))
    plain.mixing_head.out.set_value(0.5 * jnp.ones((8, 1)))
    base, thought = 60 * hidden(2, 1, 3, 2), 60 * hidden(3, 1, 4, 3, 2)
    found, weight = mix(model, base, thought, mixing)
    if MIXINGS[mixing].traits["log_probs"]:
        parts = [jax.nn.log_softmax(2 * jnp.tanh(plain.decoder.logits(h) / 2)) for h in (base[:, None], thought)]
        w = weight[..., None]
        if mixing == "probabilities":
            wanted = jnp.log((1 - w) * jnp.exp(parts[0]) + w * jnp.exp(parts[1]))
        else:
            wanted = (1 - w) * parts[0] + w * parts[1]
    else:
        wanted = 2 * jnp.tanh(mix(plain, base, thought, mixing)[0] / 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(mix(plain, base, thought, mixing)[0]).max() > 4


def test_bfloat16_keeps_a_small_weight() -> None:
    decoder = Decoder(ARCHITECTURE, nnx.Rngs(0))
    base, thought = hidden(2, 1, 3, 2, dtype="bfloat16"), hidden(3, 1, 4, 3, 2, dtype="bfloat16")
    without = hidden_states(decoder.logits, base, thought, jnp.zeros((1, 4, 3, 2)))[0]
    change = hidden_states(decoder.logits, base, thought, jnp.full((1, 4, 3, 2), 1e-4))[0] - without
    exact = 1e-4 * decoder.logits((thought - base[:, None]).astype("float32"))
    np.testing.assert_allclose(change, exact, rtol=0.1, atol=1e-7)


def test_probabilities_by_hand() -> None:
    base, thought = jnp.log(jnp.array([[[[0.25, 0.75]]]])), jnp.log(jnp.array([[[[[0.5, 0.5]]]]]))
    mixed, weight = probabilities(lambda x: x, base, thought, 1 + jnp.log(jnp.full((1, 1, 1, 1), 0.25)))  # odds 1 : 4
    np.testing.assert_allclose(weight[0, 0, 0, 0], 0.2, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(mixed[0, 0, 0, 0]), [0.3, 0.7], rtol=1e-6)
    for odds in (-500.0, 500.0):  # beyond the range of float32
        gradient = jax.grad(lambda x: probabilities(lambda h: h, base, thought, x)[0][0, 0, 0, 0, 0])(
            jnp.full((1, 1, 1, 1), odds)
        )
        np.testing.assert_allclose(gradient, 0)


def test_log_probabilities_by_hand() -> None:
    base, thought = jnp.log(jnp.array([[[[0.25, 0.75]]]])), jnp.log(jnp.array([[[[[0.5, 0.5]]]]]))
    mixed, weight = log_probabilities(lambda x: x, base, thought, jnp.zeros((1, 1, 1, 1)))
    assert float(weight[0, 0, 0, 0]) == 0.5
    np.testing.assert_allclose(mixed[0, 0, 0, 0], np.log([0.25, 0.75]) / 2 + np.log(0.5) / 2, rtol=1e-6)


def test_a_centred_head_sees_its_inputs_without_the_common_vector() -> None:
    head, mean = MixingHead(8, nnx.Rngs(1)), 50 * jnp.arange(8.0)
    head.out.set_value(jax.random.normal(jax.random.key(5), (8, 1)))
    base, thought = hidden(2, 1, 3, 2), hidden(3, 1, 4, 3, 2)
    before = mixing_weight(head, base, thought)
    head.in_bias.set_value(centered_bias(head, mean))
    np.testing.assert_allclose(mixing_weight(head, base + mean, thought + mean), before, atol=2e-4)
