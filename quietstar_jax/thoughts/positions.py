"""Chooses the positions that think: all, or some of each text at a fraction of the cost.

Except for `all`, the choice is among positions whose K true tokens are real.

| `thought.positions` | positions that think |
|---|---|
| `all` | every position of the text, as published |
| `stride` | every n-th, n = 1 / `position_fraction`, from a random offset per sequence and step |
| `random` | a random choice per sequence and step; `position_pattern` can make some of them likelier |
| `entropy` | where the prediction without a thought is least certain: thoughts help at few tokens (paper section 5) |
| `start` | a random choice by the probability of the start token: where the text itself would begin a thought |

The last three choose the fraction `position_fraction` of each sequence, or `positions_per_sequence` positions.

Training chooses a fixed number of positions, so that its shapes do not depend on the text. Evaluation and generation
decide at each position by itself; the similar policies of `methods/thinking.py` are `always`, `every`, `random`,
`entropy` and `start`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.chunks import PAST_THE_TEXT, take_places
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, real_ahead

Choose = Callable[[Text], jax.Array]


def every_position(text: Text) -> jax.Array:
    """Returns positions [L], all of them."""
    return jnp.arange(text.tokens.shape[1])


def ranked_by(settings: ThoughtSettings) -> dict[str, Any]:
    """Returns the arguments of `read_text` that request what the choice of positions needs."""
    how = settings.config.positions
    return {"with_entropy": how == "entropy", "start_token": settings.start_token if how == "start" else None}


def choose(text: Text, draws: jax.Array, settings: ThoughtSettings) -> jax.Array:
    """Returns the positions that think.

    Args:
      text: read with the arguments from `ranked_by`.
      draws: [B, L] float32 uniform in [0, 1), the only randomness.

    Returns:
      [L], or [B, `settings.thinking_positions(L)`] in ascending order, filled with `PAST_THE_TEXT` where a sequence has
      fewer positions to choose from.
    """
    how, at_most = settings.config.positions, settings.thinking_positions(text.tokens.shape[1])
    if how == "all":
        return every_position(text)
    rank = draws
    if how == "entropy":
        chex.assert_shape(text.entropy, draws.shape)
        rank = text.entropy  # type: ignore[assignment]  # not None, as just checked
    elif how == "start":
        rank = weighted(draws, jnp.exp(text.start_log_prob))  # type: ignore[arg-type]  # requested, as `entropy` is
    elif settings.preferred_tokens:
        # `roll` makes the first token the successor of the last position, which is never a candidate.
        wanted = jnp.isin(jnp.roll(text.tokens, -1, axis=1), jnp.array(settings.preferred_tokens))
        rank = weighted(draws, jnp.where(wanted, settings.config.position_weight, 1.0))
    of_text = text.tokens, text.mask, draws, settings, text.starts
    _, positions = jax.lax.top_k(jnp.where(candidates(*of_text), rank, -jnp.inf), at_most)
    taken = jnp.arange(at_most) < count_chosen(*of_text)[:, None]
    return jnp.sort(jnp.where(taken, positions, PAST_THE_TEXT), axis=1)


def weighted(draws: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns ranks [B, L] whose largest are a choice without replacement by weight (Efraimidis and Spirakis, 2006).

    Args:
      draws: [B, L] uniform in [0, 1); weight: [B, L], at least 0; weights below 1e-9 count as 1e-9.
    """
    return jnp.log(jnp.maximum(draws, 1e-9)) / jnp.maximum(weight, 1e-9)


def count_chosen(
    tokens: jax.Array, mask: jax.Array, draws: jax.Array, settings: ThoughtSettings, starts: jax.Array | None = None
) -> jax.Array:
    """Returns how many positions of each sequence `choose` returns, int32 [B]; does not depend on the base pass."""
    count = candidates(tokens, mask, draws, settings, starts).sum(axis=1)
    if settings.config.positions == "stride":
        return count
    if settings.config.positions_per_sequence:
        return jnp.minimum(count, settings.thinking_positions(mask.shape[1]))
    chosen = jnp.ceil(settings.config.position_fraction * count.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    return jnp.minimum(chosen, settings.thinking_positions(mask.shape[1]))


def candidates(
    tokens: jax.Array, mask: jax.Array, draws: jax.Array, settings: ThoughtSettings, starts: jax.Array | None = None
) -> jax.Array:
    """Returns which positions j may be chosen, bool [B, L]: x[j+1] .. x[j+K] are real text of the document of x[j], and
    j has a reward.

    For `start`, the document must not contain the start token: such a document has its thoughts written out, and what
    follows them needs no thought.
    """
    length, ahead = mask.shape[1], settings.tokens_ahead
    real = real_ahead(mask, jnp.arange(length), ahead, starts).all(axis=-1)
    real &= jnp.arange(length) <= length - 2 - ahead
    if settings.config.positions == "stride":
        stride = round(1 / settings.config.position_fraction)
        offset = (draws[:, :1] * stride).astype(jnp.int32)
        real &= (jnp.arange(length) - offset) % stride == 0
    if settings.config.positions == "start":
        first = jnp.zeros_like(tokens) if starts is None else starts  # names the document of each token
        rows = jnp.arange(len(tokens))[:, None]
        written = jnp.zeros(tokens.shape, bool).at[rows, first].max(mask & (tokens == settings.start_token))
        real &= ~written[rows, first]
    return real


def at_positions(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns values [B, R, L, ...] at positions [B, J], as [B, R, J, ...]; unchanged for all positions [L]."""
    if positions.ndim == 1:
        return values
    return take_places(values, jnp.minimum(positions, values.shape[2] - 1))
