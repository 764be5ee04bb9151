"""The TPU kernels, interpreted on CPU, against the blocks that every other device computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts import prefix_blocks, prefix_tpu
from quietstar_jax.thoughts.prefix_blocks import Sums
from quietstar_jax.thoughts.prefix_rows import Range
from quietstar_jax.thoughts.seen import Seen

MASK = jnp.array(np.random.default_rng(0).random((2, 21)) > 0.2)
CASES = {
    "shared positions": (jnp.arange(5, 12), 2**31 - 1),
    "positions of their own": (jnp.array([[0, 3, 4, 9, 13, 19, 20], [1, 2, 8, 8, 11, 15, 2**30]]), 2**31 - 1),
    "windows that end before the prefix": (jnp.arange(8, 15), 3),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and keys, the last ones not whole."""
    monkeypatch.setattr(prefix_tpu, "ROW_BLOCK", 16)
    monkeypatch.setattr(prefix_tpu, "KEY_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["small_scores", "large_scores"])
def test_kernels_equal_the_blocks(name: str, scale: float) -> None:
    positions, window = CASES[name]
    batch, groups, rows, width, length = 2, 2, 6, 8, MASK.shape[1]
    shape = (batch, groups, 2, positions.shape[-1], rows, width)
    text = (normal(1, batch, groups, length, width), normal(2, batch, groups, length, width))
    seen = Seen(MASK, positions, jnp.tile(jnp.arange(3), 2), jnp.int32(window))
    q, own = scale * normal(0, *shape), Sums(normal(3, *shape)[..., :1], jnp.ones((*shape[:-1], 1)), normal(4, *shape))
    tolerance = 1e-3 if scale > 1 else 2e-5

    def check(found: Any, wanted: Any) -> None:
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())))

    sums = prefix_blocks.add_prefix(q, *text, seen, own)
    check(prefix_tpu.add_prefix(q, *text, seen, own, interpret=True), sums)
    saved = (sums.peak + jnp.log(sums.total), normal(5, *shape)[..., :1], normal(6, *shape))
    gradients = prefix_blocks.prefix_gradients(q, *text, seen, *saved)
    check(prefix_tpu.prefix_gradients(q, *text, seen, *saved, interpret=True), gradients)
    assert all(np.any(x) for x in gradients)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_without_keys_adds_nothing() -> None:
    seen = Range(jnp.array([[0, 5, 3]]), jnp.array([[4, 4, 3]]), jnp.ones((1, 9), bool).at[0, 3].set(False))
    sums = prefix_tpu.forward(
        normal(0, 1, 1, 3, 4), normal(1, 1, 1, 9, 4), normal(2, 1, 1, 9, 4), seen, interpret=True
    )
    assert sums.total[0, 0, :, 0].tolist()[1:] == [0.0, 0.0]
    np.testing.assert_array_equal(sums.context[0, 0, 1:], 0.0)
    assert np.all(np.asarray(sums.peak[0, 0, 1:]) <= -1e29)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_that_no_row_sees_are_not_computed() -> None:
    """Rubbish in them must not reach the sums."""
    seen = Range(jnp.full((1, 20), 8), jnp.full((1, 20), 15), jnp.ones((1, 32), bool))
    q, keys, values = normal(0, 1, 1, 20, 4), normal(1, 1, 1, 32, 4), normal(2, 1, 1, 32, 4)
    clean = prefix_tpu.forward(q, keys, values, seen, interpret=True)
    hidden = (jnp.arange(32) < 8) | (jnp.arange(32) >= 16)
    dirty = [jnp.where(hidden[:, None], jnp.nan, x) for x in (keys, values)]
    jax.tree.map(np.testing.assert_array_equal, prefix_tpu.forward(q, *dirty, seen, interpret=True), clean)
