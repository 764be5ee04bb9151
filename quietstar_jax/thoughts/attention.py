"""Attention of thought chains: the text before the thought and the thought itself, in ONE exact softmax.

All chains of a position are extra query rows against the same prefix keys, which are never copied. They meet them
block by block with a running maximum and sum (as in FlashAttention), so that scores over the whole prefix never
exist at once, and blocks that no chain of the chunk can see are never computed. The backward pass computes the
scores again from the saved log-sum-exp.

Axis letters: B batch, G key/value heads, M query heads of each, R thoughts, J positions, C chain tokens, X = M * C
query rows of a chain and head, P prefix keys, E chain keys, H head width. Scores and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from quietstar_jax.models.attention import ATTENTION, MASKED, split_heads
from quietstar_jax.parallel.axes import shard

KEY_BLOCK = 64  # prefix keys at once

# Every device attends with its own sequences and heads, and needs nothing of another.
_OVER = ("data", "fsdp", "tensor", "group")
_QUERIES = ("batch", "kv_heads", None, None, "query_rows", None)
_KEYS, _OWN_KEYS = ("batch", "kv_heads", None, None), ("batch", "kv_heads", None, None, None, None)


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
    rows, seen = _query_rows(queries, prefix_keys.shape[-2], seen)
    prefix = (prefix_keys.swapaxes(1, 2), prefix_values.swapaxes(1, 2))
    return _from_query_rows(_attention(rows, *prefix, own_keys, own_values, seen), queries)


def attend_cache(
    queries: jax.Array, cache_keys: jax.Array, cache_values: jax.Array, layer: jax.Array, own_keys: jax.Array,
    own_values: jax.Array, seen: Seen, key_block: int,
) -> jax.Array:  # fmt: skip
    """`attend_chains` against one layer of a cache that is read in place: only the blocks that are seen are touched.

    Args:
      cache_keys, cache_values: [layers, B, G, P, H]; layer: scalar, which of them.
      key_block: prefix keys at once, a divisor of P or more.

    Returns:
      as `attend_chains`; there is no gradient.
    """
    rows, seen = _query_rows(queries, cache_keys.shape[2], seen)
    _, batch, groups, length, width = cache_keys.shape
    key_block = min(key_block, length)

    def cut(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        corner, size = (layer, 0, 0, start, 0), (1, batch, groups, key_block, width)
        return (
            jax.lax.dynamic_slice(cache_keys, corner, size)[0],
            jax.lax.dynamic_slice(cache_values, corner, size)[0],
        )

    context, _ = _attend_blocks(rows, own_keys, own_values, seen, key_block, cut)
    return _from_query_rows(context, queries)


def _query_rows(queries: jax.Array, groups: int, seen: Seen) -> tuple[jax.Array, Seen]:
    """Queries [B, R, J, C, G * M, H] -> scaled rows [B, G, R, J, X, H], and what each of them sees."""
    heads, width = queries.shape[-2:]
    rows = split_heads(queries * width**-0.5, groups).transpose(0, 4, 1, 2, 5, 3, 6)  # [B, G, R, J, M, C, H]
    return rows.reshape(*rows.shape[:4], -1, width), seen._replace(offsets=jnp.tile(seen.offsets, heads // groups))


def _from_query_rows(context: jax.Array, queries: jax.Array) -> jax.Array:
    """The context of rows [B, G, R, J, X, H] in the shape of the queries."""
    batch, count, chunk, tokens, _, width = queries.shape
    context = context.reshape(batch, context.shape[1], count, chunk, -1, tokens, width)
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


def _forward(*arguments: Any) -> tuple[jax.Array, tuple]:
    context, log_total = shard(_attend, _OVER, _arguments(arguments[-1]), (_QUERIES, _QUERIES))(*arguments)
    context = checkpoint_name(context, ATTENTION)
    return context, (*arguments, context, checkpoint_name(log_total, ATTENTION))


def _backward(saved: tuple, gradient: jax.Array) -> tuple:
    axes, gradients = (*_arguments(saved[5]), *(_QUERIES,) * 3), (_QUERIES, _KEYS, _KEYS, _OWN_KEYS, _OWN_KEYS)
    return *shard(_gradients, _OVER, axes, gradients)(*saved, gradient), None


_attention.defvjp(_forward, _backward)


def _arguments(seen: Seen) -> tuple[Any, ...]:
    """Logical axes of the arguments of `_attention`."""
    positions: Any = ("batch", None) if seen.positions.ndim == 2 else ()
    axes: Any = {"mask": ("batch", None), "positions": positions, "offsets": ("query_rows",), "window": ()}
    return _QUERIES, _KEYS, _KEYS, _OWN_KEYS, _OWN_KEYS, Seen(**axes)


def _attend(
    _: Any, q: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own_values: jax.Array, seen: Seen
) -> tuple[jax.Array, jax.Array]:
    """(context like q, log-sum-exp [B, G, R, J, X, 1])."""
    width = min(KEY_BLOCK, keys.shape[2])

    def cut(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _cut(keys, start, width), _cut(values, start, width)

    return _attend_blocks(q, own_keys, own_values, seen, width, cut)


def _attend_blocks(
    q: jax.Array, own_keys: jax.Array, own_values: jax.Array, seen: Seen, width: int,
    cut: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(context like q in the dtype of the values, log-sum-exp of the scores [..., X, 1]).

    Args:
      width: prefix keys at once; cut: from the first of them to their keys and values [B, G, width, H].
    """
    scores = _own_scores(q, own_keys, seen)
    peak = scores.max(axis=-1, keepdims=True)  # finite: every token sees itself
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    context = _dot("bgrjxe,bgrjeh->bgrjxh", weights.astype(own_values.dtype), own_values)

    def block(i: jax.Array, carry: tuple) -> tuple:
        peak, total, context = carry
        start, visible = _block(i, width, seen)
        block_keys, block_values = cut(start)
        scores = jnp.where(visible, _dot("bgrjxh,bgph->bgrjxp", q, block_keys), MASKED)
        higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(peak - higher)
        added = _dot("bgrjxp,bgph->bgrjxh", weights.astype(block_values.dtype), block_values)
        return higher, total * shrink + weights.sum(axis=-1, keepdims=True), context * shrink + added

    carry = (peak, total, context)
    if seen.mask.shape[1] == width:  # nothing to loop over
        peak, total, context = block(jnp.int32(0), carry)
    else:
        peak, total, context = jax.lax.fori_loop(*_blocks(seen, width), block, carry)
    return (context / total).astype(own_values.dtype), peak + jnp.log(total)


