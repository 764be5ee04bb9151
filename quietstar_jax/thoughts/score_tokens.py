"""Computes `TokenScores`: used by evaluation, measurements and reports.

    tokens ──> read_text ──> score_without_thoughts ──> think ──> thoughts [B, R, J, T] ──> score_after_thoughts
                                      └── made: where the policy of thinking makes thoughts ──┘

Only thoughts that the policy makes are computed: their positions are packed, and chunks without any are skipped. Axis
letters are those of `token_scores`. Nothing here has a gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.thinking import Position, ThinkPolicy, rankings, thinks
from quietstar_jax.models.linear import cross_entropy, pick
from quietstar_jax.parallel.axes import constrain
from quietstar_jax.thoughts.chunks import (
    Packed,
    chunk_size,
    map_chunks,
    max_positions_per_chunk,
    max_sampled_positions_per_chunk,
    pack,
)
from quietstar_jax.thoughts.controls import Uniforms, sample_or_control
from quietstar_jax.thoughts.ending import ENDED, actions, mean_over_actions
from quietstar_jax.thoughts.gate import predicted_gain
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.perturbations import PERCENTS, PerturbationDraws, changed_tokens, perturb, perturb_each
from quietstar_jax.thoughts.positions import at_positions
from quietstar_jax.thoughts.reach import by_token, exists, hidden_by_token, mixed_over_thoughts, usable, widened
from quietstar_jax.thoughts.sample import Thoughts, mask_meta_tokens
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import (
    Text,
    entropy,
    gather_next_tokens,
    here_and_ahead,
    log_prob_of,
    read_text,
    real_ahead,
)
from quietstar_jax.thoughts.token_scores import Prediction, ThoughtUse, TokenScores


class Thinking(NamedTuple):
    """A policy of thinking that chooses, and what it needs of texts [B, L], as in `methods.thinking.Position`.

    Without a policy, all positions think, and `TokenScores.rankings` are computed.
    """

    policy: ThinkPolicy | None
    place: jax.Array
    uniform: jax.Array


class Wanted(NamedTuple):
    """What is computed in addition to losses.

    Attributes:
      forbidden: ids that are never `Prediction.best`.
      candidates: [B, A] ids whose log-probabilities are returned at every position.
      likeliest: N, how many of the likeliest tokens are returned; 0 = none.
      thinking: where its policy does not think, the prediction is the one without thoughts; None = all think.
    """

    forbidden: tuple[int, ...] = ()
    candidates: jax.Array | None = None
    likeliest: int = 0
    thinking: Thinking | None = None


class UseWanted(NamedTuple):
    """What `score_use` computes in addition to the losses of thoughts alone.

    Attributes:
      kinds: perturbations, of `thought_config.PERTURBATIONS`.
      draws: random numbers for thoughts at all L positions, [B, R, L, T] each; None if there are no kinds.
    """

    kinds: tuple[str, ...] = ()
    draws: PerturbationDraws | None = None


def score_tokens(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, starts: jax.Array | None, positions: jax.Array,
    uniforms: Uniforms, settings: ThoughtSettings, *, greedy: int = 1, use: UseWanted | None = None, **wanted: Any,
) -> TokenScores:  # fmt: skip
    """Scores x[j+1] at J positions without thoughts and after R thoughts; replicated on all devices.

    Args:
      tokens, mask, starts: [B, L] as in `Text`.
      positions: [J]; consecutive if `settings.reach` is above 1.
      uniforms: random numbers of thoughts at all L positions, [B, R, L, T]; T may be 0. Greedy thoughts use none, but
        some controls do.
      settings: its `num_thoughts` is not used; its `tokens_ahead` is at least its `reach`.
      greedy: how many of the R thoughts are greedy; these come first, the others are sampled.
      use: what is computed in `TokenScores.use`; nothing where T is 0. It needs all thoughts, also those that the
        policy does not make.
      wanted: optional results, see `Wanted`.
    """
    # Chunks are for R thoughts at any position. There is no backward pass, so a chunk needs memory for one layer only.
    config = dataclasses.replace(settings.config, positions="all")
    number, reach = uniforms.tokens.shape[1], settings.reach if settings.thought_length else 1
    settings = dataclasses.replace(settings, num_thoughts=number, rematerialize=True, config=config, reach=reach)
    positions, what = widened(positions, reach), Wanted(**wanted)
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype)
    before = score_without_thoughts(model, text, positions, settings, what)
    if not settings.thought_length:
        return _finished(before._replace(made=None, rankings=None))
    packed = None if use is not None else _packed(text, positions, before)
    thoughts = think(model, text, positions if packed is None else packed, uniforms, settings, greedy)
    scores = _finished(score_after_thoughts(model, text, positions, before, thoughts, settings, what, packed=packed))
    if use is None:
        return scores
    return scores._replace(
        use=score_use(model, text, positions, before, thoughts.tokens, scores.talk.nll, use, settings)
    )


def score_given_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts | None, settings: ThoughtSettings,
    *, hide_text: bool = False, **wanted: Any,
) -> TokenScores:  # fmt: skip
    """Scores x[j+1] at J positions without thoughts and after given ones; replicated on all devices.

    Args:
      positions: [J]; with a reach N above 1, [N - 1 + J] from `widened`, and the results are for the last J.
      thoughts: [B, R, positions, T], sampled or from elsewhere; None = no thoughts.
      settings: with R thoughts per position.
      hide_text: the chains do not attend to the text, see `score.chain_hidden_states`.
      wanted: optional results, see `Wanted`.
    """
    what = Wanted(**wanted)
    before = score_without_thoughts(model, text, positions, settings, what)
    if thoughts is None:
        return _finished(before._replace(made=None, rankings=None))
    after = score_after_thoughts(model, text, positions, before, thoughts, settings, what, hide_text=hide_text)
    return _finished(after)


def score_without_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, settings: ThoughtSettings, wanted: Wanted
) -> TokenScores:
    """Scores x[j+1] at positions [J] without thoughts, and decides where to think.

    Returns:
      `real`, `base`, `base_entropy`, `made` and `rankings`, each [B, 1, J]; the last two None unless requested.
    """
    thinking = wanted.thinking

    def of_chunk(operands: Any, positions: jax.Array, _: None) -> TokenScores:
        model, text, candidates, of_policy = operands
        hidden = here_and_ahead(text.hidden, positions, 1)[:, None, :, 0]  # [B, 1, J, D]
        logits = model.decoder.logits(hidden)
        real, target = _next(text, positions)
        nll = jnp.where(real, cross_entropy(logits, target), 0.0)
        own = wanted._replace(candidates=candidates, thinking=None)
        base = _predict(text, positions, logits, nll, own, normalized=False)
        spread, made, ranked = entropy(logits), None, None
        if thinking is not None:
            place, uniform = (here_and_ahead(x, positions, 1)[:, None, :, 0] for x in of_policy)
            gain = None if model.gate is None else predicted_gain(model.gate, hidden)
            seen = Position(logits, spread, place, uniform, gain, log_prob_of(logits, settings.start_token))
            if (policy := thinking.policy) is None:
                ranked = rankings(seen)
            else:
                made = thinks(policy.name, jnp.array(policy.numbers, jnp.float32), seen)
        return TokenScores(real, base, spread, made=made, rankings=ranked)

    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)
    operands = model, text, wanted.candidates, thinking and thinking[1:]
    return map_chunks(of_chunk, operands, positions, chunk_size(positions, largest, 1), None, axis=2)


def think(
    model: QuietStar, text: Text, positions: jax.Array | Packed, uniforms: Uniforms, settings: ThoughtSettings,
    greedy: int,
) -> Thoughts:  # fmt: skip
    """Returns R thoughts at J positions, or their replacement under the control; arguments as in `score_tokens`.

    Those of packed positions are in packed order; after the chosen ones they are not defined.
    """
    shuffled = settings.config.control == "shuffled"  # needs the thoughts of all earlier positions
    sampled = jnp.arange(text.tokens.shape[1]) if shuffled else positions
    uniforms = _at(uniforms, sampled)
    largest = max_sampled_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)

    def some(first: int, last: int, greedy: bool) -> Thoughts:
        own, chunk = jax.tree.map(lambda x: x[:, first:last], uniforms), chunk_size(sampled, largest, last - first)
        several = dataclasses.replace(settings, num_thoughts=last - first)
        return sample_or_control(model, text, sampled, own, several, chunk, greedy=greedy)

    parts = ((0, greedy, True), (greedy, settings.num_thoughts, False))
    thoughts = [some(*part) for part in parts if part[0] < part[1]]
    joined: Thoughts = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *thoughts)
    return _at(joined, positions) if shuffled else joined


def score_after_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, before: TokenScores, thoughts: Thoughts,
    settings: ThoughtSettings, wanted: Wanted, *, packed: Packed | None = None, hide_text: bool = False,
) -> TokenScores:  # fmt: skip
    """Adds the scores after given thoughts to those without thoughts.

    Args:
      before: from `score_without_thoughts` at the positions [J].
      thoughts: [B, R, J, T], at all positions, or in packed order.
      packed: those of the positions that have a thought; None = all.
      hide_text: see `score_given_thoughts`.

    Returns:
      `real`, `base` and `base_entropy` [B, 1, J]; the other fields as in `TokenScores`. With a reach of N, the first
      N - 1 positions are omitted.
    """
    ahead, reach, mixing = settings.tokens_ahead, settings.reach, MIXINGS[settings.config.mixing]
    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)
    operands = model, text, wanted.candidates

    def of_chunk(operands: Any, positions: jax.Array, thoughts: Thoughts) -> tuple[Any, ...]:
        model, text, candidates = operands
        real = real_ahead(text.mask, positions, ahead, text.starts)
        targets = gather_next_tokens(text.tokens, positions, ahead, fill=0)
        logits = model.decoder.logits(here_and_ahead(text.hidden, positions, ahead))  # [B, J, K, V]
        base_nll = jnp.where(real, cross_entropy(logits, targets), 0.0)
        scores = score_thoughts(model, text, positions, thoughts.tokens, settings, base_nll, hide_text=hide_text)
        of_next = scores.log_scores[..., 0, :], scores.nll[..., 0]
        normalized = mixing.traits["log_probs"]
        own = wanted._replace(candidates=candidates, thinking=None)
        talk = _predict(text, positions, *of_next, own, normalized=normalized)
        reward = (base_nll[:, None] - scores.nll).sum(axis=-1)
        spread = mean_over_actions(thoughts.entropy, actions(thoughts.tokens, settings))
        older = scores.talk_hidden[..., :reach, :] if reach > 1 else None
        return talk, reward, scores.weight[..., 0], spread, older

    where = positions if packed is None else packed
    chunk = chunk_size(where, largest, settings.num_thoughts)
    *found, older = map_chunks(of_chunk, operands, where, chunk, thoughts, axis=2)
    tokens = thoughts.tokens
    if packed is not None:
        found, tokens = packed.put_back(found), packed.put_back(tokens, fill=ENDED)
    talk, reward, weight, spread = found
    made = None if before.made is None else jnp.broadcast_to(before.made, weight.shape)
    if made is not None:
        weight, reward = (jnp.where(made, x, 0.0) for x in (weight, reward))
    scores = before._replace(
        talk=talk, reward=reward, weight=weight, thought_entropy=spread, thoughts=tokens, made=made
    )
    if reach > 1:
        scores = score_with_older_thoughts(model, text, positions, scores, older, settings, wanted, packed)
    return scores._replace(talk=_unless_unmoved(scores.weight, scores.base, scores.talk))


def score_with_older_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, scores: TokenScores, talk_hidden: jax.Array,
    settings: ThoughtSettings, wanted: Wanted, packed: Packed | None,
) -> TokenScores:  # fmt: skip
    """Replaces the predictions after a position's own thought by those after the thoughts of a reach, see `reach`.

    Args:
      positions: [N - 1 + J]; scores: with these positions, as from `score_after_thoughts`.
      talk_hidden: [B, R, N - 1 + J, N, D], by thought and tokens ahead, in packed order if there is one.

    Returns:
      scores of the last J positions.
    """
    reach, last = settings.reach, slice(settings.reach - 1, None)
    used = usable(text, positions, reach)[:, None]
    if scores.made is not None:
        used = used & scores.made[..., None]
    used = by_token(jnp.broadcast_to(used, (*scores.weight.shape, reach)), reach)
    slots = jnp.broadcast_to(jnp.arange(positions.size), (len(text.mask), positions.size))
    if packed is not None:
        slots = packed.slots
    slots = by_token(jnp.broadcast_to(slots[:, None, :, None], (len(slots), 1, positions.size, reach)), reach)

    def of_chunk(operands: Any, positions: jax.Array, inputs: Any) -> tuple[Prediction, jax.Array]:
        model, text, candidates, talk_hidden = operands
        used, slots = inputs
        hidden = here_and_ahead(text.hidden, positions, 1)[:, :, 0]
        mixed, weight = mixed_over_thoughts(model, hidden, hidden_by_token(talk_hidden, slots[:, 0]), used)
        real, target = _next(text, positions)
        nll = jnp.where(real, -pick(mixed, jnp.broadcast_to(target, weight.shape)), 0.0)
        own = wanted._replace(candidates=candidates, thinking=None)
        return _predict(text, positions, mixed, nll, own, normalized=True), weight

    positions, scores = positions[last], jax.tree.map(lambda x: x[:, :, last], scores)
    tokens = None if packed is None else pack(positions, used.any(axis=(1, 3)))  # those that any thought is used for
    where = positions if tokens is None else tokens
    inputs = used, slots
    if tokens is not None:
        inputs = tokens.take(inputs)
    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)
    chunk, operands = chunk_size(where, largest, settings.num_thoughts), (model, text, wanted.candidates, talk_hidden)
    found = map_chunks(of_chunk, operands, where, chunk, inputs, axis=2)
    talk, weight = found if tokens is None else tokens.put_back(found)
    return scores._replace(talk=talk, weight=weight)


def score_use(
    model: QuietStar, text: Text, positions: jax.Array, before: TokenScores, thoughts: jax.Array, nll: jax.Array,
    wanted: UseWanted, settings: ThoughtSettings,
) -> ThoughtUse:  # fmt: skip
    """Scores x[j+1] at J positions after perturbed thoughts and after thoughts alone.

    The given thoughts are not sampled again. Each number of changed tokens costs one more pass over the chains.

    Args:
      positions, thoughts: as in `score_given_thoughts`, T > 0; nll: [B, R, J] cross-entropy with them.
      before: from `score_without_thoughts`; where its policy makes no thought, none is perturbed.
      settings: with R thoughts per position.
    """
    length, alone = thoughts.shape[-1], dataclasses.replace(settings.config, mixing="none")
    before = before._replace(base=Prediction(*before.base[:3]))  # without optional results, as they are not wanted
    packed = _packed(text, positions, before)
    first = settings.reach - 1  # only a position's own thought is measured alone

    def score(tokens: jax.Array, before: TokenScores, settings: ThoughtSettings, **how: Any) -> jax.Array:
        tokens = how["packed"].take(tokens) if how.get("packed") else tokens
        given = Thoughts(tokens, jnp.zeros(tokens.shape, jnp.float32))
        settings = dataclasses.replace(settings, thought_length=tokens.shape[-1])
        return score_after_thoughts(model, text, positions, before, given, settings, Wanted(), **how).talk.nll

    def perturbed() -> dict[str, tuple[jax.Array, ...]]:
        """One program for all thoughts of equal length: compiling one for each change takes longer than running it."""
        draws = jax.tree.map(lambda x: jnp.take(x, positions, axis=2), wanted.draws)
        size, meta_tokens = model.decoder.architecture.vocab_size, settings.meta_tokens
        change = perturb_each if settings.samples_end else perturb
        counts = [percent if settings.samples_end else changed_tokens(length, percent) for percent in PERCENTS]
        by_length: dict[int, dict[tuple[str, int], jax.Array]] = {}
        for kind, count in itertools.product(wanted.kinds, sorted({*counts} - {0})):
            changed = change(thoughts, draws, kind, count, vocab_size=size, meta_tokens=meta_tokens)
            by_length.setdefault(changed.shape[-1], {})[kind, count] = changed
        found = {(kind, 0): nll for kind in wanted.kinds}
        for group in by_length.values():
            scored = jax.lax.map(lambda x: score(x, before, settings, packed=packed), jnp.stack([*group.values()]))
            found |= dict(zip(group, scored, strict=True))
        return {kind: tuple(found[kind, count] for count in counts) for kind in wanted.kinds}

    unmixed, everywhere = dataclasses.replace(settings, config=alone, reach=1), before._replace(made=None)
    return ThoughtUse(
        score(thoughts, everywhere, unmixed, hide_text=True)[..., first:],
        score(thoughts[..., :0], everywhere, unmixed, hide_text=True)[..., first:],
        perturbed(),
    )


def _packed(text: Text, positions: jax.Array, before: TokenScores) -> Packed | None:
    """Returns those of positions [J] at which the policy makes a thought; None without a policy."""
    return None if before.made is None else pack(positions, before.made[:, 0] & exists(text, positions))


def _next(text: Text, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns whether x[j+1] is real, and x[j+1], 0 past the end: [B, 1, J] each."""
    real = real_ahead(text.mask, positions, 1, text.starts)
    target = gather_next_tokens(text.tokens, positions, 1, fill=0)
    return real[:, None, :, 0], target[:, None, :, 0]


