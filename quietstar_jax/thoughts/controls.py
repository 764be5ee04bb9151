"""Controls: replacements for thoughts that measure what thoughts contribute. One setting, `thought.control`.

| control | tokens between start and end |
|---|---|
| `none` | the sampled thought |
| `pause` | the first token of `thought.initial_start_token`, repeated: computation without content |
| `random` | tokens drawn uniformly from the vocabulary: content without meaning |
| `shuffled` | the sampled thought of an earlier position of the same document: meaning in the wrong place |

Where the model samples the end of thoughts, `random` has the length of the thought that it replaces, `shuffled` that of
the earlier thought, and `pause` is refused if a head decides: nothing would train it.

Controls apply both in training and in evaluation; everything else is unchanged. No control depends on a later token: a
thought of a later position would have seen the tokens that are predicted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.chunks import PAST_THE_TEXT, Packed
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.positions import at_positions
from quietstar_jax.thoughts.sample import Thoughts, sample_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, here_and_ahead


class Uniforms(NamedTuple):
    """All randomness of the thoughts at J positions, float32 uniform in [0, 1).

    Attributes:
      tokens: [B, R, J, T], one number for each thought token.
      places: [B, R, J], independent of `tokens`: selects the earlier position whose thought `shuffled` uses.
    """

    tokens: jax.Array
    places: jax.Array


def draw_uniforms(key: jax.Array, shape: tuple[int, int, int, int]) -> Uniforms:
    """Draws `Uniforms` for thoughts of shape [B, R, J, T]."""
    return Uniforms(jax.random.uniform(key, shape), jax.random.uniform(jax.random.fold_in(key, 1), shape[:-1]))


def sample_or_control(
    model: QuietStar, text: Text, positions: jax.Array | Packed, uniforms: Uniforms, settings: ThoughtSettings,
    positions_per_chunk: int, *, greedy: bool = False,
) -> Thoughts:  # fmt: skip
    """Returns the thoughts at J positions of the text, or their replacement under the control.

    Args:
      positions: [J], or [B, J], see `positions.choose`. `shuffled` uses thoughts of these positions only, and refuses
        packed ones, for which `sample_earlier` is.
      greedy: use the most likely tokens instead of drawn ones.
    """
    control, replacement = settings.config.control, None
    if control == "pause":
        replacement = _uniform_thoughts(jnp.full(uniforms.tokens.shape, settings.pause_id, jnp.int32), 1)
    if control == "random":
        vocab_size = model.decoder.architecture.vocab_size
        drawn = random_tokens(uniforms.tokens, vocab_size, settings.meta_tokens)
        replacement = _uniform_thoughts(drawn, vocab_size - len(set(settings.meta_tokens)))
    if replacement is not None and not settings.samples_end:
        return replacement
    tokens = None if greedy else uniforms.tokens
    thoughts = sample_thoughts(model, text, positions, tokens, settings, positions_per_chunk)
    if replacement is not None:  # with the lengths, and the figures of the ends, of the sampled thoughts
        return jax.tree.map(lambda new, x: jnp.where(thoughts.tokens >= 0, new, x), replacement, thoughts)
    if control == "shuffled":
        assert not isinstance(positions, Packed)
        mask, starts = jax.tree.map(lambda x: here_and_ahead(x, positions, 1)[..., 0], (text.mask, text.starts))
        source = earlier_places(uniforms.places, mask, starts)
        thoughts = jax.tree.map(lambda x: jnp.take_along_axis(x, source[..., None], axis=2), thoughts)
    return thoughts


def sample_earlier(
    model: QuietStar, text: Text, positions: jax.Array | Packed, uniforms: Uniforms, settings: ThoughtSettings,
    positions_per_chunk: int, *, greedy: bool = False,
) -> Thoughts:  # fmt: skip
    """Returns the thoughts of `shuffled` at J positions, drawn from all earlier positions of the text.

    Only the thoughts that are used are sampled, each at the position that it comes from. These positions differ between
    the R thoughts, so R thoughts at J positions are sampled as one thought at each of R J positions.

    Args:
      positions: [J], the same for every text, or packed ones; uniforms: at all L positions; others as in
        `sample_or_control`.
    """
    source = earlier_places(uniforms.places, text.mask, text.starts)
    places = at_places(source, positions)
    draws = jnp.take_along_axis(uniforms.tokens, places[..., None], axis=2)
    if isinstance(positions, Packed):
        places = jnp.where(positions.positions[:, None] == PAST_THE_TEXT, PAST_THE_TEXT, places)
    batch, count, number = places.shape

    def flat(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 1, 2).reshape(batch, 1, number * count, *x.shape[3:])

    def unflat(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, number, count, *x.shape[3:]), 2, 1)

    where: Any = flat(places)[:, 0]
    if isinstance(positions, Packed):  # those that are not chosen stay last, and nothing is put back in this order
        where = Packed(where, jnp.broadcast_to(jnp.arange(number * count), where.shape))
    tokens, one = None if greedy else flat(draws), dataclasses.replace(settings, num_thoughts=1)
    return jax.tree.map(unflat, sample_thoughts(model, text, where, tokens, one, count * positions_per_chunk))


def at_places(values: jax.Array, positions: jax.Array | Packed) -> jax.Array:
    """Returns values [B, R, L, ...] at positions [J], or at packed ones [B, J]."""
    if isinstance(positions, Packed):
        return at_positions(values, positions.positions)
    return jnp.take(values, positions, axis=2, mode="clip")


def random_tokens(uniforms: jax.Array, vocab_size: int, meta_tokens: tuple[int, ...]) -> jax.Array:
    """Returns uniform draws [...] from all tokens except the meta tokens, one for each uniform number."""
    allowed = jnp.array(sorted(set(range(vocab_size)).difference(meta_tokens)), jnp.int32)
    return allowed[jnp.minimum((uniforms * allowed.size).astype(jnp.int32), allowed.size - 1)]


def earlier_places(uniforms: jax.Array, real: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Returns, for each of J places in ascending order of position, an earlier place of its document, uniformly drawn.

    The first real place of a document has no earlier one and keeps its own, as do places that are not real text.

    Args:
      uniforms: [B, R, J]; real: [B, J] bool, the position is text; starts: [B, J] as in `Text`.

    Returns:
      [B, R, J] int32 place numbers.
    """
    count = real.astype(jnp.int32)
    before = jnp.cumsum(count, axis=1) - count  # number of real places before each, [B, J] ...
    skipped = jnp.zeros_like(before)  # ... and of those among them in other documents
    if starts is not None:
        begins = jnp.pad(starts[:, 1:] != starts[:, :-1], ((0, 0), (1, 0)))
        skipped = jax.lax.cummax(jnp.where(begins, before, 0), axis=1)
    before, skipped = (before - skipped)[:, None], skipped[:, None]
    # The product may round up to `before`.
    number = jnp.minimum((uniforms * before.astype(jnp.float32)).astype(jnp.int32), before - 1)
    real_first = jnp.broadcast_to(jnp.argsort(~real, axis=1, stable=True)[:, None], uniforms.shape)
    source = jnp.take_along_axis(real_first, skipped + jnp.maximum(number, 0), axis=2)
    return jnp.where(real[:, None] & (before > 0), source, jnp.arange(real.shape[1]))


def _uniform_thoughts(tokens: jax.Array, choices: int) -> Thoughts:
    """Thoughts that no model sampled: each token is one of equally likely choices."""
    entropy = jnp.full(tokens.shape, math.log(choices))
    return Thoughts(tokens, entropy, -entropy)
