"""The inputs of a training step: a batch of token sequences, and the random numbers of its thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from quietstar_jax.parallel.axes import constrain
from quietstar_jax.parallel.sharding import shard_batch
from quietstar_jax.thoughts.controls import Uniforms, draw_uniforms
from quietstar_jax.thoughts.settings import ThoughtSettings


class Batch(NamedTuple):
    """A batch of token sequences.

    Attributes:
      tokens: [B, L] int32.
      mask: [B, L] bool, True for real tokens, False for padding.
      starts: [B, L] int32, for each token the index of the first token of its document; None if each row is one
        document, or if the documents of a row attend to each other.
    """

    tokens: jax.Array
    mask: jax.Array
    starts: jax.Array | None = None


class Draws(NamedTuple):
    """The random numbers of one step, uniform in [0, 1). A microbatch or a device uses the rows of its sequences.

    Attributes:
      thoughts: random numbers for thoughts at `ThoughtSettings.drawn_positions`.
      positions: [B, L], for choosing the positions that think.
    """

    thoughts: Uniforms
    positions: jax.Array


def draw(
    key: jax.Array, shape: tuple[int, ...], settings: ThoughtSettings, row_numbers: np.ndarray | None = None
) -> Draws:
    """Returns the random numbers of a step for tokens of shape [B, L].

    Args:
      row_numbers: [B], for each row the number of its sequence in the batch, which selects its draws; None = in order.
    """
    batch, length = shape
    places = settings.drawn_positions(length)
    thoughts = draw_uniforms(key, (batch, settings.num_thoughts, places, settings.thought_length))
    draws = Draws(thoughts, jax.random.uniform(jax.random.fold_in(key, 0), (batch, length)))
    if row_numbers is not None:
        draws = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim)[row_numbers], draws)
    return jax.tree.map(lambda x: constrain(x, "batch", ...), draws)


def to_device(rows: Mapping[str, np.ndarray]) -> Batch:
    """Moves a complete batch of the data pipeline to the device, or shards it over the mesh."""
    return Batch(**jax.tree.map(shard_batch, dict(rows)))
