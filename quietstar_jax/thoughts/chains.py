"""Runs thought chains through the decoder, all tokens in parallel or one step at a time.

Chain (j, r) is `start, t_1 .. t_T, end, x[j+1] .. x[j+K-1]` at rotary positions j+1, j+2, ... Its token c sees the
base keys 0 .. j that are real text of the document of token j, and tokens 0 .. c of its own chain; never another chain.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.decoder import Decoder, KeyValues, LayerWeights, run_layers
from quietstar_jax.thoughts.attention.chain_attention import attend_chains, attend_step, to_chain_layout
from quietstar_jax.thoughts.attention.mask import ChainMask
from quietstar_jax.thoughts.text import here_and_ahead


def chain_pass(
    decoder: Decoder, embeddings: jax.Array, positions: jax.Array, prefix: KeyValues, mask: jax.Array,
    starts: jax.Array | None = None, *, rematerialize: bool = False, prefix_attention: str = "auto",
) -> tuple[jax.Array, LayerWeights]:  # fmt: skip
    """Runs all tokens of the chains of J positions in parallel.

    Args:
      embeddings: [B, R, J, C, D]; positions: [J] or [B, J]; prefix: [layers, B, P, G, H]; mask: [B, P] bool.
      starts: [B, P] int32, for each token the first token of its document; None = each row is one document.
      rematerialize, prefix_attention: as in `ModelConfig`.

    Returns:
      (final-norm hidden states [B, R, J, C, D], layers as from `run_layers`).
    """
    offsets, first, cap = jnp.arange(embeddings.shape[3]), _first(starts, positions), decoder.architecture.score_cap

    def attend_chain(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, base: KeyValues) -> Any:
        chain_kv, seen = (to_chain_layout(k), to_chain_layout(v)), ChainMask(mask, positions, offsets, window, first)
        return attend_chains(q, base.keys, base.values, *chain_kv, seen, prefix_attention, cap), None

    rotary = positions[..., None, :, None] + 1 + offsets
    hidden, _, layers = run_layers(decoder, embeddings, rotary, attend_chain, prefix, rematerialize=rematerialize)
    return hidden, layers


def _first(starts: jax.Array | None, positions: jax.Array) -> jax.Array | None:
    """Returns the first token of the document of each chain, [B, J]."""
    return None if starts is None else here_and_ahead(starts, positions, 1)[..., 0]


def empty_chains(
    a: Architecture, batch: int, count: int, positions: int, length: int, dtype: jnp.dtype,
    place: jax.sharding.Sharding | None = None,
) -> KeyValues:  # fmt: skip
    """Returns zero keys and values [layers, B, G, R, J, length, H], for chains without tokens."""
    shape = (a.num_layers, batch, a.num_kv_heads, count, positions, length, a.head_dim)
    return KeyValues(jnp.zeros(shape, dtype, device=place), jnp.zeros(shape, dtype, device=place))


def chain_step(
    decoder: Decoder, embeddings: jax.Array, offset: jax.Array, positions: jax.Array, prefix: KeyValues,
    mask: jax.Array, chain_kv: KeyValues, starts: jax.Array | None = None, *, prefix_attention: str = "auto",
) -> tuple[jax.Array, KeyValues]:  # fmt: skip
    """Runs one token of every chain.

    Args:
      embeddings: [B, R, J, D]; offset: scalar c of these tokens; positions, prefix, mask, starts, prefix_attention: as
        in `chain_pass`; chain_kv: keys and values of tokens 0 .. c - 1.

    Returns:
      (final-norm hidden states [B, R, J, D], chain_kv with token c written).
    """

    first, cap = _first(starts, positions), decoder.architecture.score_cap

    def attend_token(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, state: Any) -> Any:
        (base, layer), new = state, KeyValues(to_chain_layout(k), to_chain_layout(v))
        seen = ChainMask(mask, positions, offset[None], window, first)
        return attend_step(q, base.keys, base.values, *chain_kv, layer, *new, seen, prefix_attention, cap), new

    rotary, layers = positions[..., None, :, None] + 1 + offset, jnp.arange(decoder.architecture.num_layers)
    hidden, new, _ = run_layers(decoder, embeddings[..., None, :], rotary, attend_token, (prefix, layers))
    # One write for all layers, after they have run: in a loop over tokens, XLA updates the array in place.
    written = (
        jax.lax.dynamic_update_slice_in_dim(x, token, offset, axis=5) for x, token in zip(chain_kv, new, strict=True)
    )
    return hidden[..., 0, :], KeyValues(*written)
