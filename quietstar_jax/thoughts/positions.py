"""Which positions think: all of them, or a fraction, at a fraction of the cost.

| `thought.positions` | which of the positions whose K true tokens exist |
|---|---|
| `all` | every position of the text, as published |
| `stride` | every n-th, n = 1 / `position_fraction`, from an offset drawn anew for every sequence and step |
| `random` | drawn anew for every sequence and step |
| `entropy` | where the prediction without a thought is least certain: thoughts help at few tokens (paper section 5) |
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.chunks import PAST_THE_TEXT
from quietstar_jax.thoughts.objective import eligible_positions
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text

Choose = Callable[[Text], jax.Array]


def every_position(text: Text) -> jax.Array:
    """Positions [L]."""
    return jnp.arange(text.tokens.shape[1])


def choose(text: Text, draws: jax.Array, settings: ThoughtSettings) -> jax.Array:
    """The positions that think.

    Args:
      text: with its entropy where the choice is by entropy.
      draws: [B, L] float32 uniform in [0, 1), all randomness there is.

    Returns:
      [L], or [B, `settings.thinking_positions(L)`] in ascending order; `PAST_THE_TEXT` where a sequence has fewer
      positions to choose from.
    """
    how, length = settings.config.positions, text.tokens.shape[1]
    if how == "all":
        return every_position(text)
    rank = draws
    if how == "stride":
        stride = round(1 / settings.config.position_fraction)
        offset = (draws[:, :1] * stride).astype(jnp.int32)
        rank = -((jnp.arange(length) - offset) % stride).astype(jnp.float32)
    if how == "entropy":
        chex.assert_shape(text.entropy, draws.shape)
        rank = text.entropy  # type: ignore[assignment]  # not None, as just checked
    rank = jnp.where(eligible_positions(text.mask, settings.tokens_ahead), rank, -jnp.inf)
    best, positions = jax.lax.top_k(rank, settings.thinking_positions(length))
    return jnp.sort(jnp.where(jnp.isfinite(best), positions, PAST_THE_TEXT), axis=1)


def at_positions(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Values [B, R, L, ...] at positions [L], which are all of them, or [B, J] -> [B, R, J, ...]."""
    if positions.ndim == 1:
        return values
    index = jnp.minimum(positions, values.shape[2] - 1)[:, None, :]
    return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 3)), axis=2)
