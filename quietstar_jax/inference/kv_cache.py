"""The cache of keys and values of the text, and the decoder over a few new tokens of every sequence.

The tokens of a pass are a chain (see `thoughts/chains.py`) rooted at the last token of the cache: the newest token of
the text, then the thought after it. Training and generation therefore share one attention mask. Sequences may differ in
length; the cost of attention depends on the longest sequence, not on the length of the cache.

Axis letters as in `thoughts/attention/chain_attention.py`; here R = J = 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.decoder import Decoder, KeyValues, run_layers
from quietstar_jax.thoughts.attention.chain_attention import attend_cache, to_chain_layout
from quietstar_jax.thoughts.attention.mask import ChainMask
from quietstar_jax.thoughts.attention.prefix_xla import key_block


def empty_cache(
    architecture: Architecture, batch: int, length: int, dtype: jnp.dtype, place: jax.sharding.Sharding
) -> KeyValues:
    """Returns an empty cache for `length` tokens of each sequence: keys and values [layers, B, G, length, H]."""
    a = architecture
    shape = (a.num_layers, batch, a.num_kv_heads, length, a.head_dim)
    return KeyValues(jnp.zeros(shape, dtype, device=place), jnp.zeros(shape, dtype, device=place))


def cached_pass(
    decoder: Decoder,
    embeddings: jax.Array,
    offset: jax.Array,
    positions: jax.Array,
    cache: KeyValues,
    chain_kv: KeyValues,
) -> tuple[jax.Array, KeyValues]:
    """Runs the decoder over the next C tokens of the chain that follows the cache.

    Args:
      embeddings: [B, C, D]; offset: scalar, how many tokens of the chain came before, or [B] if C is 1; positions: [B],
        of the last cached token that each sequence attends to, -1 = none; chain_kv: keys and values from
        `empty_chains`.

    Returns:
      (final-norm hidden states [B, C, D], chain_kv with these tokens written).
    """
    offsets = (offset[:, None, None] if offset.ndim else offset) + jnp.arange(embeddings.shape[1])
    mask = jnp.ones((embeddings.shape[0], cache.keys.shape[3]), bool)  # every key up to the position is real text

    def write(chain: jax.Array, new: jax.Array) -> jax.Array:
        new = to_chain_layout(new)  # [B, G, 1, 1, C, H]
        if not offset.ndim:
            return jax.lax.dynamic_update_slice_in_dim(chain, new, offset, axis=4)
        return jnp.where(jnp.arange(chain.shape[4])[:, None] == offset.reshape(-1, 1, 1, 1, 1, 1), new, chain)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, state: Any) -> Any:
        layer, written = state
        written = KeyValues(write(written.keys, k), write(written.values, v))
        seen = ChainMask(mask, positions[:, None], offsets, window)
        return attend_cache(q, *cache, layer, *written, seen, key_block(), decoder.architecture.score_cap), written

    rotary = positions[:, None, None, None] + 1 + (offsets[:, None] if offset.ndim else offsets)  # [B, 1, 1, C]
    # The last term is always 0, but no constant for the compiler, which could otherwise copy a layer out of the cache.
    layers = jnp.arange(decoder.architecture.num_layers) + jnp.minimum(positions.min() + 1, 0)
    hidden, chain_kv, _ = run_layers(decoder, embeddings[:, None, None], rotary, attend, (layers, chain_kv))
    return hidden[:, 0, 0], chain_kv


def append(cache: KeyValues, chain_kv: KeyValues, positions: jax.Array) -> KeyValues:
    """Returns the cache with the first token of each chain written after its position [B]."""
    rows = jnp.arange(positions.size)

    def write(cached: jax.Array, chain: jax.Array) -> jax.Array:
        token = chain[:, :, :, 0, 0, 0].swapaxes(0, 1)  # [B, layers, G, H]
        return cached.at[:, rows, :, positions + 1].set(token)

    return KeyValues(write(cache.keys, chain_kv.keys), write(cache.values, chain_kv.values))
