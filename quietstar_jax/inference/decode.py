"""The compiled functions of generation: reading prompts into the cache, and thinking and talking token by token.

With thoughts everywhere, the token after x_j needs T + 1 passes: one for `x_j, start`, one for each of t_1 .. t_{T-1},
one for `t_T, end`. Without thoughts it needs one.

Where a policy chooses, sequences advance independently: each pass is over one token of every sequence, the newest of
its text or the next of its thought (T = 2; the policy thinks after x_5 and z_3 only):

    pass         0    1      2    3    4    5    6
    sequence x   x_5  start  t_1  t_2  end  x_6  x_7      c = 0 1 2 3 4 0 0
    sequence z   z_1  z_2    z_3  start t_1 t_2  end      c = 0 0 0 1 2 3 4

c is the number of the token in its chain `x_j, start, t_1 .. t_T, end`; it remains 0 while no thought begins.

A token without a thought then needs one pass and a token with a thought T + 3, and no sequence waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.inference.kv_cache import append, cached_pass
from quietstar_jax.inference.sampling import choose
from quietstar_jax.methods.thinking import THINKING, Position, thinks
from quietstar_jax.models.attention import MASKED
from quietstar_jax.models.decoder import Decoder, KeyValues
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import mask_meta_tokens
from quietstar_jax.thoughts.score import mix
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import entropy


@dataclass(frozen=True)
class DecodeConfig:
    """Static settings of the compiled functions.

    Attributes:
      thought: length (0 = none), meta tokens, mixing, compute dtype.
      think: name of the policy of thinking, if there are thoughts.
      sampled: whether tokens are sampled; nucleus: only from the nucleus; thoughts_sampled: in thoughts too.
      forbidden: ids that are never generated; eos_ids: ids that end a text.
      tokens_per_call: number of tokens of each sequence that one call generates; if the policy chooses, a call ends
        when any sequence has that many.
    """

    thought: ThoughtSettings
    think: str = "always"
    sampled: bool = False
    nucleus: bool = False
    thoughts_sampled: bool = False
    forbidden: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    tokens_per_call: int = 1

    @property
    def chooses(self) -> bool:
        """Whether only some tokens have a thought."""
        return self.thought.thought_length > 0 and THINKING[self.think].traits["constant"] is None


class SamplingParams(NamedTuple):
    """Settings that may change between calls without recompilation: scalars of `Sampling`, and keys [B].

    `think` are the numbers of the policy, [N] float32.
    """

    temperature: jax.Array
    top_p: jax.Array
    thought_temperature: jax.Array
    keys: jax.Array
    think: jax.Array


class OpenThought(NamedTuple):
    """The unfinished chains `x_j, start, t_1 .. t_T, end` of B sequences, one of each.

    Attributes:
      computed: [B] int32, c, how many tokens of the chain have been computed; 0 = none, not even x_j.
      chain_kv: keys and values of these tokens; base: [B, D] hidden state at x_j.
      tokens: [B, T] int32, the thought, of which max(0, c - 1) tokens are known.
    """

    computed: jax.Array
    chain_kv: KeyValues
    base: jax.Array
    tokens: jax.Array


class State(NamedTuple):
    """State of B sequences between two generated tokens.

    Attributes:
      cache: keys and values of all tokens but the newest.
      token, position: [B] int32, the newest token and its position in the text; left: [B] int32, how many tokens may
        still be generated, 0 = the text has ended.
      thought: None unless the policy chooses.
    """

    cache: KeyValues
    token: jax.Array
    position: jax.Array
    left: jax.Array
    thought: OpenThought | None = None


class DecodeOutput(NamedTuple):
    """N tokens of B sequences.

    Attributes:
      tokens: [N, B] int32; -1 = none: the text has ended, or other sequences have more tokens in this call.
      thoughts: [N, B, T] int32, the thought before each token, -1 where the policy made none; weight: [N, B] float32,
        its mixing weight, 0 where there is none.
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
        return (carry[0].max() < count) & (carry[1].left > 0).any()

    def step(carry: tuple[jax.Array, State, DecodeOutput]) -> tuple[jax.Array, State, DecodeOutput]:
        n, state, emitted = carry  # n [B], how many tokens each sequence has
        state, new = (next_pass if plan.chooses else next_token)(model, state, knobs, plan)
        is_new = new.tokens >= 0
        at = jnp.where(is_new, n, count), jnp.arange(batch)  # outside: nothing is written
        return n + is_new, state, jax.tree.map(lambda all, one: all.at[at].set(one, mode="drop"), emitted, new)

    state = state._replace(left=jnp.where(alive, state.left, 0))
    _, state, emitted = jax.lax.while_loop(more, step, (jnp.zeros(batch, jnp.int32), state, emitted))
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
    state, tokens = _talk(state, chain_kv, scores, uniforms[:, length], state.left > 0, knobs, plan)
    return state, DecodeOutput(tokens, thoughts, weight)


