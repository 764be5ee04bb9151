"""Attention against a softmax written out head by head, and masks one can read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.attention import attend, causal_mask, split_heads

pytestmark = pytest.mark.usefixtures("strict_promotion")


def drawing(visible: np.ndarray) -> list[str]:
    return ["".join(".#"[int(x)] for x in row) for row in np.asarray(visible)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def by_hand(query: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One query [H] over keys and values [P, H], in float64."""
    scores = (keys @ query)[visible]
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values[visible]


def test_causal_mask_with_padding() -> None:
    mask = jnp.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], bool)
    full, unlimited = causal_mask(mask, jnp.int32(5)), causal_mask(mask, jnp.int32(2**31 - 1))
    assert drawing(full[0]) == ["#....", "##...", "##...", "##.#.", "##.##"]
    assert drawing(full[1]) == [".....", ".#...", ".##..", ".###.", ".###."]
    np.testing.assert_array_equal(full, unlimited)


def test_causal_mask_with_window() -> None:
    everything = jnp.ones((1, 5), bool)
    assert drawing(causal_mask(everything, jnp.int32(2))[0]) == ["#....", "##...", ".##..", "..##.", "...##"]
    starts = jnp.array([[0, 0, 2, 2, 2]])
    assert drawing(causal_mask(everything, jnp.int32(5), starts)[0]) == ["#....", "##...", "..#..", "..##.", "..###"]
    assert drawing(causal_mask(everything, jnp.int32(1))[0]) == ["#....", ".#...", "..#..", "...#.", "....#"]


def test_query_heads_share_key_heads_in_order() -> None:
    heads = jnp.arange(6.0)[:, None] * jnp.ones(2)
    assert split_heads(heads, 3)[..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_a_softmax_by_hand(kv_heads: int) -> None:
    queries, keys, values = normal(0, 2, 5, 4, 6), normal(1, 2, 5, kv_heads, 6), normal(2, 2, 5, kv_heads, 6)
    visible = causal_mask(jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], bool), jnp.int32(3))
    context = np.asarray(attend(queries, keys, values, visible))
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    for b, i, head in np.ndindex(2, 5, 4):
        g = head * kv_heads // 4
        expected = by_hand(q[b, i, head], k[b, :, g], v[b, :, g], np.asarray(visible[b, i]))
        np.testing.assert_allclose(context[b, i, head], expected, atol=1e-5)


def test_bfloat16_scores_and_sums_are_float32() -> None:
    """A thousand equal keys: weights summed in bfloat16 would be off by percents."""
    size, dtype = 1000, jnp.bfloat16
    values = jnp.concatenate([jnp.ones((1, size // 2, 1, 2), dtype), jnp.zeros((1, size // 2, 1, 2), dtype)], axis=1)
    keys = jnp.zeros_like(values)
    context = attend(jnp.ones((1, 1, 1, 2), dtype), keys, values, jnp.ones((1, 1, size), bool))
    assert context.dtype == dtype
    np.testing.assert_allclose(context.astype(jnp.float32), 0.5, atol=3e-3)
