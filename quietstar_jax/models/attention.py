"""Grouped-query attention of the text itself; `thoughts/attention/chain_attention.py` has the attention of thoughts.

Axis letters: B batch, L positions, G key/value heads, M query heads per key/value head, H head width, P keys.
Scores and softmax are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # name of the attention output in rematerialisation policies
MASKED = -1e30  # finite, so that a row without a visible key gives a mean instead of NaN


def split_heads(queries: jax.Array, num_kv_heads: int) -> jax.Array:
    """[..., Q, H] -> [..., G, M, H]: query heads grouped under the key/value head they share."""
    *lead, num_heads, head_dim = queries.shape
    return queries.reshape(*lead, num_kv_heads, num_heads // num_kv_heads, head_dim)


def causal_mask(mask: jax.Array, window: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Returns whether base query q sees key l: real text, starts[q] <= l <= q, and q - l < window.

    Args:
      mask: [B, L] bool, True where the text is real.
      window: scalar, number of keys that a query sees, itself included; L or more = all.
      starts: [B, L] int32, for each token the first token of its document; None = each row is one document.

    Returns:
      [B, L, L] bool, query by key.
    """
    position = jnp.arange(mask.shape[1])
    distance = position[:, None] - position[None, :]
    visible = mask[:, None, :] & ((distance >= 0) & (distance < window))[None]
    return visible if starts is None else visible & (position >= starts[:, :, None])


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Returns cap tanh(x / cap), within -cap .. cap; x itself if the cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, cap: float = 0.0) -> jax.Array:
    """Returns the attention output for queries over all visible keys.

    Args:
      queries: [B, L, Q, H], scaled; keys, values: [B, P, G, H]; visible: [B, L, P] bool.
      cap: soft cap of the scores; 0 = none.

    Returns:
      [B, L, Q, H] in the dtype of `values`.
    """
    grouped = split_heads(queries, keys.shape[-2])
    scores = jnp.einsum("blgmh,bpgh->bgmlp", grouped, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], soft_cap(scores, cap), MASKED), axis=-1)
    context = jnp.einsum("bgmlp,bpgh->blgmh", weights.astype(values.dtype), values)
    return checkpoint_name(context.reshape(queries.shape), ATTENTION)