def next_pass(model: QuietStar, state: State, knobs: SamplingParams, plan: DecodeConfig) -> tuple[State, DecodeOutput]:
    """Computes the next token of the text or of the thought of every sequence; `DecodeOutput` has no axis N.

    A sequence gets a token where the policy decides against a thought at c = 0, and at c = T + 2, the end of a thought.
    A single sequence that is not in a thought runs the pass of generation without thoughts, which is a little cheaper.
    Several always run the pass of a chain: the two passes round differently, and otherwise a text would depend on its
    neighbours.
    """
    thought = state.thought
    assert thought is not None  # made by `open_thought`
    length, count, alive = plan.thought.thought_length, thought.computed, state.left > 0
    at_text, at_end = alive & (count == 0), alive & (count == length + 2)
    drawn = plan.sampled or plan.thoughts_sampled or THINKING[plan.think].traits["draws"]
    uniforms = _uniforms(knobs.keys if drawn else None, state.position, length + 2)

    def plain() -> tuple[jax.Array, jax.Array, OpenThought]:
        own = jax.tree.map(lambda x: x[:, :, :, :, :, :1], thought.chain_kv)
        hidden, own = _pass(model, _embed(model, state.token, plan), 0, state, own)
        write = lambda chain, x: jax.lax.dynamic_update_slice_in_dim(chain, x, 0, axis=5)  # noqa: E731
        chain_kv = jax.tree.map(write, thought.chain_kv, own)
        after = thought._replace(chain_kv=chain_kv, base=hidden[:, 0])
        return model.decoder.logits(hidden[:, 0]), jnp.zeros(count.shape, jnp.float32), after

    def chain() -> tuple[jax.Array, jax.Array, OpenThought]:
        return _chain_token(model, state, thought, at_end, uniforms, knobs, plan)

    scores, weight, after = jax.lax.cond((count > 0).any(), chain, plain) if count.size == 1 else chain()
    here = Position(scores, entropy(scores), state.position, uniforms[:, length + 1])
    begins = at_text & thinks(plan.think, knobs.think, here)
    talks = at_end | (at_text & ~begins)
    state, new = _talk(state, after.chain_kv, scores, uniforms[:, length], talks, knobs, plan)
    made = DecodeOutput(new, jnp.where(at_end[:, None], after.tokens, -1), weight)
    return state._replace(thought=after._replace(computed=jnp.where(talks | ~alive, 0, count + 1))), made


