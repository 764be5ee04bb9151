"""The compiled functions of generation: reading prompts into the cache, and thinking and talking token by token.

With thoughts everywhere, the token after x_j needs T + 1 passes: one for `x_j, start`, one for each of t_1 .. t_{T-1},
one for `t_T, end`. Without thoughts it needs one.

Where a policy chooses, sequences advance independently: each pass is over one token of every sequence, the newest of
its text or the next of its thought (T = 2; the policy thinks after x_5 and z_3 only):

    pass         0    1      2    3    4    5    6
    sequence x   x_5  start  t_1  t_2  end  x_6  x_7      c = 0 1 2 3 4 0 0
    sequence z   z_1  z_2    z_3  start t_1 t_2  end      c = 0 0 0 1 2 3 4

c is the number of the token in its chain `x_j, start, t_1 .. t_T, end`; it remains 0 while no thought begins.

Where the model samples the end of thoughts, sequences also advance independently: the chain of a thought of n < T
tokens has its `end` at c = n + 2.

A token without a thought then needs one pass and a token with a thought T + 3, and no sequence waits for another. With
a reach of N above 1, sequences advance independently too, and a token needs one more pass for each of the N - 1 tokens
before it that has a thought (`older_thoughts`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quietstar_jax.inference.decode_state import DecodeConfig, DecodeOutput, OpenThought, SamplingParams, State, at
from quietstar_jax.inference.kv_cache import append, cached_pass
from quietstar_jax.inference.older_thoughts import NONE, continue_chains, mix_older, remember
from quietstar_jax.inference.sampling import choose
from quietstar_jax.methods.thinking import THINKING, Position, thinks
from quietstar_jax.models.attention import MASKED
from quietstar_jax.models.decoder import Decoder, KeyValues
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.ending import ENDED, draw_end, end_logits
from quietstar_jax.thoughts.gate import predicted_gain
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import mask_meta_tokens
from quietstar_jax.thoughts.score import mix
from quietstar_jax.thoughts.text import entropy, log_prob_of


def read_prompt(decoder: Decoder, cache: KeyValues, tokens: jax.Array, start: jax.Array, dtype: jnp.dtype) -> KeyValues:
    """Returns the cache with C tokens [B, C] of every sequence written from position `start` on.

    Entries past the end of a short sequence are overwritten before any token attends to them.
    """
    batch, count = tokens.shape
    chain_kv = empty_chains(decoder.architecture, batch, 1, 1, count, dtype)
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
    chain_kv = empty_chains(
        model.decoder.architecture, state.token.size, 1, 1, length + 3 if length else 1, plan.thought.dtype
    )
    drawn = plan.sampled or plan.thoughts_sampled
    uniforms = _uniforms(knobs.keys if drawn else None, state.position, length + 1)
    if length:
        scores, weight, thoughts, chain_kv = think_and_talk(model, state, chain_kv, uniforms[:, :length], knobs, plan)
    else:
        hidden, chain_kv = _pass(model, _embed(model, state.token, plan), 0, state, chain_kv)
        scores = model.decoder.logits(hidden[:, 0])
        weight, thoughts = jnp.zeros(state.token.shape), jnp.zeros((state.token.size, 0), jnp.int32)
    token = _next(scores, uniforms[:, length], knobs, plan)
    state, tokens = _talk(state, chain_kv, token, state.left > 0, plan)
    return state, DecodeOutput(tokens, thoughts, weight)


def next_pass(model: QuietStar, state: State, knobs: SamplingParams, plan: DecodeConfig) -> tuple[State, DecodeOutput]:
    """Computes the next token of the text or of the thought of every sequence; `DecodeOutput` has no axis N.

    A sequence gets a token where the policy decides against a thought at c = 0, and at c = T + 2, the end of a thought.
    A single sequence that is not in a thought runs the pass of generation without thoughts, which is a little cheaper.
    Several always run the pass of a chain: the two passes round differently, and otherwise a text would depend on its
    neighbours.
    """
    thought = state.thought
    assert thought is not None  # made by `with_thoughts`
    length, count, alive = plan.thought.thought_length, thought.computed, state.left > 0
    at_text, at_end = alive & (count == 0), alive & thought.at_end
    drawn = plan.sampled or plan.thoughts_sampled or THINKING[plan.think].traits["draws"]
    uniforms = _uniforms(knobs.keys if drawn else None, state.position, length + 2)

    def plain() -> tuple[jax.Array, jax.Array, jax.Array, OpenThought]:
        own = jax.tree.map(lambda x: x[:, :, :, :, :, :1], thought.chain_kv)
        hidden, own = _pass(model, _embed(model, state.token, plan), 0, state, own)
        write = lambda chain, x: jax.lax.dynamic_update_slice_in_dim(chain, x, 0, axis=5)  # noqa: E731
        chain_kv = jax.tree.map(write, thought.chain_kv, own)
        after = thought._replace(chain_kv=chain_kv, base=hidden[:, 0])
        return model.decoder.logits(hidden[:, 0]), jnp.zeros(count.shape, jnp.float32), hidden[:, 0], after

    def chain() -> tuple[jax.Array, jax.Array, jax.Array, OpenThought]:
        return _chain_token(model, state, thought, at_end, uniforms, knobs, plan)

    scores, weight, hidden, after = jax.lax.cond((count > 0).any(), chain, plain) if count.size == 1 else chain()
    mixed, older = scores, state.older
    if older is not None:
        older = kept = continue_chains(model, older, _embed(model, state.token, plan), at_text, state.cache)
        mixed, weight = jax.lax.cond(
            (at_text | at_end).any(),
            lambda: mix_older(model, kept, after.base, hidden, at_end, state.position),
            lambda: (scores, weight),
        )

    def decide() -> tuple[jax.Array, jax.Array]:
        gain = None if model.gate is None else predicted_gain(model.gate, after.base)
        begins = log_prob_of(scores, plan.thought.start_token)
        here = Position(scores, entropy(scores), state.position, uniforms[:, length + 1], gain, begins)
        return at_text & thinks(plan.think, knobs.think, here), _next(mixed, uniforms[:, length], knobs, plan)

    def neither() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(count.shape, bool), jnp.zeros(count.shape, jnp.int32)

    # In the middle of thoughts nothing is decided, and the logits of texts are not read.
    begins, token = jax.lax.cond((at_text | at_end).any(), decide, neither)
    talks = at_end | (at_text & ~begins)
    if older is not None:
        older = remember(older, after.chain_kv, count + 1, state.position, talks, at_end)
    state, new = _talk(state._replace(older=older), after.chain_kv, token, talks, plan)
    made = DecodeOutput(new, jnp.where(at_end[:, None], after.tokens, -1), weight)
    return state._replace(thought=after._replace(computed=jnp.where(talks | ~alive, 0, count + 1))), made


def _chain_token(
    model: QuietStar, state: State, thought: OpenThought, at_end: jax.Array, uniforms: jax.Array,
    knobs: SamplingParams, plan: DecodeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, OpenThought]:  # fmt: skip
    """Computes the token with number c of the chain x_j, start, t_1 .. t_T, end of every sequence.

    Returns:
      (scores [B, V] of the next token: mixed `at_end` of a thought if the reach is 1, elsewhere without a thought, and
       used only at c = 0; mixing weights [B], 0 except `at_end`; hidden states [B, D]; the thoughts with this token,
       `computed` unchanged).
    """
    settings, count = plan.thought, thought.computed
    embedding = _embed(model, jnp.where(count == 0, state.token, jnp.maximum(at(thought.tokens, count - 2), 0)), plan)
    for here, of_meta_token in zip((count == 1, thought.at_end), model.start_and_end(settings), strict=True):
        embedding = jnp.where(here[:, None, None], of_meta_token, embedding)
    hidden, chain_kv = _pass(model, embedding, count, state, thought.chain_kv)
    hidden = hidden[:, 0]
    base = jnp.where((count == 0)[:, None], hidden, thought.base)

    def mixed() -> tuple[jax.Array, jax.Array]:
        # The rows that do not end a thought need the logits at `hidden`. One product has theirs, and the logits at x_j
        # of the others, which most mixings need too: XLA computes equal products once.
        first = jnp.where(at_end[:, None], base, hidden)[:, None, None]
        scores, weight = mix(model, first, hidden[:, None, None, None], settings.config.mixing)
        scores = jnp.where(at_end[:, None], scores[:, 0, 0, 0], model.decoder.logits(first)[:, 0, 0])
        return scores, jnp.where(at_end, weight[:, 0, 0, 0], 0.0)

    def unmixed() -> tuple[jax.Array, jax.Array]:
        return model.decoder.logits(hidden), jnp.zeros(count.shape, jnp.float32)

    scores, weight = jax.lax.cond(at_end.any(), mixed, unmixed) if settings.reach == 1 else unmixed()
    following = jax.lax.cond(
        ((count > 0) & ~at_end).any(),
        lambda: _think(model, hidden, scores, at(uniforms, count - 1), knobs, plan),
        lambda: jnp.zeros(count.shape, jnp.int32),
    )
    steps = jnp.arange(settings.thought_length)
    is_next = steps == count[:, None] - 1
    if settings.samples_end:  # an end also fills the steps after it; nothing is written once a thought has ended
        is_next |= (following == ENDED)[:, None] & (steps >= count[:, None] - 1)
        is_next &= (count > 0)[:, None] & ~at_end[:, None]
    tokens = jnp.where(is_next, following[:, None], thought.tokens)
    return scores, weight, hidden, OpenThought(count, chain_kv, base, tokens)


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
        return _think(model, hidden, model.decoder.logits(hidden), uniforms, knobs, plan)

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


def _think(
    model: QuietStar, hidden: jax.Array, logits: jax.Array, uniforms: jax.Array, knobs: SamplingParams,
    plan: DecodeConfig,
) -> jax.Array:  # fmt: skip
    """Chooses the next tokens of thoughts [B], or their end, from hidden states [B, D] and logits [B, V]."""
    draws = uniforms if plan.thoughts_sampled else None
    unmasked, logits = logits, mask_meta_tokens(logits, plan.thought.meta_tokens)
    if not plan.thought.samples_end:
        return choose(logits, draws, knobs.thought_temperature)
    end = end_logits(model.end_head, hidden, unmasked, logits, plan.thought.end_token)
    ends, draws = draw_end(end if draws is None else end / knobs.thought_temperature, draws)
    return jnp.where(ends, ENDED, choose(logits, draws, knobs.thought_temperature))


def _next(scores: jax.Array, uniforms: jax.Array, knobs: SamplingParams, plan: DecodeConfig) -> jax.Array:
    """Chooses the next tokens of texts [B] from scores [B, V]."""
    if plan.forbidden:
        scores = scores.at[:, jnp.array(plan.forbidden)].set(MASKED)
    return choose(scores, uniforms if plan.sampled else None, knobs.temperature, knobs.top_p if plan.nucleus else None)


def _talk(
    state: State, chain_kv: KeyValues, token: jax.Array, talks: jax.Array, plan: DecodeConfig
) -> tuple[State, jax.Array]:
    """Adds tokens [B] to texts, and caches the keys and values of the newest tokens before them.

    Where a sequence does not talk, its newest token is cached too: its chain does not attend to that entry, which the
    next pass writes again.

    Args:
      talks: [B] bool, which sequences get a token.

    Returns:
      (the state after these tokens, the tokens [B], -1 where a sequence gets none, or one of its prompt).
    """
    is_new, unread = talks, state.unread
    if unread is not None:  # the text gets the next token of its prompt
        is_new = talks & (unread[:, 0] == NONE)
        token = jnp.where(is_new, token, jnp.maximum(unread[:, 0], 0))
        rest = jnp.pad(unread[:, 1:], ((0, 0), (0, 1)), constant_values=NONE)
        unread = jnp.where(talks[:, None], rest, unread)
    ended = jnp.isin(token, jnp.array(plan.eos_ids, jnp.int32))
    # Always 0. It makes the write depend on the token, and hence on all attention that reads the cache. Otherwise the
    # compiler may write before the last layer's attention, and keep a copy of the cache for it.
    after_reading = jnp.minimum(token, 0)
    after = state._replace(
        cache=append(state.cache, chain_kv, state.position - 1 + after_reading),
        token=jnp.where(talks, token, state.token),
        position=jnp.where(talks, state.position + 1, state.position),
        left=jnp.where(is_new, jnp.where(ended, 0, state.left - 1), state.left),
        unread=unread,
    )
    return after, jnp.where(is_new, token, -1)


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
