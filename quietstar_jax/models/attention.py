"""Exact grouped-query attention: one softmax over one or two groups of keys.

Axis letters: B batch, L positions, G key/value heads, M query heads per key/value head, H head width,
R thoughts, J positions of a chunk, C chain tokens, P prefix keys. Scores and softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row without any visible key gives a mean instead of NaN


def split_heads(queries: jax.Array, num_kv_heads: int) -> jax.Array:
    """[..., Q, H] -> [..., G, M, H]: query heads grouped under the key/value head they share."""
    *lead, num_heads, head_dim = queries.shape
    return queries.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, head_dim)


def causal_mask(mask: jax.Array, window: jax.Array) -> jax.Array:
    """Which key l a base query q sees: real text, l <= q, and q - l < window.

    Args:
      mask: [B, L] bool, True where the text is real.
      window: scalar, keys a query sees with itself; L or more = all.

    Returns:
      [B, L, L] bool, query by key.
    """
    position = jnp.arange(mask.shape[1])
    distance = position[:, None] - position[None, :]
    return mask[:, None, :] & ((distance >= 0) & (distance < window))[None]


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention over one group of keys.

    Args:
      queries: [B, L, Q, H]; keys, values: [B, P, G, H]; visible: [B, L, P] bool.

    Returns:
      [B, L, Q, H] in the dtype of `values`.
    """
    grouped = split_heads(queries * queries.shape[-1] ** -0.5, keys.shape[-2])
    scores = jnp.einsum("blgmh,bpgh->bgmlp", grouped, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    context = jnp.einsum("bgmlp,bpgh->blgmh", weights.astype(values.dtype), values)
    return context.reshape(queries.shape)


def attend_prefix_and_own(
    queries: jax.Array,
    prefix_keys: jax.Array,
    prefix_values: jax.Array,
    prefix_visible: jax.Array,
    own_keys: jax.Array,
    own_values: jax.Array,
    own_visible: jax.Array,
) -> jax.Array:
    """Attention of thought chains: the text before the thought and the thought itself, in ONE softmax.

    All R * C queries of the J positions meet the prefix keys in one matrix product per key/value head:
    the thoughts of a position are extra query rows, the prefix is never copied.

    Args:
      queries: [B, R, J, C, Q, H].
      prefix_keys, prefix_values: [B, P, G, H], of the base pass.
      prefix_visible: [B, J, C, P] bool.
      own_keys, own_values: [B, R, J, E, G, H], of the chain itself.
      own_visible: [J, C, E] bool.

    Returns:
      [B, R, J, C, Q, H] in the dtype of the values.
    """
    grouped = split_heads(queries * queries.shape[-1] ** -0.5, prefix_keys.shape[-2])
    prefix = jnp.einsum("brjcgmh,bpgh->bgmrjcp", grouped, prefix_keys, preferred_element_type=jnp.float32)
    prefix = jnp.where(prefix_visible[:, None, None, None], prefix, MASKED)
    own = jnp.einsum("brjcgmh,brjegh->bgmrjce", grouped, own_keys, preferred_element_type=jnp.float32)
    own = jnp.where(own_visible, own, MASKED)

    peak = jax.lax.stop_gradient(jnp.maximum(prefix.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    prefix, own = jnp.exp(prefix - peak), jnp.exp(own - peak)
    scale = 1.0 / (prefix.sum(-1, keepdims=True) + own.sum(-1, keepdims=True))
    dtype = prefix_values.dtype
    context = jnp.einsum("bgmrjcp,bpgh->brjcgmh", (prefix * scale).astype(dtype), prefix_values)
    context += jnp.einsum("bgmrjce,brjegh->brjcgmh", (own * scale).astype(dtype), own_values)
    return context.reshape(queries.shape)
