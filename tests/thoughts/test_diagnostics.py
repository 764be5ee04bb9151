"""The number of distinct thoughts against the exact one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts.diagnostics import distinct_thoughts


@pytest.mark.parametrize(("vocab_size", "length"), [(2, 1), (2, 9), (3, 5), (32_000, 2), (150_000, 130)])
def test_distinct_thoughts_are_exact_with_many_duplicates(vocab_size: int, length: int) -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, vocab_size, (200, length))
    pool[1:100] = pool[0]
    pool[np.arange(1, 100), rng.integers(0, length, 99)] = rng.integers(0, vocab_size, 99)  # differ in one token
    pool[100:150] = rng.permuted(pool[:50], axis=1)  # the same tokens in another order
    tokens = pool[rng.integers(0, len(pool), (3, 4, 40))]  # [B, R, J, T]
    counted = rng.random((3, 40)) < [[1.0], [0.7], [0.0]]
    exact = [
        len(np.unique(row[:, real].reshape(-1, length), axis=0)) for row, real in zip(tokens, counted, strict=True)
    ]
    found = jax.jit(distinct_thoughts)(jnp.asarray(tokens, jnp.int32), jnp.asarray(counted))
    assert found.tolist() == exact
    assert exact[2] == 0 < exact[1] <= 4 * 40
