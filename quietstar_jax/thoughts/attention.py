"""Attention of thought chains: the text before the thought and the thought itself, in ONE exact softmax.

All chains of a position are extra query rows against the same prefix keys, which are never copied. They meet them
block by block with a running maximum and sum (as in FlashAttention), so that scores over the whole prefix never
exist at once, and blocks that no chain of the chunk can see are never computed. The backward pass computes the
scores again from the saved log-sum-exp.

Axis letters: B batch, G key/value heads, M query heads of each, R thoughts, J positions, C chain tokens, X = M * C
query rows of a chain and head, P prefix keys, E chain keys, H head width. Scores and sums are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from quietstar_jax.models.attention import ATTENTION, MASKED, split_heads

KEY_BLOCK = 64  # prefix keys at once


class Seen(NamedTuple):
    """What decides which keys a chain token sees.

    Attributes:
      mask: [B, P] bool, True where the text is real.
      positions: [J] int32, the j of each chain, or [B, J] where sequences differ.
      offsets: [C] int32, the c of each query token.
      window: scalar int32, keys that a query sees, itself included.
    """

    mask: jax.Array
    positions: jax.Array
    offsets: jax.Array
    window: jax.Array


def prefix_visible(seen: Seen, keys: jax.Array) -> jax.Array:
    """Which of the prefix keys with numbers `keys` [N] a chain token sees: [B, J, C, N] bool."""
    position = seen.positions[..., None, None]
    query = position + 1 + seen.offsets[:, None]
    visible = (keys <= position) & (query - keys < seen.window)
    return seen.mask[:, keys][:, None, None, :] & visible


def own_visible(seen: Seen, length: int) -> jax.Array:
    """Which token of its own chain (of `length` tokens) a chain token sees: [C, length] bool."""
    distance = seen.offsets[:, None] - jnp.arange(length)[None, :]
    return (distance >= 0) & (distance < seen.window)


def attend_chains(
    queries: jax.Array, prefix_keys: jax.Array, prefix_values: jax.Array, own_keys: jax.Array, own_values: jax.Array,
    seen: Seen,
) -> jax.Array:  # fmt: skip
    """One layer's attention of chains.

    Args:
      queries: [B, R, J, C, G * M, H]; prefix_keys, prefix_values: [B, P, G, H], of the base pass.
      own_keys, own_values: [B, G, R, J, E, H], of the chains themselves; see `to_chain_layout`.

    Returns:
      [B, R, J, C, G * M, H] in the dtype of the values.
    """
    batch, count, chunk, tokens, heads, width = queries.shape
    groups = prefix_keys.shape[-2]
    rows = split_heads(queries * width**-0.5, groups).transpose(0, 4, 1, 2, 5, 3, 6)  # [B, G, R, J, M, C, H]
    rows = rows.reshape(*rows.shape[:4], -1, width)
    seen = seen._replace(offsets=jnp.tile(seen.offsets, heads // groups))
    prefix = (prefix_keys.swapaxes(1, 2), prefix_values.swapaxes(1, 2))
    context = _attention(rows, *prefix, own_keys, own_values, seen)
    context = context.reshape(batch, groups, count, chunk, heads // groups, tokens, width)
    return context.transpose(0, 2, 3, 5, 1, 4, 6).reshape(queries.shape)


def to_chain_layout(x: jax.Array) -> jax.Array:
    """Keys or values [B, R, J, C, G, H] as they are kept for attention: [B, G, R, J, C, H]."""
    return jnp.moveaxis(x, 4, 1)


@jax.custom_vjp
def _attention(
    q: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own_values: jax.Array, seen: Seen
):
    """q [B, G, R, J, X, H] scaled; keys, values [B, G, P, H]; own [B, G, R, J, E, H] -> context like q."""
    return _forward(q, keys, values, own_keys, own_values, seen)[0]


def _forward(
    q: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own_values: jax.Array, seen: Seen
) -> tuple[jax.Array, tuple]:
    scores = _own_scores(q, own_keys, seen)
    peak = scores.max(axis=-1, keepdims=True)  # finite: every token sees itself
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    context = _dot("bgrjxe,bgrjeh->bgrjxh", weights.astype(values.dtype), own_values)

    def block(i: jax.Array, carry: tuple) -> tuple:
        peak, total, context = carry
        block_keys, block_values, visible = _block(i, keys, values, seen)
        scores = jnp.where(visible, _dot("bgrjxh,bgph->bgrjxp", q, block_keys), MASKED)
        higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(peak - higher)
        added = _dot("bgrjxp,bgph->bgrjxh", weights.astype(values.dtype), block_values)
        return higher, total * shrink + weights.sum(axis=-1, keepdims=True), context * shrink + added

    peak, total, context = jax.lax.fori_loop(*_blocks(seen), block, (peak, total, context))
    context = checkpoint_name((context / total).astype(values.dtype), ATTENTION)
    log_total = checkpoint_name(peak + jnp.log(total), ATTENTION)
    return context, (q, keys, values, own_keys, own_values, seen, context, log_total)


def _backward(saved: tuple, gradient: jax.Array) -> tuple:
    q, keys, values, own_keys, own_values, seen, context, log_total = saved
    mean = (gradient.astype(jnp.float32) * context.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def through_softmax(scores: jax.Array, to_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights, gradient of scores) in the compute dtype."""
        weights = jnp.exp(scores - log_total)
        return weights.astype(q.dtype), (weights * (to_weights - mean)).astype(q.dtype)

    scores = _own_scores(q, own_keys, seen)
    weights, to_scores = through_softmax(scores, _dot("bgrjxh,bgrjeh->bgrjxe", gradient, own_values))
    to_own_keys = _dot("bgrjxe,bgrjxh->bgrjeh", to_scores, q)
    to_own_values = _dot("bgrjxe,bgrjxh->bgrjeh", weights, gradient)
    to_q = _dot("bgrjxe,bgrjeh->bgrjxh", to_scores, own_keys)

    def block(i: jax.Array, carry: tuple) -> tuple:
        to_q, to_keys, to_values = carry
        block_keys, block_values, visible = _block(i, keys, values, seen)
        scores = jnp.where(visible, _dot("bgrjxh,bgph->bgrjxp", q, block_keys), MASKED)
        weights, to_scores = through_softmax(scores, _dot("bgrjxh,bgph->bgrjxp", gradient, block_values))
        to_q += _dot("bgrjxp,bgph->bgrjxh", to_scores, block_keys)
        to_keys = _add_block(i, to_keys, _dot("bgrjxp,bgrjxh->bgph", to_scores, q))
        to_values = _add_block(i, to_values, _dot("bgrjxp,bgrjxh->bgph", weights, gradient))
        return to_q, to_keys, to_values

    zeros = jnp.zeros(keys.shape, jnp.float32)
    gradients = jax.lax.fori_loop(*_blocks(seen), block, (to_q, zeros, zeros))
    return *(x.astype(q.dtype) for x in (*gradients, to_own_keys, to_own_values)), None


