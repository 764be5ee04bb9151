"""Temperature and nucleus, against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.inference.sampling import choose, nucleus


def kept(logits: np.ndarray, top_p: float) -> np.ndarray:
    """By sorting: the fewest tokens, likeliest first, that have at least this probability together."""
    p = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    mass = np.take_along_axis(p, order, -1).cumsum(-1)
    keep = np.zeros(p.shape, bool)
    np.put_along_axis(keep, order, mass - np.take_along_axis(p, order, -1) < top_p, -1)
    return keep


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_the_nucleus_is_that_of_sorting(top_p, spread):
    logits = np.random.default_rng(0).normal(0, spread, (5, 300)).astype(np.float32)
    found = np.asarray(jax.jit(nucleus)(logits, jnp.float32(top_p)))
    np.testing.assert_array_equal(found > -1e29, kept(logits, top_p))
    np.testing.assert_array_equal(found[found > -1e29], logits[found > -1e29])


def test_worked_by_hand_with_ties():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1], [0.05, 0.8, 0.05, 0.05, 0.05]]))
    assert (nucleus(logits, jnp.float32(0.5)) > -1e29).tolist() == [
        [True] * 3 + [False] * 2,
        [False, True] + [False] * 3,
    ]
    assert (nucleus(logits, jnp.float32(0.85)) > -1e29).tolist() == [[True] * 5, [True] * 5]


def test_draws_follow_the_tempered_distribution():
    logits, count = jnp.log(jnp.array([0.6, 0.3, 0.1])), 9_999
    uniforms = (jnp.arange(count) + 0.5) / count
    rows = jnp.broadcast_to(logits, (count, 3))
    cold = choose(rows, uniforms, jnp.float32(0.5))
    squared = np.array([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(np.bincount(cold, minlength=3) / count, squared, atol=1e-3)
    cut = choose(rows, uniforms, jnp.float32(1.0), jnp.float32(0.7))
    np.testing.assert_allclose(np.bincount(cut, minlength=3) / count, [2 / 3, 1 / 3, 0], atol=1e-3)
    assert (choose(rows, None, jnp.float32(0.0)) == 0).all()
