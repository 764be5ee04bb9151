"""Predictions of next tokens without thoughts and after given ones, at chunks of positions.

`score_tokens` and `score_use` call these. Axis letters are those of `token_scores`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.thinking import Position, ThinkPolicy, rankings, thinks
from quietstar_jax.models.linear import cross_entropy, pick
from quietstar_jax.thoughts.chunks import Packed, chunk_size, map_chunks, max_positions_per_chunk, pack
from quietstar_jax.thoughts.ending import ENDED, actions, mean_over_actions
from quietstar_jax.thoughts.gate import predicted_gain
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.reach import by_token, exists, hidden_by_token, mixed_over_thoughts, usable
from quietstar_jax.thoughts.sample import Thoughts, mask_meta_tokens
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import (
    Text,
    entropy,
    gather_next_tokens,
    here_and_ahead,
    log_prob_of,
    real_ahead,
)
from quietstar_jax.thoughts.token_scores import Prediction, TokenScores


class Thinking(NamedTuple):
    """Where texts [B, L] have thoughts: a policy that chooses, and what it needs, as in `methods.thinking.Position`.

    If `policy` and `among` are None, all positions think, and `TokenScores.rankings` are computed.

    Attributes:
      among: [B, L] bool, the policy chooses among these positions; None = among all.
    """

    policy: ThinkPolicy | None
    place: jax.Array
    uniform: jax.Array
    among: jax.Array | None = None

    @classmethod
    def of_rows(
        cls, think: ThinkPolicy, shape: tuple[int, ...], key: jax.Array, among: jax.Array | None = None
    ) -> Thinking:
        """Returns a policy for texts [B, L] that each begin at their first token; one that does not choose is None."""
        places = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        return cls(think if think.constant is None else None, places, jax.random.uniform(key, shape), among)


class Wanted(NamedTuple):
    """What is computed in addition to losses.

    Attributes:
      forbidden: ids that are never `Prediction.best`; excluded: ids left out of all predictions.
      candidates: [B, A] ids whose log-probabilities are returned at every position.
      likeliest: N, how many of the likeliest tokens are returned; 0 = none.
      thinking: where its policy does not think, the prediction is the one without thoughts; None = all think.
    """

    forbidden: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    candidates: jax.Array | None = None
    likeliest: int = 0
    thinking: Thinking | None = None

    def of_chunk(self, candidates: jax.Array | None) -> Wanted:
        """Returns what a chunk computes of predictions, with its candidates: chunks must not close over arrays."""
        return self._replace(candidates=candidates, thinking=None)


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
        real = _next(text, positions)[0]
        base = _predict(text, positions, logits, wanted.of_chunk(candidates), normalized=False)
        spread, made, ranked = entropy(logits), None, None
        if thinking is not None:
            place, uniform, made = jax.tree.map(lambda x: here_and_ahead(x, positions, 1)[:, None, :, 0], of_policy)
            gain = None if model.gate is None else predicted_gain(model.gate, hidden)
            seen = Position(logits, spread, place, uniform, gain, log_prob_of(logits, settings.start_token))
            if (policy := thinking.policy) is not None:
                chosen = thinks(policy.name, jnp.array(policy.numbers, jnp.float32), seen)
                made = chosen if made is None else made & chosen
            elif made is None:
                ranked = rankings(seen)
        return TokenScores(real, base, spread, made=made, rankings=ranked)

    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)
    operands = model, text, wanted.candidates, thinking and thinking[1:]
    return map_chunks(of_chunk, operands, positions, chunk_size(positions, largest, 1), None, axis=2)


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
        own, normalized = wanted.of_chunk(candidates), mixing.traits["log_probs"]
        talk = _predict(text, positions, scores.log_scores[..., 0, :], own, scores.nll[..., 0], normalized=normalized)
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
    slots = jnp.arange(positions.size) if packed is None else packed.slots[:, None]  # [B, 1, N - 1 + J]
    slots = by_token(jnp.broadcast_to(slots[..., None], (len(text.mask), 1, positions.size, reach)), reach)

    def of_chunk(operands: Any, positions: jax.Array, inputs: Any) -> tuple[Prediction, jax.Array]:
        model, text, candidates, talk_hidden = operands
        used, slots = inputs
        hidden = here_and_ahead(text.hidden, positions, 1)[:, :, 0]
        mixed, weight = mixed_over_thoughts(model, hidden, hidden_by_token(talk_hidden, slots[:, 0]), used)
        return _predict(text, positions, mixed, wanted.of_chunk(candidates), normalized=True), weight

    positions, scores = positions[last], jax.tree.map(lambda x: x[:, :, last], scores)
    tokens = None if packed is None else pack(positions, used.any(axis=(1, 3)))  # those that any thought is used for
    where, inputs = (positions, (used, slots)) if tokens is None else (tokens, tokens.take((used, slots)))
    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.mask.shape)
    chunk, operands = chunk_size(where, largest, settings.num_thoughts), (model, text, wanted.candidates, talk_hidden)
    found = map_chunks(of_chunk, operands, where, chunk, inputs, axis=2)
    talk, weight = found if tokens is None else tokens.put_back(found)
    return scores._replace(talk=talk, weight=weight)


def made_positions(text: Text, positions: jax.Array, before: TokenScores) -> Packed | None:
    """Returns those of positions [J] at which the policy makes a thought; None without a policy."""
    return None if before.made is None else pack(positions, before.made[:, 0] & exists(text, positions))


def _next(text: Text, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns whether x[j+1] is real, and x[j+1], 0 past the end: [B, 1, J] each."""
    real = real_ahead(text.mask, positions, 1, text.starts)
    target = gather_next_tokens(text.tokens, positions, 1, fill=0)
    return real[:, None, :, 0], target[:, None, :, 0]


def _predict(
    text: Text, positions: jax.Array, log_scores: jax.Array, wanted: Wanted, nll: jax.Array | None = None, *,
    normalized: bool,
) -> Prediction:  # fmt: skip
    """Returns a prediction of x[j+1].

    Args:
      log_scores: [B, R, J, V] logits, or log-probabilities if `normalized`; nll: [B, R, J], None = from these.
    """
    if wanted.excluded:
        log_scores, nll, normalized = mask_meta_tokens(log_scores, wanted.excluded), None, False
    real, target = _next(text, positions)
    best = mask_meta_tokens(log_scores, wanted.forbidden).argmax(axis=-1)
    if nll is None:
        targets = jnp.broadcast_to(target, best.shape)
        nll = -pick(log_scores, targets) if normalized else cross_entropy(log_scores, targets)
        nll = jnp.where(real, nll, 0.0)
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
