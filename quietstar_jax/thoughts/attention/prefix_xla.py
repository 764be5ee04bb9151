"""Chain attention in plain JAX, one block of keys at a time with a running maximum and sum.

`prefix_fwd` and `prefix_bwd` visit the keys of the text, `chain_fwd` and `chain_bwd` those of the chain itself.

Axis letters as in `thoughts/attention/chain_attention.py`. Blocks of 4 keys with P = 10: the last block starts earlier,
so that all blocks are equally wide, and masks the keys that the block before it already has.

    key        0  1  2  3  4  5  6  7  8  9
    block 0    ■  ■  ■  ■
    block 1                ■  ■  ■  ■
    block 2                      ·  ·  ■  ■     starts at P - 4
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.models.attention import MASKED, soft_cap
from quietstar_jax.thoughts.attention.mask import ChainMask, prefix_visible

KEY_BLOCK = 64  # keys per block, and tokens of a chain per block of queries
# Keys per block for single tokens on accelerators, where more iterations cost more than some unneeded keys.
ACCELERATOR_KEY_BLOCK = 2048

Cut = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def key_block() -> int:
    """Keys per block for single tokens, on the devices of this process."""
    return KEY_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_KEY_BLOCK


class SoftmaxState(NamedTuple):
    """State of a softmax over the keys visited so far, with the names of FlashAttention.

    The output over these keys is acc / l; their log-sum-exp is m + log(l).

    Attributes:
      m, l: [..., 1] float32, the largest score and the sum of exp(score - m).
      acc: [..., H] float32, the sum of exp(score - m) times the values.
    """

    m: jax.Array
    l: jax.Array
    acc: jax.Array


def empty_state(q: jax.Array) -> SoftmaxState:
    """Returns the softmax of queries [..., H] over no keys."""
    zeros = jnp.zeros(q.shape, jnp.float32)
    return SoftmaxState(zeros[..., :1] + MASKED, zeros[..., :1], zeros)


def prefix_fwd(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, state: SoftmaxState, *, cap: float = 0.0,
    width: int = 0,
) -> SoftmaxState:  # fmt: skip
    """Adds the prefix to the softmax over other keys.

    Args:
      q: [B, G, R, J, X, H] scaled; keys, values: [B, G, P, H]; cap: soft cap of the scores, 0 = none; width: keys per
        block, 0 = `KEY_BLOCK`.
    """
    width = min(width or KEY_BLOCK, keys.shape[2])
    cut = lambda start: (_cut(keys, start, width), _cut(values, start, width))  # noqa: E731
    return add_blocks(q, seen, state, width, cut, cap)


def add_blocks(
    q: jax.Array, seen: ChainMask, state: SoftmaxState, width: int, cut: Cut, cap: float = 0.0
) -> SoftmaxState:
    """As `prefix_fwd`, where `cut(start)` reads `width` keys and values [B, G, width, H] from key `start` on."""

    def block(i: jax.Array, state: SoftmaxState) -> SoftmaxState:
        start, visible = _block(i, width, seen)
        block_keys, block_values = cut(start)
        scores = jnp.where(visible, soft_cap(dot("bgrjxh,bgph->bgrjxp", q, block_keys), cap), MASKED)
        # The old state is relative to the old maximum: exp(score - m) = exp(score - state.m) * exp(state.m - m). Once m
        # is a real score, masked keys get the weight exp(MASKED - m) = 0. Before that, all weights are exp(0) = 1; the
        # first real score removes them, with rescale = exp(MASKED - m) = 0. Every token sees at least itself.
        m = jnp.maximum(state.m, scores.max(axis=-1, keepdims=True))
        weights, rescale = jnp.exp(scores - m), jnp.exp(state.m - m)
        added = dot("bgrjxp,bgph->bgrjxh", weights.astype(block_values.dtype), block_values)
        l = state.l * rescale + weights.sum(axis=-1, keepdims=True)
        return SoftmaxState(m, l, state.acc * rescale + added)

    if seen.mask.shape[1] == width:  # one block
        return block(jnp.int32(0), state)
    return jax.lax.fori_loop(*_blocks(seen, width), block, state)


def prefix_bwd(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, lse: jax.Array, delta: jax.Array,
    gradient: jax.Array, *, cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns the prefix part of the gradients of queries, keys and values, float32, from recomputed scores.

    Keys and values are shared by all chains: their gradients sum over R, J and X.

    Args:
      lse: [B, G, R, J, X, 1] log-sum-exp over prefix and chain; delta: [B, G, R, J, X, 1], the gradient times the
        context, summed over H; gradient: of the context; cap: as in `prefix_fwd`.
    """
    width = min(KEY_BLOCK, keys.shape[2])

    def block(i: jax.Array, carry: tuple) -> tuple:
        to_q, to_keys, to_values = carry
        start, visible = _block(i, width, seen)
        block_keys, block_values = _cut(keys, start, width), _cut(values, start, width)
        scores = jnp.where(visible, soft_cap(dot("bgrjxh,bgph->bgrjxp", q, block_keys), cap), MASKED)
        to_weights = dot("bgrjxh,bgph->bgrjxp", gradient, block_values)
        weights, to_scores = through_softmax(scores, to_weights, lse, delta, q.dtype, cap)
        to_q += dot("bgrjxp,bgph->bgrjxh", to_scores, block_keys)
        to_keys = _add_block(start, to_keys, dot("bgrjxp,bgrjxh->bgph", to_scores, q))
        to_values = _add_block(start, to_values, dot("bgrjxp,bgrjxh->bgph", weights, gradient))
        return to_q, to_keys, to_values

    zeros = _zeros(q, keys, values)
    if seen.mask.shape[1] == width:  # one block
        return block(jnp.int32(0), zeros)
    return jax.lax.fori_loop(*_blocks(seen, width), block, zeros)


