"""Think: samples thoughts at all positions in parallel, without gradients (paper section 4.2).

Where the model samples the end of a thought (see `ending`), sampling stops when all thoughts of a chunk have ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.models.linear import cross_entropy
from quietstar_jax.parallel.axes import constrain, on_all_devices
from quietstar_jax.thoughts.chains import chain_step, empty_chains
from quietstar_jax.thoughts.chunks import PAST_THE_TEXT, Packed, map_chunks
from quietstar_jax.thoughts.ending import ENDED, action_entropy, draw_end, end_logits
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, entropy


class Thoughts(NamedTuple):
    """Sampled thoughts of J positions.

    Attributes:
      tokens: [B, R, J, T] int32; `ending.ENDED` after the end of a thought of fewer tokens. The other fields then have
        an entry for the end too, and are 0 after it.
      entropy: [B, R, J, T] float32 nats, of the distribution that each token was drawn from.
      log_probs: [B, R, J, T] float32, log-probability of each token under that distribution; None if not known.
      reference_log_probs: [B, R, J, T] float32, log-probability of each token under the reference model at the
        temperature of scoring; None without a reference.
    """

    tokens: jax.Array
    entropy: jax.Array
    log_probs: jax.Array | None = None
    reference_log_probs: jax.Array | None = None


def sample_thoughts(
    model: QuietStar, text: Text, positions: jax.Array | Packed, uniforms: jax.Array | None, settings: ThoughtSettings,
    positions_per_chunk: int,
) -> Thoughts:  # fmt: skip
    """Returns thoughts at J positions of the text.

    Randomness is data: with one uniform number per thought token, the thoughts do not depend on the chunks of
    positions, the microbatches, or the sharding of arrays.

    Args:
      positions: [J], or [B, J] where sequences differ; of packed ones, only those that are chosen get thoughts.
      uniforms: [B, R, J, T] float32 in [0, 1); None = greedy thoughts.
    """
    model, text = jax.lax.stop_gradient((model, text))

    def chunk(read: tuple[QuietStar, Text], positions: jax.Array, draws: jax.Array | None) -> Thoughts:
        return _sample_chunk(*read, positions, draws, settings)

    thoughts = map_chunks(chunk, (model, text), positions, positions_per_chunk, uniforms, axis=2)
    return jax.tree.map(lambda x: constrain(x, "batch", None, "keys", "chain"), thoughts)


def _sample_chunk(
    model: QuietStar, text: Text, positions: jax.Array, uniforms: jax.Array | None, settings: ThoughtSettings
) -> Thoughts:
    batch, count, length = text.tokens.shape[0], settings.num_thoughts, settings.thought_length
    start, _ = model.start_and_end(settings)
    shape = (batch, count, positions.shape[-1], start.size)
    chain_kv = empty_chains(model.decoder.architecture, *shape[:3], length, settings.dtype)

    def step(carry, inputs):
        embeddings, chain_kv = carry
        offset, draws = inputs
        hidden, chain_kv = chain_step(
            model.decoder, embeddings, offset, positions, text.prefix, text.mask, chain_kv, text.starts,
            prefix_attention=settings.prefix_attention,
        )  # fmt: skip
        unmasked = model.decoder.logits(hidden)
        allowed = mask_meta_tokens(unmasked, settings.meta_tokens)
        logits = constrain(allowed / settings.config.sampling_temperature, "batch", ..., None)  # whole where drawn from
        if settings.samples_end:
            end = end_logits(model.end_head, hidden, unmasked, allowed, settings.end_token)
            end = end / settings.config.sampling_temperature
            ends, draws = draw_end(end, draws)
        tokens = jnp.argmax(logits, axis=-1) if draws is None else draw_tokens(logits, draws)
        following = model.decoder.embed(tokens, settings.dtype)
        spread, log_probs = entropy(logits), -cross_entropy(logits, tokens)
        if settings.samples_end:
            tokens, spread = jnp.where(ends, ENDED, tokens).astype(jnp.int32), action_entropy(spread, end)
            log_probs = jnp.where(ends, jax.nn.log_sigmoid(end), log_probs + jax.nn.log_sigmoid(-end))
        return (following, chain_kv), Thoughts(tokens, spread, log_probs)

    first = jnp.broadcast_to(start, shape), chain_kv
    draws = None if uniforms is None else jnp.moveaxis(uniforms, -1, 0)
    if settings.samples_end:
        ended = jnp.broadcast_to(positions[..., None, :] == PAST_THE_TEXT, shape[:3])
        thoughts = _until_all_end(step, first, draws, ended, length)
    else:
        _, thoughts = jax.lax.scan(step, first, (jnp.arange(length), draws))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), thoughts)


def _until_all_end(step: Any, first: Any, draws: jax.Array | None, ended: jax.Array, length: int) -> Thoughts:
    """Runs up to T steps, as `jax.lax.scan` would, and stops when all thoughts have ended; returns arrays [T, ...].

    Args:
      draws: [T, B, R, J]; ended: [B, R, J] bool, thoughts without any token, whose results are not used.
    """
    zeros = jnp.zeros((length, *ended.shape), jnp.float32)
    nothing = Thoughts(jnp.full(zeros.shape, ENDED, jnp.int32), zeros, zeros)

    def body(carry: tuple) -> tuple:
        i, _, ended, state, thoughts = carry
        state, new = step(state, (i, None if draws is None else draws[i]))
        here = jax.tree.map(lambda blank, x: jnp.where(ended, blank[i], x), nothing, new)
        ended = ended | (new.tokens == ENDED)
        thoughts = jax.tree.map(lambda x, now: x.at[i].set(now), thoughts, here)
        return i + 1, on_all_devices(ended.all()), ended, state, thoughts

    carry = jnp.int32(0), jnp.bool_(False), ended, first, nothing
    thoughts: Thoughts = jax.lax.while_loop(lambda carry: (carry[0] < length) & ~carry[1], body, carry)[-1]
    return thoughts


def mask_meta_tokens(logits: jax.Array, meta_tokens: tuple[int, ...]) -> jax.Array:
    """Masks the start and end tokens in logits [..., V], so that they are never drawn."""
    if not meta_tokens:
        return logits
    forbidden = jnp.zeros(logits.shape[-1], bool).at[jnp.array(meta_tokens)].set(True)
    return jnp.where(forbidden, -1e10, logits)


def draw_tokens(logits: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws one token per distribution, exactly, by inverting its cumulative distribution in two levels.

    One uniform number per draw replaces one Gumbel number per vocabulary entry. The two levels (a block of about
    sqrt(V) ids, then an id in the block) keep the rounding errors of the sums small.

    Args:
      logits: [..., V] float32; uniforms: [...] in [0, 1).

    Returns:
      [...] int32 ids; an id of probability 0 is never drawn.
    """
    vocab = logits.shape[-1]
    width = max(1, round(vocab**0.5))
    blocks = -(-vocab // width)
    mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, blocks * width - vocab)])
    mass = mass.reshape(*mass.shape[:-1], blocks, width)

    block_mass = mass.sum(axis=-1)
    target = uniforms * block_mass.sum(axis=-1)
    block, below = _first_above(block_mass, target)
    inside = jnp.take_along_axis(mass, block[..., None, None], axis=-2)[..., 0, :]
    token, _ = _first_above(inside, target - below)
    return (block * width + token).astype(jnp.int32)


def _first_above(mass: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first entry of positive mass whose cumulative mass exceeds the target, and the mass before it."""
    cumulative = jnp.cumsum(mass, axis=-1)
    reached = (cumulative > target[..., None]) & (mass > 0)
    # Rounding can put the target just beyond the last entry; the heaviest entry is then used.
    index = jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(mass, axis=-1))
    at = index[..., None]
    below = jnp.take_along_axis(cumulative, at, axis=-1) - jnp.take_along_axis(mass, at, axis=-1)
    return index, below[..., 0]
