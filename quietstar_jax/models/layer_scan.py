"""A scan over layers whose backward pass adds each layer's gradient to an existing sum of gradients.

The derivative of `lax.scan` stacks the gradients of all layers in a new array and then adds the gradients from other
uses of the same weights: two copies of the largest arrays in memory. Here the scan also returns the weights W. The
gradient of later uses arrives as the cotangent of the returned W, and the backward pass adds to it layer by layer:

    forward     W ──> layers of this scan ──> W, unchanged ──> second use, e.g. the chains ──> loss
    backward    sums = cotangent of the returned W = gradient of the second use
                for layer i = N - 1 .. 0:  sums[i] += gradient of layer i here
                sums is the gradient of W

This is the exact gradient: W reaches the loss along two paths, through the layers and through the identity, and the
identity passes its cotangent on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (x, (weights, arrays without gradient, state) of this layer) -> (x, further output of this layer)
Layer = Callable[[jax.Array, tuple[Any, Any, Any]], tuple[jax.Array, Any]]


def scan_layers(layer: Layer, x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[jax.Array, Any, Any]:
    """Runs all layers; the backward pass recomputes each layer from its input.

    Args:
      layer: may close over arrays, but those get no gradient.
      x: input of the first layer; weights, fixed, state: pytrees of arrays with a leading axis of layers.

    Returns:
      (output of the last layer, further outputs of the layers, stacked, the weights unchanged).
    """

    @jax.custom_vjp
    def scan(x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[jax.Array, Any, Any]:
        x, ys = jax.lax.scan(layer, x, (weights, fixed, state))
        return x, ys, weights

    def forward(x: jax.Array, weights: Any, fixed: Any, state: Any) -> tuple[tuple[jax.Array, Any, Any], Any]:
        def keep(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            out, ys = layer(x, inputs)
            return out, (ys, x)

        # Saved per layer: its input only. Weights, fixed and state exist anyway.
        out, (ys, inputs) = jax.lax.scan(keep, x, (weights, fixed, state))
        return (out, ys, weights), (inputs, weights, fixed, state)

    def backward(saved: Any, cotangents: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, None, Any]:
        inputs, weights, fixed, state = saved
        # Cotangents of the last output, of the stacked further outputs, and of the returned weights (0 if not used).
        gradient, to_ys, sums = cotangents

        def step(carry: tuple[jax.Array, Any], this: Any) -> tuple[tuple[jax.Array, Any], Any]:
            gradient, sums = carry
            i, x, weights, fixed, state, to_ys = this
            # `jax.vjp` runs the layer again; its activations exist only during this step. The sums are a carry of the
            # scan, not an output, so that XLA can add to row i in place.
            again = jax.vjp(lambda x, weights, state: layer(x, (weights, fixed, state)), x, weights, state)[1]
            gradient, to_weights, to_state = again((gradient, to_ys))
            return (gradient, jax.tree.map(lambda total, g: total.at[i].add(g), sums, to_weights)), to_state

        count = jnp.arange(len(inputs))
        this = (count, inputs, weights, fixed, state, to_ys)
        (gradient, sums), to_state = jax.lax.scan(step, (gradient, sums), this, reverse=True)
        return gradient, sums, None, to_state

    scan.defvjp(forward, backward)
    return scan(x, weights, fixed, state)