def chain_fwd(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, state: SoftmaxState, *, cap: float = 0.0
) -> SoftmaxState:
    """As `prefix_fwd`, one block of positions at a time, where the positions are those of the keys.

    Each block of positions stops at its own last position:

        key block        0  1  2  3
        positions 0      ■
                  1      ■  ■
                  2      ■  ■  ■
                  3      ■  ■  ■  ■
    """
    count = q.shape[3]
    width = min(KEY_BLOCK, count)
    if count == width:
        return prefix_fwd(q, keys, values, seen, state, cap=cap)

    def rows(i: jax.Array, state: SoftmaxState) -> SoftmaxState:
        # The last block starts earlier, and computes some positions again, which keep their first result.
        start = jnp.minimum(i * width, count - width)
        part, before = (jax.tree.map(lambda x: _cut(x, start, width, 3), x) for x in (q, initial))
        found = prefix_fwd(part, keys, values, _positions(seen, start, width), before, cap=cap)
        new = (start + jnp.arange(width) >= i * width)[:, None, None]
        found = jax.tree.map(lambda x, y: jnp.where(new, y, _cut(x, start, width, 3)), state, found)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 3), state, found)

    initial = state
    return jax.lax.fori_loop(0, -(-count // width), rows, state)


def chain_bwd(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, lse: jax.Array, delta: jax.Array,
    gradient: jax.Array, *, cap: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `prefix_bwd`, in the blocks of `chain_fwd`."""
    count = q.shape[3]
    width = min(KEY_BLOCK, count)
    if count == width:
        return prefix_bwd(q, keys, values, seen, lse, delta, gradient, cap=cap)

    def rows(i: jax.Array, totals: tuple) -> tuple:
        start = jnp.minimum(i * width, count - width)
        part, part_lse, *rest = (_cut(x, start, width, 3) for x in (q, lse, delta, gradient))
        # Positions that the block before this one already has add nothing.
        new = (start + jnp.arange(width) >= i * width)[:, None, None]
        part_delta, part_gradient = (jnp.where(new, x, 0) for x in rest)
        part_seen = _positions(seen, start, width)
        to_q, *to_kv = prefix_bwd(part, keys, values, part_seen, part_lse, part_delta, part_gradient, cap=cap)
        return _add_block(start, totals[0], to_q, 3), *(x + new for x, new in zip(totals[1:], to_kv, strict=True))

    return jax.lax.fori_loop(0, -(-count // width), rows, _zeros(q, keys, values))


def through_softmax(
    scores: jax.Array, to_weights: jax.Array, lse: jax.Array, delta: jax.Array, dtype: jnp.dtype, cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (weights p, gradient of q . k) in the compute dtype, for some of the keys of a softmax.

    The gradient of score i is p_i (to_weights_i - sum_k p_k to_weights_k). The sum over all keys is `delta`, which
    equals gradient . context, so a block of keys needs nothing from the other blocks. A soft cap s = cap tanh(x / cap)
    of x = q . k multiplies it by ds/dx = 1 - (s / cap)^2.
    """
    weights = jnp.exp(scores - lse)
    to_scores = weights * (to_weights - delta)
    if cap:  # the maximum affects only masked scores, whose square would overflow
        to_scores *= 1.0 - (jnp.maximum(scores, -cap) / cap) ** 2
    return weights.astype(dtype), to_scores.astype(dtype)


def dot(equation: str, *operands: Any) -> jax.Array:
    """Einsum that accumulates in float32 and returns float32."""
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _blocks(seen: ChainMask, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers of the first block of `width` prefix keys that any chain sees, and of one past the last."""
    # Token c of chain j has position j + 1 + c and sees keys above j + 1 + c - window.
    first = jnp.maximum(seen.positions.min() + seen.offsets.min() + 2 - seen.window, 0)
    if seen.first is not None:
        first = jnp.maximum(first, seen.first.min())
    end = jnp.minimum(seen.positions.max() + 1, seen.mask.shape[1])
    return first // width, (end + width - 1) // width


def _block(i: jax.Array, width: int, seen: ChainMask) -> tuple[jax.Array, jax.Array]:
    """Returns the first key of block i, and which of its keys each query row sees, [B, 1, 1, J, X, width].

    The last block starts earlier where P is not a multiple of the width.
    """
    start = jnp.minimum(i * width, seen.mask.shape[1] - width)
    numbers = start + jnp.arange(width)
    visible = prefix_visible(seen, numbers) & (numbers >= i * width)
    return start, visible[:, None, None]


def _positions(seen: ChainMask, start: jax.Array, width: int) -> ChainMask:
    return seen._replace(positions=_cut(seen.positions, start, width, -1))


def _zeros(*arrays: jax.Array) -> tuple:
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays)


def _cut(x: jax.Array, start: jax.Array, width: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis)


def _add_block(start: jax.Array, total: jax.Array, block: jax.Array, axis: int = 2) -> jax.Array:
    block += _cut(total, start, block.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, block, start, axis)
