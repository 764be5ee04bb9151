"""A scan over layers whose backward pass adds each layer's gradient where the sum of gradients already lies.

The derivative of `lax.scan` writes the gradients of all layers to a stack of their own, which is then added to what
other uses of the same weights gave: two copies of the largest thing in memory. Here the weights also come out of
the scan. Who uses those hands his gradients to this scan's backward pass, which adds to them layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (x, (weights, what gets no gradient, state) of this layer) -> (x, what this layer hands back)
Layer = Callable[[jax.Array, tuple[Any, Any, Any]], tuple[jax.Array, Any]]


def scan_layers(layer: Layer, x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[jax.Array, Any, Any]:
    """All layers, each computed again in the backward pass from its input, which is all that is kept.

    Args:
      layer: may close over arrays, but those get no gradient.
      x: input of the first layer; weights, fixed, state: pytrees of arrays with a leading axis of layers.

    Returns:
      (output of the last layer, what the layers handed back, stacked, the weights as they were).
    """

    @jax.custom_vjp
    def scan(x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[jax.Array, Any, Any]:
        x, handed_back = jax.lax.scan(layer, x, (weights, fixed, state))
        return x, handed_back, weights

    def forward(x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[tuple[jax.Array, Any, Any], Any]:
        def keep(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            out, handed_back = layer(x, inputs)
            return out, (handed_back, x)

        out, (handed_back, inputs) = jax.lax.scan(keep, x, (weights, fixed, state))
        return (out, handed_back, weights), (inputs, weights, fixed, state)

    def backward(saved: Any, cotangents: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, None, Any]:
        inputs, weights, fixed, state = saved
        gradient, to_handed_back, sums = cotangents

        def step(carry: tuple[jax.Array, Any], this: Any) -> tuple[tuple[jax.Array, Any], Any]:
            gradient, sums = carry
            i, x, weights, fixed, state, to_handed_back = this
            again = jax.vjp(lambda x, weights, state: layer(x, (weights, fixed, state)), x, weights, state)[1]
            gradient, to_weights, to_state = again((gradient, to_handed_back))
            return (gradient, jax.tree.map(lambda total, g: total.at[i].add(g), sums, to_weights)), to_state

        count = jnp.arange(len(inputs))
        this = (count, inputs, weights, fixed, state, to_handed_back)
        (gradient, sums), to_state = jax.lax.scan(step, (gradient, sums), this, reverse=True)
        return gradient, sums, None, to_state

    scan.defvjp(forward, backward)
    return scan(x, weights, fixed, state)
