"""The scan whose backward pass adds to given sums, against plain differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.models.layer_scan import scan_layers

LAYERS, WIDTH = 3, 4


def layer(x, inputs):
    (matrix, bias), scale, state = inputs
    y = jnp.tanh(x @ matrix + bias * state) * scale
    return y, {"seen": y.sum(axis=0) + state}


def plain(layer, x, weights, fixed, state):
    out, ys = jax.lax.scan(layer, x, (weights, fixed, state))
    return out, ys, weights


def use(run, x, weights, fixed, state):
    """Weights are used before, in and after the scan, and all it gives matters."""
    out, ys, after = run(layer, x + weights[1].sum(), weights, fixed, state)
    seen = ys["seen"] * jnp.arange(12.0).reshape(LAYERS, WIDTH)
    return (out**2).sum() + seen.sum() + 0.3 * sum((w**3).sum() for w in after)


def test_values_and_gradients_are_those_of_the_plain_scan() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 9))
    x, state = (jax.random.normal(next(keys), shape) for shape in ((5, WIDTH), (LAYERS, WIDTH)))
    weights = tuple(jax.random.normal(next(keys), (LAYERS, *shape)) for shape in ((WIDTH, WIDTH), (WIDTH,)))
    fixed = jnp.arange(LAYERS)

    def value_and_gradient(run):
        return jax.jit(jax.value_and_grad(lambda *x: use(run, *x[:2], fixed, x[2]), argnums=(0, 1, 2)))(
            x, weights, state
        )

    found, wanted = value_and_gradient(scan_layers), value_and_gradient(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_gradients_of_the_weights_are_one_stack() -> None:
    """A second pass over the same weights makes no second stack: the compiled program shows it."""
    layers, width = 8, 128
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, width), (layers, width, width))]

    def temporaries(run) -> int:
        def loss(x, matrices):
            fixed, state = jnp.ones(layers), jnp.zeros((layers, width))
            x, _, weights = run(layer, x, (matrices, jnp.ones((layers, width))), fixed, state)
            return run(layer, x, weights, fixed, state)[0].sum()

        return jax.jit(jax.grad(loss, argnums=1)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(plain) - temporaries(scan_layers) > 0.9 * layers * width * width * 4
