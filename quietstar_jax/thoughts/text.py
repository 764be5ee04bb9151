"""The text as the decoder reads it once, for sampling, scoring and the loss without thoughts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.models.decoder import Decoder, KeyValues, base_pass
from quietstar_jax.models.linear import cross_entropy

LOGITS_BYTES = 64 * 2**20  # of float32 logits of the text, at once


class Text(NamedTuple):
    """One base pass over B sequences of L tokens.

    Attributes:
      tokens: [B, L] int32; mask: [B, L] bool, True where real.
      hidden: [B, L, D] final-norm hidden states.
      prefix: keys and values [layers, B, L, G, H].
      nats: [B, L] float32, cross-entropy of x[j+1] given x[0..j]; 0 where x[j+1] is not real text.
    """

    tokens: jax.Array
    mask: jax.Array
    hidden: jax.Array
    prefix: KeyValues
    nats: jax.Array


def read_text(
    decoder: Decoder, tokens: jax.Array, mask: jax.Array, *, dtype: jnp.dtype, rematerialize: bool = False
) -> Text:
    """Runs the base pass and scores every next token without thoughts.

    Logits of more than `LOGITS_BYTES` never exist at once: rows are then scored in groups that fit, and recomputed in
    the backward pass.
    """
    hidden, prefix = base_pass(decoder, tokens, mask, dtype=dtype, rematerialize=rematerialize)
    batch, length = tokens.shape
    targets = tokens_ahead(tokens, jnp.arange(length), 1, fill=0)[..., 0]

    def next_token_nats(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(decoder.logits(hidden), targets)

    rows = max(1, LOGITS_BYTES // (4 * length * decoder.architecture.vocab_size))
    if rows >= batch:
        nats = next_token_nats(hidden, targets)
    else:
        score = jax.checkpoint(next_token_nats)
        nats = jax.lax.map(lambda row: score(*row), (hidden, targets), batch_size=rows)
    real = real_ahead(mask, jnp.arange(length), 1)[..., 0]
    return Text(tokens, mask, hidden, prefix, jnp.where(real, nats, 0.0))


def tokens_ahead(tokens: jax.Array, positions: jax.Array, count: int, *, fill: int) -> jax.Array:
    """x[j+1+k] for k < count: tokens [B, L], positions [J] -> [B, J, count]; `fill` past the end of the text."""
    index = positions[:, None] + 1 + jnp.arange(count)
    return tokens.at[:, index].get(mode="fill", fill_value=fill)


def real_ahead(mask: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """ok[j, k]: x[j+1+k] exists and is not padding. mask [B, L], positions [J] -> [B, J, count] bool."""
    index = positions[:, None] + 1 + jnp.arange(count)
    return mask.at[:, index].get(mode="fill", fill_value=False)


def here_and_ahead(values: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """values[j+k] for k < count: [B, L, ...], positions [J] -> [B, J, count, ...]; 0 past the end of the text."""
    index = positions[:, None] + jnp.arange(count)
    return values.at[:, index].get(mode="fill", fill_value=0)
