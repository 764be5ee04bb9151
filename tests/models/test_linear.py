"""Linear maps and cross-entropy against automatic differentiation of the plain formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.linear import cross_entropy, dense, linear

pytestmark = pytest.mark.usefixtures("strict_promotion")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("x", "weight", "inputs", "equation"),
    [
        ((5, 4), (4, 3), 1, "nd,df->nf"),
        ((2, 5, 4), (4, 3, 2), 1, "bnd,dqh->bnqh"),
        ((2, 5, 3, 2), (3, 2, 4), 2, "bnqh,qhd->bnd"),
    ],
)
def test_linear_and_its_gradients(x, weight, inputs, equation) -> None:
    x, weight = normal(0, *x), normal(1, *weight)
    y, back = jax.vjp(lambda x, weight: dense(x, weight, inputs=inputs), x, weight)
    wanted, wanted_back = jax.vjp(lambda x, weight: jnp.einsum(equation, x, weight), x, weight)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    cotangent = normal(2, *y.shape)
    for found, expected in zip(back(cotangent), wanted_back(cotangent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_transposed_weight(dtype) -> None:
    x, weight = normal(0, 2, 5, 4).astype(dtype), normal(1, 4, 3)
    wanted, wanted_back = jax.vjp(lambda x, weight: linear(x, weight, 1, jnp.float32), x, weight)
    y, back = jax.jit(lambda x, weight: jax.vjp(lambda x, w: linear(x, w, 1, jnp.float32, True), x, weight))(
        x, weight.T
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    (to_x, to_weight), (wanted_x, wanted_weight) = jax.jit(back)(y), jax.jit(wanted_back)(y)
    np.testing.assert_allclose(to_x.astype(jnp.float32), wanted_x.astype(jnp.float32), rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(to_weight, wanted_weight.T, rtol=1e-5, atol=1e-5)


def test_dtypes_of_bfloat16_compute() -> None:
    x, weight = normal(0, 1000, 4).astype(jnp.bfloat16), normal(1, 4, 3)
    y, back = jax.vjp(lambda x, weight: linear(x, weight, 1, jnp.float32), x, weight)
    assert y.dtype == jnp.float32
    to_x, to_weight = back(jnp.ones_like(y))
    assert (to_x.dtype, to_weight.dtype) == (jnp.bfloat16, jnp.float32)
    # A sum of a thousand in bfloat16 would be off in the third digit.
    np.testing.assert_allclose(to_weight[:, 0], x.astype(jnp.float32).sum(0), rtol=1e-4)


def test_bias_in_the_compute_dtype() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    y = dense(x, jnp.ones((3, 1)), jnp.array([0.5]))
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == [[3.5], [3.5]]


def test_cross_entropy_and_its_gradient() -> None:
    logits, targets = 30.0 * normal(0, 2, 3, 7), jnp.array([[0, 6, 3], [1, 1, 5]])

    def plain(logits: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    nll, back = jax.vjp(lambda logits: cross_entropy(logits, targets), logits)
    wanted, wanted_back = jax.vjp(plain, logits)
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(normal(1, 2, 3))[0], wanted_back(normal(1, 2, 3))[0], atol=1e-6)
