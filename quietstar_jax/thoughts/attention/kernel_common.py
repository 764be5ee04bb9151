"""Code shared by the prefix kernels: query rows on one axis, the range of keys of each row, padding to whole blocks.

All query rows of a key/value head form one axis, N = R * J * X: every thought, position, query head and chain token.
Each row has the first (low) and last (high) key that it may see. A block of rows visits the blocks of keys from the
first to the last one that any of its rows may see:

                        key block  0  1  2  3  4
    row block 0    (j = 0 ..)      ■  ·  ·  ·  ·      first 0, last 0
    row block 1                    ■  ■  ■  ·  ·      first 0, last 2
    row block 2    (with window)   ·  ■  ■  ■  ■      first 1, last 4

Axis letters: B batch, G key/value heads, N query rows, P prefix keys, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.attention.mask import ChainMask
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState


class Range(NamedTuple):
    """The keys that a row sees: those of low .. high where mask is True.

    Attributes:
      low, high: [B, N] int32, both included; mask: [B, P] bool.
    """

    low: jax.Array
    high: jax.Array
    mask: jax.Array


def prefix_fwd(
    forward: Callable[..., SoftmaxState], q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask,
    chain: SoftmaxState, *, cap: float = 0.0, interpret: bool = False,
) -> SoftmaxState:  # fmt: skip
    """As `prefix_xla.prefix_fwd`, where `forward(rows [B, G, N, H], keys, values, Range)` visits the prefix.

    The kernel returns the state of the prefix alone; this state and that of the chain are rescaled to the larger m and
    added here. A row that sees no prefix key has m = MASKED, so its `added` is 0.
    """
    state = forward(_as_rows(q), keys, values, _range(q, seen), cap=cap, interpret=interpret)
    prefix = SoftmaxState(*(x.reshape(like.shape) for x, like in zip(state, chain, strict=True)))
    m = jnp.maximum(chain.m, prefix.m)
    kept, added = jnp.exp(chain.m - m), jnp.exp(prefix.m - m)
    return SoftmaxState(m, chain.l * kept + prefix.l * added, chain.acc * kept + prefix.acc * added)


def prefix_bwd(
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]], q: jax.Array, keys: jax.Array, values: jax.Array,
    seen: ChainMask, lse: jax.Array, delta: jax.Array, gradient: jax.Array, *, cap: float = 0.0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `prefix_xla.prefix_bwd`, where `backward(rows, keys, values, Range, lse, delta, gradient)` returns the
    gradients of rows, keys and values; lse, delta and gradient have the row layout too."""
    rows = (_as_rows(x) for x in (lse, delta, gradient))
    to_q, to_keys, to_values = backward(_as_rows(q), keys, values, _range(q, seen), *rows, cap=cap, interpret=interpret)
    return to_q.reshape(q.shape), to_keys, to_values


def bounds(seen: Range, length: int, row_block: int, key_block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first and last key block that each block of rows sees: two int32 [B, row blocks].

    Args:
      seen: padded to whole blocks of rows; length: P without padding.
    """
    batch = seen.low.shape[0]
    # Rows that see no key (low > high) do not count: a block of only such rows gets first = P // key_block, last = -1.
    low, high = (x.reshape(batch, -1, row_block) for x in (seen.low, seen.high))
    sees = low <= high
    first = jnp.where(sees, low, length).min(axis=-1) // key_block
    last = jnp.where(sees, jnp.minimum(high, length - 1), -key_block).max(axis=-1) // key_block
    return first.astype(jnp.int32), last.astype(jnp.int32)


def pad(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: Range, row_block: int, key_block: int
) -> tuple[jax.Array, jax.Array, jax.Array, Range]:
    """Pads rows [B, G, N, H] and keys and values [B, G, P, H] to whole blocks: added rows see no key (low > high), and
    added keys are masked."""
    low, high = pad_axis(seen.low, 1, row_block, fill=1), pad_axis(seen.high, 1, row_block)
    keys, values = pad_axis(keys, 2, key_block), pad_axis(values, 2, key_block)
    return pad_axis(q, 2, row_block), keys, values, Range(low, high, pad_axis(seen.mask, 1, key_block))


def pad_axis(x: jax.Array, axis: int, multiple: int, fill: int = 0) -> jax.Array:
    """Pads one axis of x with `fill` to the next multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=fill)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Product of two matrices, contracted over these axes and accumulated in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _as_rows(x: jax.Array) -> jax.Array:
    """[B, G, R, J, X, H] -> [B, G, N, H]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _range(q: jax.Array, seen: ChainMask) -> Range:
    """Returns which prefix keys each row of q [B, G, R, J, X, H] sees."""
    # Row (r, j, x) has position j + 1 + c and sees keys up to j, above j + 1 + c - window, in its document.
    batch, _, count, chunk, rows, _ = q.shape
    position = jnp.broadcast_to(seen.positions[..., None, :, None], (batch, count, chunk, rows))
    first = 0 if seen.first is None else seen.first[:, None, :, None]
    low = jnp.maximum(position + 2 + seen.offsets - seen.window, first)
    return Range(low.reshape(batch, -1), position.reshape(batch, -1), seen.mask)