def _gradients(
    add_up: Any, q: jax.Array, keys: jax.Array, values: jax.Array, own_keys: jax.Array, own_values: jax.Array,
    seen: Seen, context: jax.Array, log_total: jax.Array, gradient: jax.Array,
) -> tuple:  # fmt: skip
    """Of q, keys, values, own_keys and own_values."""
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
        start, visible = _block(i, width, seen)
        block_keys, block_values = _cut(keys, start, width), _cut(values, start, width)
        scores = jnp.where(visible, _dot("bgrjxh,bgph->bgrjxp", q, block_keys), MASKED)
        weights, to_scores = through_softmax(scores, _dot("bgrjxh,bgph->bgrjxp", gradient, block_values))
        to_q += _dot("bgrjxp,bgph->bgrjxh", to_scores, block_keys)
        to_keys = _add_block(start, to_keys, _dot("bgrjxp,bgrjxh->bgph", to_scores, q))
        to_values = _add_block(start, to_values, _dot("bgrjxp,bgrjxh->bgph", weights, gradient))
        return to_q, to_keys, to_values

    width = min(KEY_BLOCK, keys.shape[2])
    zeros = jnp.zeros(keys.shape, jnp.float32)
    to_q, *to_prefix = jax.lax.fori_loop(*_blocks(seen, width), block, (to_q, zeros, zeros))
    # Devices that hold query heads of the same key/value heads.
    to_keys = add_up((*to_prefix, to_own_keys, to_own_values), "group")
    return tuple(x.astype(q.dtype) for x in (to_q, *to_keys))


def _own_scores(q: jax.Array, own_keys: jax.Array, seen: Seen) -> jax.Array:
    scores = _dot("bgrjxh,bgrjeh->bgrjxe", q, own_keys)
    return jnp.where(own_visible(seen, own_keys.shape[4]), scores, MASKED)


def _blocks(seen: Seen, width: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the first block of `width` prefix keys that a chain sees, and of one past the last."""
    first = jnp.maximum(seen.positions.min() + seen.offsets.min() + 2 - seen.window, 0)
    end = jnp.minimum(seen.positions.max() + 1, seen.mask.shape[1])
    return first // width, (end + width - 1) // width


def _block(i: jax.Array, width: int, seen: Seen) -> tuple[jax.Array, jax.Array]:
    """The first key of block i, and which of its keys a query row sees, [B, 1, 1, J, X, width].

    The last block begins earlier where the text is no multiple of the width.
    """
    start = jnp.minimum(i * width, seen.mask.shape[1] - width)
    numbers = start + jnp.arange(width)
    visible = prefix_visible(seen, numbers) & (numbers >= i * width)
    return start, visible[:, None, None]


def _cut(x: jax.Array, start: jax.Array, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=2)


def _add_block(start: jax.Array, total: jax.Array, block: jax.Array) -> jax.Array:
    block += _cut(total, start, block.shape[2])
    return jax.lax.dynamic_update_slice_in_dim(total, block, start, axis=2)


def _dot(equation: str, *operands: Any) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
