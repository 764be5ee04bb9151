"""Which keys a token of a thought chain may attend to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ChainMask(NamedTuple):
    """The arrays that decide which keys a chain token sees.

    Attributes:
      mask: [B, P] bool, True where the text is real.
      positions: [J] int32, the j of each chain, or [B, J] where sequences differ.
      offsets: [C] int32, the c of each query token, or [B, 1, C] where sequences differ.
      window: scalar int32, keys that a query sees, itself included.
      first: [B, J] int32, the first token of the document of each chain; None = each row is one document.
    """

    mask: jax.Array
    positions: jax.Array
    offsets: jax.Array
    window: jax.Array
    first: jax.Array | None = None


def prefix_visible(seen: ChainMask, keys: jax.Array) -> jax.Array:
    """Returns which of the prefix keys with numbers `keys` [N] each chain token sees: [B, J, C, N] bool."""
    position = seen.positions[..., None, None]
    query = position + 1 + seen.offsets[..., None]
    visible = (keys <= position) & (query - keys < seen.window)
    if seen.first is not None:
        visible &= keys >= seen.first[..., None, None]
    return seen.mask[:, keys][:, None, None, :] & visible


def chain_visible(seen: ChainMask, length: int) -> jax.Array:
    """Returns which tokens of its own chain (of `length` tokens) each chain token sees: [.., C, length] bool, with the
    axes of `offsets`."""
    distance = seen.offsets[..., None] - jnp.arange(length)
    return (distance >= 0) & (distance < seen.window)
