"""Thought chains through the decoder: what a token of a thought may see, in parallel and one step at a time.

Chain (j, r) is `start, t_1 .. t_T, end, x[j+1] .. x[j+K-1]` at rotary positions j+1, j+2, ... Its token c sees the
base keys 0 .. j that are real text, and tokens 0 .. c of its own chain; never another chain.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quietstar_jax.models.attention import attend_prefix_and_own
from quietstar_jax.models.decoder import Decoder, KeyValues, run_layers


def prefix_visible(mask: jax.Array, positions: jax.Array, offsets: jax.Array, window: jax.Array) -> jax.Array:
    """Which base key a chain token sees.

    Args:
      mask: [B, P] bool; positions: [J] the j of each chain; offsets: [C] the c of each token; window: scalar.

    Returns:
      [B, J, C, P] bool.
    """
    key = jnp.arange(mask.shape[1])
    query = positions[:, None, None] + 1 + offsets[None, :, None]
    seen = (key <= positions[:, None, None]) & (query - key < window)
    return mask[:, None, None, :] & seen[None]


def own_visible(offsets: jax.Array, length: int, window: jax.Array) -> jax.Array:
    """Which token of its own chain (of `length` tokens) a chain token sees: [C, length] bool."""
    distance = offsets[:, None] - jnp.arange(length)[None, :]
    return (distance >= 0) & (distance < window)


def chain_pass(
    decoder: Decoder, embeddings: jax.Array, positions: jax.Array, prefix: KeyValues, mask: jax.Array, *,
    rematerialize: bool = False,
) -> jax.Array:  # fmt: skip
    """All tokens of all chains of J positions at once.

    Args:
      embeddings: [B, R, J, C, D]; positions: [J]; prefix: [layers, B, P, G, H]; mask: [B, P] bool.

    Returns:
      final-norm hidden states [B, R, J, C, D].
    """
    offsets = jnp.arange(embeddings.shape[3])

    def attend_chain(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, base: KeyValues) -> Any:
        seen = prefix_visible(mask, positions, offsets, window)
        own = own_visible(offsets, offsets.size, window)
        return attend_prefix_and_own(q, base.keys, base.values, seen, k, v, own), None

    rotary = positions[:, None] + 1 + offsets
    return run_layers(decoder, embeddings, rotary, attend_chain, prefix, rematerialize=rematerialize)[0]


def empty_chains(decoder: Decoder, batch: int, count: int, positions: int, length: int, dtype: jnp.dtype) -> KeyValues:
    """Keys and values [layers, B, R, J, length, G, H] of chains that have not begun."""
    a = decoder.architecture
    shape = (a.num_layers, batch, count, positions, length, a.num_kv_heads, a.head_dim)
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def chain_step(
    decoder: Decoder, embeddings: jax.Array, offset: jax.Array, positions: jax.Array, prefix: KeyValues,
    mask: jax.Array, own: KeyValues,
) -> tuple[jax.Array, KeyValues]:  # fmt: skip
    """The next token of every chain.

    Args:
      embeddings: [B, R, J, D]; offset: scalar c of these tokens; positions: [J]; prefix, mask: as in `chain_pass`;
        own: keys and values of tokens 0 .. c - 1.

    Returns:
      (final-norm hidden states [B, R, J, D], own with token c written).
    """

    def attend_step(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, state: Any) -> Any:
        base, written = state
        written = KeyValues(
            jax.lax.dynamic_update_slice_in_dim(written.keys, k, offset, axis=3),
            jax.lax.dynamic_update_slice_in_dim(written.values, v, offset, axis=3),
        )
        seen = prefix_visible(mask, positions, offset[None], window)
        own_seen = own_visible(offset[None], written.keys.shape[3], window)
        return attend_prefix_and_own(q, base.keys, base.values, seen, *written, own_seen), written

    rotary = positions[:, None] + 1 + offset
    hidden, own = run_layers(decoder, embeddings[..., None, :], rotary, attend_step, (prefix, own))
    return hidden[..., 0, :], own
