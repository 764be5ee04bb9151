"""Linear maps and cross-entropy, with gradients in the form that costs least.

The gradients are those of automatic differentiation, but for the cotangent, which is first rounded to the compute
dtype. Written out, every product reads its operands as they lie in memory (the derived ones make XLA write some of
them a second time, transposed), and the gradient of a weight is summed in the weight's own float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def dense(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, inputs: int = 1) -> jax.Array:
    """A linear map in x's dtype: the last `inputs` axes of x against the first ones of the weight."""
    y = linear(x, weight, inputs, x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: jax.Array, weight: jax.Array, inputs: int, dtype: jnp.dtype) -> jax.Array:
    """x [..., I] times weight [I, O] -> [..., O] in `dtype`; I stands for `inputs` axes, O for any number."""
    return _linear_forward(x, weight, inputs, dtype)[0]


def _linear_forward(x: jax.Array, weight: jax.Array, inputs: int, dtype: jnp.dtype) -> tuple[jax.Array, tuple]:
    # Not `linear` itself: a rematerialisation policy must see the product.
    return _contract(x, weight.astype(x.dtype), _last(x, inputs), range(inputs), dtype), (x, weight)


def _linear_backward(inputs: int, dtype: jnp.dtype, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    outputs = range(inputs, weight.ndim)
    to_x = _contract(gradient, weight.astype(x.dtype), _last(gradient, len(outputs)), outputs, x.dtype)
    lead = range(x.ndim - inputs)
    return to_x, _contract(x, gradient, lead, lead, weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats [...] of the target ids [...] under float32 logits [..., V]."""
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple]:
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return total - picked, (logits, targets, total)


def _cross_entropy_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, total = saved
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - total[..., None]) - is_target.astype(logits.dtype)) * gradient[..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _last(x: jax.Array, count: int) -> range:
    return range(x.ndim - count, x.ndim)


def _contract(x: jax.Array, y: jax.Array, x_axes: range, y_axes: range, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x, y, ((tuple(x_axes), tuple(y_axes)), ((), ())), preferred_element_type=dtype)
