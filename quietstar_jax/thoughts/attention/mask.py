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


def chain_mask(seen: ChainMask, length: int) -> ChainMask:
    """Returns the mask of a chain's attention to itself, of `length` tokens, in the form of a prefix mask.

    A chain attends to itself as a text does: each of its C tokens is the position of one query, which sees the keys up
    to its own.

    Returns:
      A mask with J = C positions and one query token each: mask [B, length], positions [C] or [B, C], offsets [1].
    """
    positions = seen.offsets if seen.offsets.ndim == 1 else seen.offsets[:, 0]
    # The query of position c is token c itself, not a token after it, hence the offset -1.
    return ChainMask(jnp.ones((seen.mask.shape[0], length), bool), positions, jnp.array([-1]), seen.window)
