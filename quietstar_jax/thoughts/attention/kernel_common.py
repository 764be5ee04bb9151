"""What the kernels of the prefix part share: one axis of query rows, what each of them sees, whole blocks of both.

All query rows of a key/value head, of whatever thought, position, chain token and query head, are one long axis; each
knows the first and last key it may see. A block of rows visits only blocks of keys that one of its rows may see.

Axis letters: B batch, G key/value heads, N query rows, P prefix keys, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.attention.mask import ChainMask
from quietstar_jax.thoughts.attention.prefix_xla import Sums


class Range(NamedTuple):
    """Which keys a row sees: real ones among low .. high.

    Attributes:
      low, high: [B, N] int32, both included; mask: [B, P] bool.
    """

    low: jax.Array
    high: jax.Array
    mask: jax.Array


def prefix_fwd(
    forward: Callable[..., Sums], q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, own: Sums
) -> Sums:
    """As `prefix_xla.prefix_fwd`, where `forward(rows [B, G, N, H], keys, values, Range)` sums over the prefix."""
    found = forward(_as_rows(q), keys, values, _range(q, seen))
    prefix = Sums(*(x.reshape(mine.shape) for x, mine in zip(found, own, strict=True)))
    higher = jnp.maximum(own.peak, prefix.peak)
    kept, added = jnp.exp(own.peak - higher), jnp.exp(prefix.peak - higher)
    return Sums(higher, own.total * kept + prefix.total * added, own.context * kept + prefix.context * added)


def prefix_bwd(
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]], q: jax.Array, keys: jax.Array, values: jax.Array,
    seen: ChainMask, lse: jax.Array, mean: jax.Array, gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `prefix_xla.prefix_bwd`, where `backward(rows, keys, values, Range, lse, mean, gradient)` gives
    those of rows, keys and values, the last three of its arguments as rows too."""
    rows = (_as_rows(x) for x in (lse, mean, gradient))
    to_q, to_keys, to_values = backward(_as_rows(q), keys, values, _range(q, seen), *rows)
    return to_q.reshape(q.shape), to_keys, to_values


def bounds(seen: Range, length: int, row_block: int, key_block: int) -> tuple[jax.Array, jax.Array]:
    """First and last key block that some row of each block of rows sees: two int32 [B, row blocks].

    Args:
      seen: of whole blocks of rows; length: P, without the keys that fill the last block.
    """
    batch = seen.low.shape[0]
    low, high = (x.reshape(batch, -1, row_block) for x in (seen.low, seen.high))
    sees = low <= high
    first = jnp.where(sees, low, length).min(axis=-1) // key_block
    last = jnp.where(sees, jnp.minimum(high, length - 1), -key_block).max(axis=-1) // key_block
    return first.astype(jnp.int32), last.astype(jnp.int32)


def pad(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, row_block: int, key_block: int
) -> tuple[jax.Array, jax.Array, jax.Array, Range]:
    """Whole blocks of rows [B, G, N, H] and of keys and values [B, G, P, H]: added rows see nothing, added keys are not
    real."""
    low, high = pad_axis(seen.low, 1, row_block, fill=1), pad_axis(seen.high, 1, row_block)
    keys, values = pad_axis(keys, 2, key_block), pad_axis(values, 2, key_block)
    return pad_axis(q, 2, row_block), keys, values, Range(low, high, pad_axis(seen.mask, 1, key_block))


def pad_axis(x: jax.Array, axis: int, multiple: int, fill: int = 0) -> jax.Array:
    """x with its axis filled up to the next multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=fill)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product of two matrices over these axes, summed in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _as_rows(x: jax.Array) -> jax.Array:
    """[B, G, R, J, X, H] -> [B, G, N, H]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _range(q: jax.Array, seen: ChainMask) -> Range:
    """Which prefix keys every row of q [B, G, R, J, X, H] sees."""
    batch, _, count, chunk, rows, _ = q.shape
    position = jnp.broadcast_to(seen.positions[..., None, :, None], (batch, count, chunk, rows))
    first = 0 if seen.first is None else seen.first[:, None, :, None]
    low = jnp.maximum(position + 2 + seen.offsets - seen.window, first)
    return Range(low.reshape(batch, -1), position.reshape(batch, -1), seen.mask)