_attention.defvjp(_forward, _backward)


def _own_scores(q: jax.Array, own_keys: jax.Array, seen: Seen) -> jax.Array:
    scores = _dot("bgrjxh,bgrjeh->bgrjxe", q, own_keys)
    return jnp.where(own_visible(seen, own_keys.shape[4]), scores, MASKED)


def _blocks(seen: Seen) -> tuple[jax.Array, jax.Array]:
    """Numbers of the first block of prefix keys that a chain sees, and of one past the last."""
    length = seen.mask.shape[1]
    width = min(KEY_BLOCK, length)
    first = jnp.maximum(seen.positions.min() + seen.offsets.min() + 2 - seen.window, 0)
    end = jnp.minimum(seen.positions.max() + 1, length)
    return first // width, (end + width - 1) // width


def _block_start(i: jax.Array, length: int) -> tuple[jax.Array, int]:
    """Where block i begins and how wide it is; the last one begins earlier where the text is no multiple of it."""
    width = min(KEY_BLOCK, length)
    return jnp.minimum(i * width, length - width), width


def _block(i: jax.Array, keys: jax.Array, values: jax.Array, seen: Seen) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [B, G, N, H] of block i, and which of them a query row sees, [B, 1, 1, J, X, N]."""
    start, width = _block_start(i, keys.shape[2])
    cut = [jax.lax.dynamic_slice_in_dim(x, start, width, axis=2) for x in (keys, values)]
    numbers = start + jnp.arange(width)
    visible = prefix_visible(seen, numbers) & (numbers >= i * width)
    return cut[0], cut[1], visible[:, None, None]


def _add_block(i: jax.Array, total: jax.Array, block: jax.Array) -> jax.Array:
    start, width = _block_start(i, total.shape[2])
    block += jax.lax.dynamic_slice_in_dim(total, start, width, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, block, start, axis=2)


def _dot(equation: str, *operands: Any) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