def _predict(
    text: Text, positions: jax.Array, log_scores: jax.Array, nll: jax.Array, wanted: Wanted, *, normalized: bool
) -> Prediction:  # fmt: skip
    """Returns a prediction of x[j+1]; log_scores [B, R, J, V]: logits, or log-probabilities if `normalized`."""
    real, target = _next(text, positions)
    best = mask_meta_tokens(log_scores, wanted.forbidden).argmax(axis=-1)
    found = Prediction(nll, best, (best == target) & real)
    total = 0.0 if normalized else jax.nn.logsumexp(log_scores, axis=-1, keepdims=True)
    log_probs = log_scores - total
    if wanted.candidates is not None:
        at = wanted.candidates[:, None, None]
        found = found._replace(candidates=jnp.take_along_axis(log_probs, at, axis=-1))
    if wanted.likeliest:
        top, ids = jax.lax.top_k(log_probs, wanted.likeliest)
        found = found._replace(top_ids=ids, top_probabilities=jnp.exp(top))
    return found


def _unless_unmoved(weight: jax.Array, base: Prediction, talk: Prediction) -> Prediction:
    """Returns `talk` [B, R, J, ..], or `base` [B, 1, J, ..] where the mixing weight is 0: any change is rounding."""

    def choose(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(weight == 0, tuple(range(3, after.ndim))), before, after)

    chosen: Prediction = jax.tree.map(choose, base, talk)
    return chosen


def _finished(scores: TokenScores) -> TokenScores:
    """Returns the scores on all devices; those without thoughts lose their axis of one thought."""
    scores = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), scores)
    real, base, spread = jax.tree.map(lambda x: x[:, 0], scores[:3])
    return scores._replace(real=real, base=base, base_entropy=spread)


def _at(tree: Any, where: jax.Array | Packed) -> Any:
    """Returns values [B, R, L, ...] at positions [J], or at packed ones [B, J]."""
    if isinstance(where, Packed):
        return jax.tree.map(lambda x: at_positions(x, where.positions), tree)
    return jax.tree.map(lambda x: jnp.take(x, where, axis=2), tree)
