"""Predictions that mix those after the thoughts of the last N positions, so that a thought serves N next tokens.

A thought before a number can contain all its digits. Training scores the K tokens after it; with a reach of N <= K,
evaluation uses it for N of them. With N = 3, the prediction of x[j+1] is

    p_0 = p(x[j+1] | text)
    p_1 = (1 - w_2) p_0 + w_2 p(x[j+1] | text up to j - 2, its thought, x[j-1], x[j])     k = 2
    p_2 = (1 - w_1) p_1 + w_1 p(x[j+1] | text up to j - 1, its thought, x[j])             k = 1
    p_3 = (1 - w_0) p_2 + w_0 p(x[j+1] | text up to j, its thought)                       k = 0, the usual thought

Each weight is that of the mixing head for the hidden states of the text at x[j] and of the chain at the same token, as
in training; 0 where x[j-k] does not exist or belongs to another document. No chain is longer or computed twice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quietstar_jax.methods.mixings import mix_probabilities
from quietstar_jax.thoughts.chunks import take_places
from quietstar_jax.thoughts.mixing import mixing_weight
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.text import Text, real_ahead


def widened(positions: jax.Array, reach: int) -> jax.Array:
    """Returns consecutive positions [J] and the N - 1 before them, [J + N - 1]; some may be negative.

    A reach of 1 adds none, and the positions need not be consecutive.
    """
    return positions if reach == 1 else positions[0] - (reach - 1) + jnp.arange(positions.size + reach - 1)


def exists(text: Text, positions: jax.Array) -> jax.Array:
    """Returns whether positions [J] are of the text and not padding, [B, J] bool."""
    length = text.mask.shape[1]
    return (positions >= 0) & jnp.take(text.mask, jnp.clip(positions, 0, length - 1), axis=1)


def usable(text: Text, positions: jax.Array, reach: int) -> jax.Array:
    """Returns whether the thought of a position may be used for x[j+1+k], k < N: positions [J] -> [B, J, N] bool."""
    return exists(text, positions)[..., None] & real_ahead(text.mask, positions, reach, text.starts)


def by_token(values: jax.Array, reach: int) -> jax.Array:
    """Values [.., J + N - 1, N] of thoughts, by tokens ahead -> [.., J, N] of tokens, by age of the thought.

    Entry [j, k] of the result is that of the k-th token after the thought at j - k. The position axis is axis 2.
    """
    count = values.shape[2] - (reach - 1)
    parts = [jax.lax.dynamic_slice_in_dim(values[..., k], reach - 1 - k, count, axis=2) for k in range(reach)]
    return jnp.stack(parts, axis=3)


def hidden_by_token(hidden: jax.Array, slots: jax.Array) -> jax.Array:
    """Gathers hidden states [B, R, S, N, D], by thought and tokens ahead, into [B, R, J, N, D], by token and age.

    Args:
      slots: [B, J, N] int32, which thought is that of each age.
    """
    parts = [take_places(hidden[:, :, :, k], slots[..., k]) for k in range(slots.shape[-1])]
    return jnp.stack(parts, axis=3)


def mixed_over_thoughts(
    model: QuietStar, base_hidden: jax.Array, talk_hidden: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes the predictions of one token after N thoughts, the oldest first.

    Args:
      base_hidden: [B, J, D] of the text; talk_hidden: [B, R, J, N, D] after thoughts, by age.
      used: [B, R, J, N] bool; where False, the prediction after that thought has the weight 0.

    Returns:
      (log-probabilities [B, R, J, V], share of the predictions after thoughts, 1 - (1 - w_0) .. (1 - w_{N-1})).
    """
    weights = mixing_weight(model.mixing_head, base_hidden[:, :, None], talk_hidden)
    mixed = jax.nn.log_softmax(model.decoder.logits(base_hidden))[:, None]
    rest = jnp.ones(weights.shape[:-1])
    for k in reversed(range(talk_hidden.shape[3])):
        after = jax.nn.log_softmax(model.decoder.logits(talk_hidden[..., k, :]))
        found, weight = mix_probabilities(mixed, after, weights[..., k])
        mixed = jnp.where(used[..., k, None], found, mixed)
        rest *= jnp.where(used[..., k], 1.0 - weight, 1.0)
    return mixed, 1.0 - rest
