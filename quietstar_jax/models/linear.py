"""Linear maps, embedding look-up and cross-entropy, with custom gradients that cost less than the derived ones.

The gradients equal those of automatic differentiation, except that the cotangent is first rounded to the compute dtype.
In the custom form every product reads its operands in their memory layout (for derived gradients XLA writes transposed
copies of some), and the gradient of a weight is accumulated in the float32 of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from quietstar_jax.parallel.axes import Axes, constrain, manual_shard_map, num_shards

MAPPED = "mapped"  # name of the results of `mapped` in rematerialisation policies


def dense(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, inputs: int = 1) -> jax.Array:
    """Linear map in x's dtype: contracts the last `inputs` axes of x with the first ones of the weight."""
    y = linear(x, weight, inputs, x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def mapped(x: jax.Array, weights: Mapping[str, Any], name: str, *, inputs: int = 1) -> jax.Array:
    """Linear map of a layer with its bias and its adapter, if it has them, in x's dtype.

    Args:
      weights: of the layer by name, e.g. `query`, `query_bias`, `query_lora_a`; `lora_scale` multiplies adapters.
      inputs: as in `dense`.
    """
    y = dense(x, weights[name], weights.get(f"{name}_bias"), inputs=inputs)
    if f"{name}_lora_a" not in weights:
        return checkpoint_name(y, MAPPED)
    low = checkpoint_name(linear(x, weights[f"{name}_lora_a"], inputs, x.dtype) * weights["lora_scale"], MAPPED)
    return checkpoint_name(y + linear(low, weights[f"{name}_lora_b"], 1, x.dtype), MAPPED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def linear(x: jax.Array, weight: jax.Array, inputs: int, dtype: jnp.dtype, transposed: bool = False) -> jax.Array:
    """x [..., I] times weight [I, O] -> [..., O] in `dtype`; I is `inputs` axes, O any number of axes.

    Args:
      transposed: the weight is [O, I]. Its gradient is computed in this layout: XLA would merge a transpose of the
        product into the product, and the CPU has no bfloat16 product of that form with a float32 result.
    """
    return _linear_forward(x, weight, inputs, dtype, transposed)[0]


def _linear_forward(
    x: jax.Array, weight: jax.Array, inputs: int, dtype: jnp.dtype, transposed: bool
) -> tuple[jax.Array, tuple]:
    # Does not call `linear`: a rematerialisation policy must see the product.
    contracted = _last(weight, inputs) if transposed else range(inputs)
    return _contract(x, weight.astype(x.dtype), _last(x, inputs), contracted, dtype), (x, weight)


def _linear_backward(
    inputs: int, dtype: jnp.dtype, transposed: bool, saved: tuple, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # y = x W:  dx = dy W^T, contracted over O;  dW = x^T dy, contracted over the leading axes of x.
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    outputs = range(weight.ndim - inputs) if transposed else range(inputs, weight.ndim)
    to_x = _contract(gradient, weight.astype(x.dtype), _last(gradient, len(outputs)), outputs, x.dtype)
    lead = range(x.ndim - inputs)
    first, second = (gradient, x) if transposed else (x, gradient)
    return to_x, _contract(first, second, lead, lead, weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def pick(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the entries [...] of values [..., V] at the target ids [...]."""
    if num_shards("vocab") == 1:
        return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]
    # Each device compares with its own ids; an indexed read would gather all values.
    return jnp.where(jnp.arange(values.shape[-1]) == targets[..., None], values, 0.0).sum(axis=-1)


def look_up(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the rows [..., D] in `dtype` of an embedding [V, D] at ids [...]."""
    if num_shards("vocab") * num_shards("embed") == 1:
        return table.at[tokens].get(mode="clip").astype(dtype)
    rows = _look_up_parts(table, jnp.clip(tokens, 0, len(table) - 1), dtype)
    return constrain(rows, "batch", ..., "hidden")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up_parts(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns rows [B, ..., D], sharded along D like the table; the table and its gradient are never gathered."""
    return _look_up_forward(table, tokens, dtype)[0]


def _look_up_forward(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple]:
    # A device has rows ids[0] .. ids[-1] of the table. Tokens with other ids read 0 there, and the sum over the devices
    # that split the vocabulary is the row.
    def read(psum: Any, table: jax.Array, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        here = (tokens >= ids[0]) & (tokens <= ids[-1])
        rows = table[jnp.where(here, tokens - ids[0], 0)].astype(dtype)
        return psum(psum(jnp.where(here[..., None], rows, 0), "tensor"), "group")

    ids, (table_axes, token_axes, id_axes, row_axes) = jnp.arange(len(table)), _look_up_axes(tokens)
    return manual_shard_map(read, _WEIGHT_MESH_AXES, (table_axes, token_axes, id_axes), row_axes)(table, tokens, ids), (
        table,
        tokens,
    )


def _look_up_backward(dtype: jnp.dtype, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved

    # A device adds the gradients of its own tokens to its own part of the table, where ids of other parts are dropped;
    # the sum over `data` covers all tokens.
    def write(psum: Any, gradient: jax.Array, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        here = (tokens >= ids[0]) & (tokens <= ids[-1])
        zeros = jnp.zeros((len(ids), gradient.shape[-1]), table.dtype)
        rows = zeros.at[jnp.where(here, tokens - ids[0], len(ids))].add(gradient.astype(table.dtype), mode="drop")
        return psum(rows, "data")

    ids, (table_axes, token_axes, id_axes, row_axes) = jnp.arange(len(table)), _look_up_axes(tokens)
    return manual_shard_map(write, _WEIGHT_MESH_AXES, (row_axes, token_axes, id_axes), table_axes)(
        gradient, tokens, ids
    ), None


_look_up_parts.defvjp(_look_up_forward, _look_up_backward)
_WEIGHT_MESH_AXES = ("data", "fsdp", "tensor", "group")


def _look_up_axes(tokens: jax.Array) -> tuple[Axes, Axes, Axes, Axes]:
    """Logical axes of table, tokens, ids and rows."""
    lead = ("rows", *(None,) * (tokens.ndim - 1))
    return ("vocab", "embed"), lead, ("vocab",), (*lead, "embed")


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross-entropy, nats [...], of the target ids [...] under float32 logits [..., V]."""
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple]:
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = pick(logits, targets)
    return total - picked, (logits, targets, total)


def _cross_entropy_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    # d nll / d logits = softmax(logits) - one_hot(target), from the saved log-sum-exp.
    logits, targets, total = saved
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - total[..., None]) - is_target.astype(logits.dtype)) * gradient[..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _last(x: jax.Array, count: int) -> range:
    return range(x.ndim - count, x.ndim)


def _contract(x: jax.Array, y: jax.Array, x_axes: range, y_axes: range, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x, y, ((tuple(x_axes), tuple(y_axes)), ((), ())), preferred_element_type=dtype)
