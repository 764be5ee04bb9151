"""What thoughts are worth, by putting something else in their place: one setting, `thought.control`.

| control | what stands between start and end |
|---|---|
| `none` | the sampled thought |
| `pause` | the start token again and again: computation without content |
| `random` | tokens drawn uniformly from the vocabulary: content without sense |
| `shuffled` | the sampled thought of another position of the same text: sense in the wrong place |

They apply in training and in evaluation alike; all else stays as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import Thoughts, sample_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text


def think(
    model: QuietStar, text: Text, positions: jax.Array, uniforms: jax.Array, settings: ThoughtSettings,
    positions_per_chunk: int, *, greedy: bool = False,
) -> Thoughts:  # fmt: skip
    """The thoughts at J positions of the text, or what the control puts in their place.

    Args:
      positions: [J] or [B, J], see `positions.choose`.
      uniforms: [B, R, J, T] float32 in [0, 1), all randomness there is; greedy: take the likeliest tokens.
    """
    control = settings.config.control
    if control == "pause":
        return _given(jnp.full(uniforms.shape, settings.pause_id, jnp.int32))
    if control == "random":
        return _given(random_tokens(uniforms, model.decoder.architecture.vocab_size, settings.meta_tokens))
    thoughts = sample_thoughts(model, text, positions, None if greedy else uniforms, settings, positions_per_chunk)
    return jax.tree.map(lambda x: shuffle_positions(x, uniforms), thoughts) if control == "shuffled" else thoughts


def random_tokens(uniforms: jax.Array, vocab_size: int, meta_tokens: tuple[int, ...]) -> jax.Array:
    """Uniform draws [...] from all tokens but the meta tokens, one for each uniform number."""
    allowed = jnp.array([token for token in range(vocab_size) if token not in meta_tokens], jnp.int32)
    return allowed[jnp.minimum((uniforms * allowed.size).astype(jnp.int32), allowed.size - 1)]


def shuffle_positions(values: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Values [B, R, J, T] of other positions of the same thought number, in an order drawn from the uniforms."""
    order = jnp.argsort(uniforms[..., 0], axis=-1)  # [B, R, J]
    other = jnp.roll(order, 1, axis=-1)  # the one before in a random cycle: never the position itself
    source = jnp.take_along_axis(other, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.take_along_axis(values, source[..., None], axis=2)


def _given(tokens: jax.Array) -> Thoughts:
    return Thoughts(tokens, jnp.zeros(tokens.shape, jnp.float32))
