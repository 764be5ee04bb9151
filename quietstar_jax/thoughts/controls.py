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
from quietstar_jax.thoughts.text import Text, here_and_ahead


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
    if control == "shuffled":
        real = here_and_ahead(text.mask, positions, 1)[:, None, :, 0]  # [B, 1, J]
        thoughts = jax.tree.map(lambda x: shuffle_positions(x, uniforms, real), thoughts)
    return thoughts


def random_tokens(uniforms: jax.Array, vocab_size: int, meta_tokens: tuple[int, ...]) -> jax.Array:
    """Uniform draws [...] from all tokens but the meta tokens, one for each uniform number."""
    allowed = jnp.array([token for token in range(vocab_size) if token not in meta_tokens], jnp.int32)
    return allowed[jnp.minimum((uniforms * allowed.size).astype(jnp.int32), allowed.size - 1)]


def shuffle_positions(values: jax.Array, uniforms: jax.Array, real: jax.Array) -> jax.Array:
    """Values [B, R, J, T] of other real positions of the same thought number, in an order drawn from the uniforms.

    Args:
      real: [B, 1, J] bool; positions that are no text keep what they have, and give it to no other.
    """
    order = jnp.argsort(jnp.where(real, uniforms[..., 0], 2.0), axis=-1)  # [B, R, J], real ones first
    number, count = jnp.arange(order.shape[-1]), real.sum(axis=-1, keepdims=True)
    before = jnp.where(number < count, (number - 1) % jnp.maximum(count, 1), number)
    # The one before in a random cycle: never the position itself, where there is another.
    other = jnp.take_along_axis(order, jnp.broadcast_to(before, order.shape), axis=-1)
    source = jnp.take_along_axis(other, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.take_along_axis(values, source[..., None], axis=2)


def _given(tokens: jax.Array) -> Thoughts:
    return Thoughts(tokens, jnp.zeros(tokens.shape, jnp.float32))
