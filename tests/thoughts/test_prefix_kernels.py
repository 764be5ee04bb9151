"""The TPU and GPU kernels, interpreted on CPU, against the blocks that any device computes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts.attention import kernel_common, prefix_mosaic, prefix_triton, prefix_xla
from quietstar_jax.thoughts.attention.kernel_common import Range
from quietstar_jax.thoughts.attention.mask import ChainMask, chain_mask
from quietstar_jax.thoughts.attention.prefix_triton import Blocks
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState

MASK = jnp.array(np.random.default_rng(0).random((2, 21)) > 0.2)
CASES = {
    "shared positions": (jnp.arange(5, 12), 2**31 - 1, None),
    "positions of their own": (jnp.array([[0, 3, 4, 9, 13, 19, 20], [1, 2, 8, 8, 11, 15, 2**30]]), 2**31 - 1, None),
    "windows that end before the prefix": (jnp.arange(8, 15), 3, None),
    "documents": (jnp.arange(8, 15), 2**31 - 1, jnp.array([[3, 3, 10, 10, 10, 10, 14], [8, 9, 9, 9, 9, 9, 9]])),
    "documents and windows": (
        jnp.array([[0, 3, 4, 9, 13, 19, 20], [1, 2, 8, 8, 11, 15, 2**30]]),
        7,
        jnp.array([[0, 2, 2, 2, 12, 12, 12], [0, 0, 8, 8, 8, 8, 0]]),
    ),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=[prefix_mosaic, prefix_triton], ids=["tpu", "gpu"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With several blocks of rows and keys, the last ones not whole."""
    monkeypatch.setattr(prefix_mosaic, "ROW_BLOCK", 16)
    monkeypatch.setattr(prefix_mosaic, "KEY_BLOCK", 8)
    monkeypatch.setattr(prefix_triton, "FORWARD", {1024: Blocks(32, 8, 4)})
    monkeypatch.setattr(prefix_triton, "BACKWARD", {1024: Blocks(16, 8, 4)})
    return request.param


@pytest.mark.parametrize(
    ("name", "scale", "cap"),
    [*((name, scale, 0.0) for name in CASES for scale in (1.0, 60.0)), ("documents and windows", 2.0, 1.5)],
)
def test_kernels_equal_the_blocks(kernel: Any, name: str, scale: float, cap: float) -> None:
    positions, window, first = CASES[name]
    batch, groups, rows, width, length = 2, 2, 6, 8, MASK.shape[1]
    shape = (batch, groups, 2, positions.shape[-1], rows, width)
    text = (normal(1, batch, groups, length, width), normal(2, batch, groups, length, width))
    seen = ChainMask(MASK, positions, jnp.tile(jnp.arange(3), 2), jnp.int32(window), first)
    q, chain = (
        scale * normal(0, *shape),
        SoftmaxState(normal(3, *shape)[..., :1], jnp.ones((*shape[:-1], 1)), normal(4, *shape)),
    )
    tolerance = 1e-3 if scale > 1 else 2e-5

    def check(found: Any, wanted: Any) -> None:
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())))

    sums = prefix_xla.prefix_fwd(q, *text, seen, chain, cap=cap)
    check(kernel_common.prefix_fwd(kernel.forward, q, *text, seen, chain, cap=cap, interpret=True), sums)
    saved = (sums.m + jnp.log(sums.l), normal(5, *shape)[..., :1], normal(6, *shape))
    gradients = prefix_xla.prefix_bwd(q, *text, seen, *saved, cap=cap)
    check(kernel_common.prefix_bwd(kernel.backward, q, *text, seen, *saved, cap=cap, interpret=True), gradients)
    assert all(np.any(x) for x in gradients)


@pytest.mark.parametrize(("window", "cap"), [(2**31 - 1, 0.0), (7, 1.5)])
def test_kernels_equal_the_blocks_within_chains(monkeypatch: Any, kernel: Any, window: int, cap: float) -> None:
    """The part of a chain over itself, of 21 tokens with two query heads for each key/value head."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", 8)
    shape, keys = (2, 3, 2, 21, 1, 8), (normal(1, 2, 3, 21, 8), normal(2, 2, 3, 21, 8))
    seen = chain_mask(ChainMask(MASK, jnp.arange(1), jnp.arange(21), jnp.int32(window)), 21)
    q, gradient = normal(0, *shape), normal(3, *shape)
    empty = prefix_xla.empty_state(q)
    sums = prefix_xla.chain_fwd(q, *keys, seen, empty, cap=cap)
    found = kernel_common.prefix_fwd(kernel.forward, q, *keys, seen, empty, cap=cap, interpret=True)
    saved = sums.m + jnp.log(sums.l), (gradient * sums.acc / sums.l).sum(axis=-1, keepdims=True), gradient
    wanted = *sums, *prefix_xla.chain_bwd(q, *keys, seen, *saved, cap=cap)
    backward = kernel_common.prefix_bwd(kernel.backward, q, *keys, seen, *saved, cap=cap, interpret=True)
    for x, y in zip((*found, *backward), wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(1.0, float(jnp.abs(y).max())))


def test_a_row_without_keys_adds_nothing(kernel: Any) -> None:
    seen = Range(jnp.array([[0, 5, 3]]), jnp.array([[4, 4, 3]]), jnp.ones((1, 9), bool).at[0, 3].set(False))
    sums = kernel.forward(normal(0, 1, 1, 3, 4), normal(1, 1, 1, 9, 4), normal(2, 1, 1, 9, 4), seen, interpret=True)
    assert sums.l[0, 0, :, 0].tolist()[1:] == [0.0, 0.0]
    np.testing.assert_array_equal(sums.acc[0, 0, 1:], 0.0)
    assert np.all(np.asarray(sums.m[0, 0, 1:]) <= -1e29)


def test_blocks_that_no_row_sees_are_not_computed(kernel: Any) -> None:
    """Rows 0 .. 31 see keys 8 .. 15, the others none: rubbish in what is not seen must reach no result, and what sees
    nothing gets no gradient."""
    high = jnp.where(jnp.arange(48) < 32, 15, 7)
    seen = Range(jnp.full((1, 48), 8), high[None], jnp.ones((1, 32), bool))
    q, keys, values, gradient = (normal(i, 1, 1, n, 4) for i, n in enumerate((48, 32, 32, 48)))
    saved = normal(4, 1, 1, 48, 1), normal(5, 1, 1, 48, 1)

    def both(q: jax.Array, keys: jax.Array, values: jax.Array, gradient: jax.Array) -> tuple[Any, Any]:
        sums = kernel.forward(q, keys, values, seen, interpret=True)
        return sums, kernel.backward(q, keys, values, seen, *saved, gradient, interpret=True)

    clean = both(q, keys, values, gradient)
    blind = (jnp.arange(48) >= 32)[:, None]
    hidden = ((jnp.arange(32) < 8) | (jnp.arange(32) >= 16))[:, None]
    dirty = both(*(jnp.where(unseen, jnp.nan, x) for unseen, x in
                   ((blind, q), (hidden, keys), (hidden, values), (blind, gradient))))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    to_q, to_keys, to_values = clean[1]
    for x, unseen in ((to_q, blind), (to_keys, hidden), (to_values, hidden)):
        assert not np.any(np.where(unseen, x, 0))
        assert np.all(np.any(np.where(unseen, 1, x), axis=-1))