def _chain_token(
    model: QuietStar, state: State, thought: OpenThought, at_end: jax.Array, uniforms: jax.Array,
    knobs: SamplingParams, plan: DecodeConfig,
) -> tuple[jax.Array, jax.Array, OpenThought]:  # fmt: skip
    """Computes the token with number c of the chain x_j, start, t_1 .. t_T, end of every sequence.

    Returns:
      (scores [B, V] of the next token: mixed `at_end` of a thought, elsewhere without a thought, and used only at
       c = 0; mixing weights [B], 0 except `at_end`; the thoughts with this token, `computed` unchanged).
    """
    settings, count = plan.thought, thought.computed
    embedding = _embed(model, jnp.where(count == 0, state.token, _at(thought.tokens, count - 2)), plan)
    for c, of_meta_token in zip((1, settings.thought_length + 2), model.start_and_end(settings), strict=True):
        embedding = jnp.where((count == c)[:, None, None], of_meta_token, embedding)
    hidden, chain_kv = _pass(model, embedding, count, state, thought.chain_kv)
    hidden = hidden[:, 0]
    logits, base = model.decoder.logits(hidden), jnp.where((count == 0)[:, None], hidden, thought.base)

    def mixed() -> tuple[jax.Array, jax.Array]:
        scores, weight = mix(model, base[:, None, None], hidden[:, None, None, None], settings.config.mixing)
        return jnp.where(at_end[:, None], scores[:, 0, 0, 0], logits), jnp.where(at_end, weight[:, 0, 0, 0], 0.0)

    scores, weight = jax.lax.cond(at_end.any(), mixed, lambda: (logits, jnp.zeros(count.shape, jnp.float32)))
    following = _think(logits, _at(uniforms, count - 1), knobs, plan)
    is_next = jnp.arange(settings.thought_length) == count[:, None] - 1
    tokens = jnp.where(is_next, following[:, None], thought.tokens)
    return scores, weight, OpenThought(count, chain_kv, base, tokens)


def open_thought(a: Architecture, batch: int, plan: DecodeConfig, place: jax.sharding.Sharding) -> OpenThought:
    """Returns the state of B sequences before the first token."""
    length, dtype = plan.thought.thought_length, plan.thought.dtype
    chain = (a.num_layers, batch, a.num_kv_heads, 1, 1, length + 3, a.head_dim)  # as from `empty_chains`
    return OpenThought(
        jnp.zeros(batch, jnp.int32, device=place),
        KeyValues(jnp.zeros(chain, dtype, device=place), jnp.zeros(chain, dtype, device=place)),
        jnp.zeros((batch, a.hidden_size), dtype, device=place),
        jnp.zeros((batch, length), jnp.int32, device=place),
    )


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
        return _think(model.decoder.logits(hidden), uniforms, knobs, plan)

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


def _think(logits: jax.Array, uniforms: jax.Array, knobs: SamplingParams, plan: DecodeConfig) -> jax.Array:
    """Chooses the next tokens of thoughts [B] from logits [B, V]."""
    logits = mask_meta_tokens(logits, plan.thought.meta_tokens)
    return choose(logits, uniforms if plan.thoughts_sampled else None, knobs.thought_temperature)


def _talk(
    state: State, chain_kv: KeyValues, scores: jax.Array, uniforms: jax.Array, talks: jax.Array,
    knobs: SamplingParams, plan: DecodeConfig,
) -> tuple[State, jax.Array]:  # fmt: skip
    """Chooses the next tokens of texts from scores [B, V], and caches the keys and values of their newest tokens.

    Where a sequence does not talk, its newest token is cached too: its chain does not attend to that entry, which the
    next pass writes again.

    Args:
      talks: [B] bool, which sequences get a token.

    Returns:
      (the state after these tokens, the tokens [B], -1 where a sequence gets none).
    """
    if plan.forbidden:
        scores = scores.at[:, jnp.array(plan.forbidden)].set(MASKED)
    token = choose(scores, uniforms if plan.sampled else None, knobs.temperature, knobs.top_p if plan.nucleus else None)
    ended = jnp.isin(token, jnp.array(plan.eos_ids, jnp.int32))
    after = state._replace(
        cache=append(state.cache, chain_kv, state.position - 1),
        token=jnp.where(talks, token, state.token),
        position=jnp.where(talks, state.position + 1, state.position),
        left=jnp.where(talks, jnp.where(ended, 0, state.left - 1), state.left),
    )
    return after, jnp.where(talks, token, -1)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns values [B, N] at an index [B] of each row; any value where the index is outside."""
    return jnp.take_along_axis(values, index[:, None], axis=1, mode="clip")[:, 0]


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
