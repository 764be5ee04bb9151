"""The compiled functions of generation: reading prompts into the cache, and thinking and talking token by token.

A new token x_j needs T + 1 passes: one for `x_j, start`, one for each of t_1 .. t_{T-1}, one for `t_T, end`. Without
thoughts it needs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.inference.kv_cache import append, cached_pass
from quietstar_jax.inference.sampling import choose
from quietstar_jax.models.attention import MASKED
from quietstar_jax.models.decoder import Decoder, KeyValues
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import mask_meta_tokens
from quietstar_jax.thoughts.score import mix
from quietstar_jax.thoughts.settings import ThoughtSettings


@dataclass(frozen=True)
class DecodeConfig:
    """Static settings of the compiled functions.

    Attributes:
      thought: length (0 = none), meta tokens, mixing, compute dtype.
      sampled: whether tokens are sampled; nucleus: only from the nucleus; thoughts_sampled: in thoughts too.
      forbidden: ids that are never generated; eos_ids: ids that end a text.
      tokens_per_call: number of tokens of each sequence that one call generates.
    """

    thought: ThoughtSettings
    sampled: bool = False
    nucleus: bool = False
    thoughts_sampled: bool = False
    forbidden: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    tokens_per_call: int = 1


class SamplingParams(NamedTuple):
    """Settings that may change between calls without recompilation: scalars of `Sampling`, and keys [B]."""

    temperature: jax.Array
    top_p: jax.Array
    thought_temperature: jax.Array
    keys: jax.Array


class State(NamedTuple):
    """State of B sequences between two generated tokens.

    Attributes:
      cache: keys and values of all tokens but the newest.
      token, position: [B] int32, the newest token and its position in the text; left: [B] int32, how many tokens may
        still be generated, 0 = the text has ended.
    """

    cache: KeyValues
    token: jax.Array
    position: jax.Array
    left: jax.Array


class DecodeOutput(NamedTuple):
    """N tokens of B sequences.

    Attributes:
      tokens: [N, B] int32, -1 where the text has already ended.
      thoughts: [N, B, T] int32, the thought before each token; weight: [N, B] float32, its mixing weight.
    """

    tokens: jax.Array
    thoughts: jax.Array
    weight: jax.Array


def read_prompt(decoder: Decoder, cache: KeyValues, tokens: jax.Array, start: jax.Array, dtype: jnp.dtype) -> KeyValues:
    """Returns the cache with C tokens [B, C] of every sequence written from position `start` on.

    Entries past the end of a short sequence are overwritten before any token attends to them.
    """
    batch, count = tokens.shape
    chain_kv = empty_chains(decoder, batch, 1, 1, count, dtype)
    positions = jnp.full(batch, start - 1, jnp.int32)
    _, chain_kv = cached_pass(decoder, decoder.embed(tokens, dtype), jnp.int32(0), positions, cache, chain_kv)

    def write(cached: jax.Array, chain: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, chain[:, :, :, 0, 0], start, axis=3)

    return KeyValues(write(cache.keys, chain_kv.keys), write(cache.values, chain_kv.values))


def generate_tokens(
    model: QuietStar, state: State, alive: jax.Array, knobs: SamplingParams, plan: DecodeConfig
) -> tuple[State, DecodeOutput]:
    """Generates up to `plan.tokens_per_call` tokens of every sequence that has not ended; stops when all have.

    Args:
      alive: [B] bool, False ends a sequence before this call.
    """
    batch, count = state.token.size, plan.tokens_per_call
    emitted = DecodeOutput(
        jnp.full((count, batch), -1, jnp.int32),
        jnp.zeros((count, batch, plan.thought.thought_length), jnp.int32),
        jnp.zeros((count, batch), jnp.float32),
    )

    def more(carry: tuple[jax.Array, State, DecodeOutput]) -> jax.Array:
        return (carry[0] < count) & (carry[1].left > 0).any()

    def step(carry: tuple[jax.Array, State, DecodeOutput]) -> tuple[jax.Array, State, DecodeOutput]:
        n, state, emitted = carry
        state, new = next_token(model, state, knobs, plan)
        return n + 1, state, jax.tree.map(lambda all, one: all.at[n].set(one), emitted, new)

    state = state._replace(left=jnp.where(alive, state.left, 0))
    _, state, emitted = jax.lax.while_loop(more, step, (jnp.int32(0), state, emitted))
    return state, emitted


def next_token(model: QuietStar, state: State, knobs: SamplingParams, plan: DecodeConfig) -> tuple[State, DecodeOutput]:
    """Generates one token of every sequence; `DecodeOutput` has no axis N."""
    length = plan.thought.thought_length
    chain_kv = empty_chains(model.decoder, state.token.size, 1, 1, length + 3 if length else 1, plan.thought.dtype)
    drawn = plan.sampled or plan.thoughts_sampled
    uniforms = _uniforms(knobs.keys if drawn else None, state.position, length + 1)
    if length:
        scores, weight, thoughts, chain_kv = think_and_talk(model, state, chain_kv, uniforms[:, :length], knobs, plan)
    else:
        hidden, chain_kv = _pass(model, _embed(model, state.token, plan), 0, state, chain_kv)
        scores = model.decoder.logits(hidden[:, 0])
        weight, thoughts = jnp.zeros(state.token.shape), jnp.zeros((state.token.size, 0), jnp.int32)
    if plan.forbidden:
        scores = scores.at[:, jnp.array(plan.forbidden)].set(MASKED)
    token = choose(
        scores, uniforms[:, length] if plan.sampled else None, knobs.temperature, knobs.top_p if plan.nucleus else None
    )
    alive = state.left > 0
    ended = jnp.isin(token, jnp.array(plan.eos_ids, jnp.int32))
    after = State(
        cache=append(state.cache, chain_kv, state.position - 1),
        token=jnp.where(alive, token, state.token),
        position=jnp.where(alive, state.position + 1, state.position),
        left=jnp.where(alive & ~ended, state.left - 1, 0),
    )
    return after, DecodeOutput(jnp.where(alive, token, -1), thoughts, weight)


def think_and_talk(
    model: QuietStar, state: State, chain_kv: KeyValues, uniforms: jax.Array, knobs: SamplingParams, plan: DecodeConfig
) -> tuple[jax.Array, jax.Array, jax.Array, KeyValues]:
    """Runs the chain that starts with the newest token of every sequence.

    Args:
      chain_kv: empty keys and values for its T + 3 tokens, including the newest one; uniforms: [B, T].

    Returns:
      (mixed scores [B, V] as from `thoughts.score.mix`, mixing weights [B], thoughts [B, T], chain_kv).
    """
    settings = plan.thought
    start, end = (jnp.broadcast_to(x, (state.token.size, 1, x.size)) for x in model.start_and_end(settings))

    def think(hidden: jax.Array, uniforms: jax.Array) -> jax.Array:
        logits = mask_meta_tokens(model.decoder.logits(hidden), settings.meta_tokens)
        return choose(logits, uniforms if plan.thoughts_sampled else None, knobs.thought_temperature)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
        token, chain_kv = carry
        offset, uniforms = inputs
        hidden, chain_kv = _pass(model, _embed(model, token, plan), offset, state, chain_kv)
        following = think(hidden[:, 0], uniforms)
        return (following, chain_kv), following

    newest = [_embed(model, state.token, plan), start]
    hidden, chain_kv = _pass(model, jnp.concatenate(newest, axis=1), 0, state, chain_kv)
    base, first = hidden[:, 0], think(hidden[:, 1], uniforms[:, 0])
    offsets = jnp.arange(2, settings.thought_length + 1)
    (last, chain_kv), others = jax.lax.scan(step, (first, chain_kv), (offsets, uniforms[:, 1:].T))
    ending = [_embed(model, last, plan), end]
    hidden, chain_kv = _pass(model, jnp.concatenate(ending, axis=1), settings.thought_length + 1, state, chain_kv)

    base, talk = base[:, None, None], hidden[:, None, None, 1:]  # [B, J, K, D] and [B, R, J, K, D]
    scores, weight = mix(model, base, talk, settings.config.mixing)
    return scores[:, 0, 0, 0], weight[:, 0, 0, 0], jnp.concatenate([first[None], others]).T, chain_kv


def _embed(model: QuietStar, tokens: jax.Array, plan: DecodeConfig) -> jax.Array:
    return model.decoder.embed(tokens, plan.thought.dtype)[:, None]


def _pass(
    model: QuietStar, embeddings: jax.Array, offset: jax.Array | int, state: State, chain_kv: KeyValues
) -> tuple[jax.Array, KeyValues]:
    return cached_pass(
        model.decoder, embeddings, jnp.asarray(offset, jnp.int32), state.position - 1, state.cache, chain_kv
    )


def _uniforms(keys: jax.Array | None, positions: jax.Array, count: int) -> jax.Array:
    """Draws [B, count] in [0, 1) that depend only on the key and position of their sequence; zeros without keys."""
    if keys is None:
        return jnp.zeros((positions.size, count))

    def draw(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (count,))

    return jax.vmap(draw)(keys, positions)
