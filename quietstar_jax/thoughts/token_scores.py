"""Scores of next tokens without thoughts and after thoughts: used by evaluation, measurements and reports.

    tokens ──> read_text ──> think ──> thoughts [B, R, J, T] ──> score_given_thoughts ──> TokenScores

Axis letters: B texts, L tokens per text, J positions, R thoughts per position, T tokens per thought, K tokens ahead,
A candidates, N likeliest tokens, V vocabulary. Position j predicts the token x[j+1]. Losses, rewards and entropies are
in nats, float32. Nothing here has a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.thinking import Position, ThinkPolicy, rankings, thinks
from quietstar_jax.models.linear import cross_entropy, pick
from quietstar_jax.parallel.axes import constrain
from quietstar_jax.thoughts.chunks import (
    even_chunk,
    map_chunks,
    max_positions_per_chunk,
    max_sampled_positions_per_chunk,
)
from quietstar_jax.thoughts.controls import Uniforms, sample_or_control
from quietstar_jax.thoughts.ending import actions, mean_over_actions
from quietstar_jax.thoughts.gate import predicted_gain
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.perturbations import PERCENTS, PerturbationDraws, changed_tokens, perturb, perturb_each
from quietstar_jax.thoughts.reach import by_token, mixed_over_thoughts, usable, widened
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


class Prediction(NamedTuple):
    """Predictions of x[j+1]; the leading axes are [B, J] without thoughts and [B, R, J] after thoughts.

    Attributes:
      nll: [..] cross-entropy of x[j+1]; 0 where it is not real.
      best: [..] the most likely id of those that are not forbidden.
      correct: [..] bool, whether `best` is x[j+1]; False where that is not real.
      candidates: [.., A] log-probabilities of the candidates; None unless requested.
      top_ids, top_probabilities: [.., N] the likeliest ids of the whole vocabulary; None unless requested.
    """

    nll: Any
    best: Any
    correct: Any
    candidates: Any = None
    top_ids: Any = None
    top_probabilities: Any = None


class ThoughtUse(NamedTuple):
    """Whether predictions use the content of a thought: cross-entropies of x[j+1], [B, R, J]; 0 where it is not real.

    Attributes:
      thought_only: of the prediction after the thought alone (not mixed), where the chain does not attend to the text:
        only the content of the thought's tokens can help.
      empty_only: the same with an empty thought, which has no content: `start` and `end` only.
      perturbed: by kind, with thoughts perturbed at each share of `PERCENTS`, with the usual mixing.
      ensemble: [B, J] of the mean of the R predicted probabilities of x[j+1]; only in `TokenScores.average_thought`.
    """

    thought_only: Any
    empty_only: Any
    perturbed: dict[str, tuple[Any, ...]]
    ensemble: Any = None


class TokenScores(NamedTuple):
    """Scores at J positions. The first three fields do not depend on thoughts; the others are None without thoughts.

    Attributes:
      real: [B, J] bool, x[j+1] exists, is not padding, and belongs to the same document as x[j].
      base: predictions [B, J] without thoughts.
      base_entropy: [B, J] entropy of these predictions; independent of x[j+1].
      talk: `Prediction` [B, R, J] after each thought; exactly those without thoughts where the mixing weight is 0.
      reward: [B, R, J] increase of the log-likelihood of the next K tokens due to the thought.
      weight: [B, R, J] mixing weight of x[j+1]; with a reach above 1, of all thoughts together.
      thought_entropy: [B, R, J] mean entropy of the distributions that the thought's tokens were drawn from.
      thoughts: [B, R, J, T] int32, as in `sample.Thoughts`.
      made: [B, R, J] bool, whether the policy of thinking makes the thought; where not, the reward is 0 (it is always
        that of the position's own thought); so is the weight, and `talk` is `base`, unless an older thought is used for
        x[j+1]. None without a policy.
      use: `ThoughtUse`; None unless requested.
      rankings: dictionary of [B, 1, J], as from `methods.thinking.rankings`; None unless requested.
    """

    real: Any
    base: Prediction
    base_entropy: Any
    talk: Any = None
    reward: Any = None
    weight: Any = None
    thought_entropy: Any = None
    thoughts: Any = None
    made: Any = None
    use: ThoughtUse | None = None
    rankings: Any = None

    @property
    def thinks(self) -> bool:
        """Whether there are thoughts."""
        return self.thoughts is not None and self.thoughts.shape[-1] > 0

    @property
    def made_thoughts(self) -> np.ndarray:
        """Which thoughts the policy of thinking makes, in the shape of `weight`, bool."""
        return np.ones(self.weight.shape, bool) if self.made is None else self.made

    def thought_places(self) -> np.ndarray:
        """Returns which thought to show for a token: the index of the newest one that the policy makes, [.., J].

        It is -1 where there is none; without a policy, each token has its own.
        """
        made = self.made_thoughts
        newest: np.ndarray = np.maximum.accumulate(np.where(made, np.arange(made.shape[-1]), -1), axis=-1)
        return newest

    def of_text(self, row: int, positions: slice) -> TokenScores:
        """Returns the scores of one text at some of its positions: [J] without thoughts, [R, J] after thoughts."""
        without = jax.tree.map(lambda x: x[row, positions], self[:3])
        return TokenScores(*without, *jax.tree.map(lambda x: x[row, :, positions], self[3:]))

    def of_thoughts(self, which: int | slice) -> TokenScores:
        """Returns the scores of one text, as from `of_text`, with some of its thoughts; one alone has no axis R."""
        return TokenScores(*self[:3], *jax.tree.map(lambda x: x[which], self[3:]))

    def first_thought(self) -> TokenScores:
        """Returns the scores with the first thought, [B, J] in all fields.

        If there are no thoughts, `talk` equals `base`, all other values are 0, and T is 0.
        """
        if self.talk is None:
            zeros = np.zeros_like(self.base.nll)
            return TokenScores(*self[:3], self.base, zeros, zeros, zeros, np.zeros((*zeros.shape, 0), np.int32))
        return TokenScores(*self[:3], *jax.tree.map(lambda x: x[:, 0], self[3:]))

    def average_thought(self) -> TokenScores:
        """Returns means over the R thoughts, [B, J] in all fields, and the loss of their ensemble in `use.ensemble`.

        `thoughts` and the ids of predictions are those of the first thought. If there are no thoughts, the result is
        that of `first_thought`.

        Returns:
          numpy arrays, if the scores are numpy arrays with `use`.
        """
        first = self.first_thought()
        if self.talk is None:
            return first

        def mean(x: np.ndarray) -> np.ndarray:
            return x.mean(axis=1)

        talk = first.talk._replace(nll=mean(self.talk.nll), correct=mean(self.talk.correct))
        ensemble = ensemble_nll(self.talk.nll, axis=1)
        use = None if self.use is None else jax.tree.map(mean, self.use)._replace(ensemble=ensemble)
        return first._replace(
            talk=talk, reward=mean(self.reward), weight=mean(self.weight), thought_entropy=mean(self.thought_entropy),
            use=use,
        )  # fmt: skip


def ensemble_nll(nll: np.ndarray, axis: int) -> np.ndarray:
    """Cross-entropies of the mean of R predicted probabilities, -log mean_r exp(-nll_r); exactly `nll` where R = 1.

    Args:
      nll: cross-entropies, with R thoughts along `axis`, which the result does not have.
    """
    found: np.ndarray = np.log(nll.shape[axis]).astype(nll.dtype) - np.logaddexp.reduce(-nll, axis=axis)
    return found


class Thinking(NamedTuple):
    """A policy of thinking that chooses, and what it needs of texts [B, L], as in `methods.thinking.Position`.

    Without a policy, all positions think, and `TokenScores.rankings` are computed.
    """

    policy: ThinkPolicy | None
    place: jax.Array
    uniform: jax.Array


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
      use: what is computed in `TokenScores.use`; nothing where T is 0.
      wanted: optional results, see `score_given_thoughts`.
    """
    # Chunks are for R thoughts at any position. There is no backward pass, so a chunk needs memory for one layer only.
    config = dataclasses.replace(settings.config, positions="all")
    number, reach = uniforms.tokens.shape[1], settings.reach if settings.thought_length else 1
    settings = dataclasses.replace(settings, num_thoughts=number, rematerialize=True, config=config, reach=reach)
    positions = widened(positions, reach)
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype)
    thoughts = think(model, text, positions, uniforms, settings, greedy) if settings.thought_length else None
    scores = score_given_thoughts(model, text, positions, thoughts, settings, **wanted)
    if use is None or thoughts is None:
        return scores
    chosen = wanted.get("thinking") if scores.made is not None else None
    found = score_use(model, text, positions, thoughts.tokens, scores.talk.nll, use, settings, chosen)
    return scores._replace(use=found)


def score_use(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: jax.Array, nll: jax.Array, wanted: UseWanted,
    settings: ThoughtSettings, thinking: Thinking | None = None,
) -> ThoughtUse:  # fmt: skip
    """Scores x[j+1] at J positions after perturbed thoughts and after thoughts alone.

    The given thoughts are not sampled again. Each number of changed tokens costs one more pass over the chains.

    Args:
      positions, thoughts: as in `score_given_thoughts`, T > 0; nll: [B, R, J] cross-entropy with them.
      settings: with R thoughts per position.
      thinking: as in `score_given_thoughts`, for perturbed thoughts; its policy chooses.
    """
    length, alone = thoughts.shape[-1], dataclasses.replace(settings.config, mixing="none")
    first = settings.reach - 1  # only a position's own thought is measured alone

    def score(tokens: jax.Array, settings: ThoughtSettings, **how: Any) -> jax.Array:
        given = Thoughts(tokens, jnp.zeros(tokens.shape, jnp.float32))
        settings = dataclasses.replace(settings, thought_length=tokens.shape[-1])
        return score_given_thoughts(model, text, positions, given, settings, **how).talk.nll

    def curve(kind: str) -> tuple[jax.Array, ...]:
        draws = jax.tree.map(lambda x: jnp.take(x, positions, axis=2), wanted.draws)
        size, meta_tokens, found = model.decoder.architecture.vocab_size, settings.meta_tokens, {0: nll}
        change = perturb_each if settings.samples_end else perturb
        counts = [percent if settings.samples_end else changed_tokens(length, percent) for percent in PERCENTS]
        for count in counts:
            if count not in found:
                changed = change(thoughts, draws, kind, count, vocab_size=size, meta_tokens=meta_tokens)
                found[count] = score(changed, settings, thinking=thinking)
        return tuple(found[count] for count in counts)

    unmixed = dataclasses.replace(settings, config=alone, reach=1)
    return ThoughtUse(
        score(thoughts, unmixed, hide_text=True)[..., first:],
        score(thoughts[..., :0], unmixed, hide_text=True)[..., first:],
        {kind: curve(kind) for kind in wanted.kinds},
    )


def think(
    model: QuietStar, text: Text, positions: jax.Array, uniforms: Uniforms, settings: ThoughtSettings, greedy: int
) -> Thoughts:
    """Returns R thoughts at J positions, or their replacement under the control; arguments as in `score_tokens`."""
    shuffled = settings.config.control == "shuffled"  # needs the thoughts of all earlier positions
    chosen = jnp.arange(text.tokens.shape[1]) if shuffled else positions
    uniforms = jax.tree.map(lambda x: jnp.take(x, chosen, axis=2), uniforms)
    largest = max_sampled_positions_per_chunk(model.decoder.architecture, settings, *text.tokens.shape)

    def some(first: int, last: int, greedy: bool) -> Thoughts:
        own = jax.tree.map(lambda x: x[:, first:last], uniforms)
        several = dataclasses.replace(settings, num_thoughts=last - first)
        return sample_or_control(model, text, chosen, own, several, even_chunk(chosen.size, largest), greedy=greedy)

    parts = ((0, greedy, True), (greedy, settings.num_thoughts, False))
    thoughts = [some(*part) for part in parts if part[0] < part[1]]
    joined: Thoughts = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *thoughts)
    return jax.tree.map(lambda x: jnp.take(x, positions, axis=2), joined) if shuffled else joined


def score_given_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts | None, settings: ThoughtSettings, *,
    forbidden: tuple[int, ...] = (), candidates: jax.Array | None = None, likeliest: int = 0, hide_text: bool = False,
    thinking: Thinking | None = None,
) -> TokenScores:  # fmt: skip
    """Scores x[j+1] at J positions without thoughts and after given ones; replicated on all devices.

    Args:
      positions: [J]; with a reach N above 1, [N - 1 + J] from `widened`, and the results are for the last J.
      thoughts: [B, R, positions, T], sampled or from elsewhere; None = no thoughts.
      settings: with R thoughts per position.
      forbidden: ids that are never `Prediction.best`.
      candidates: [B, A] ids whose log-probabilities are returned at every position.
      likeliest: N, how many of the likeliest tokens are returned; 0 = none.
      hide_text: the chains do not attend to the text, see `score.chain_hidden_states`.
      thinking: where its policy does not think, the prediction is the one without thoughts; None = all think.
    """
    ahead, reach, mixing = settings.tokens_ahead, settings.reach, MIXINGS[settings.config.mixing]

    def predict(
        text: Text, positions: jax.Array, candidates: Any, log_scores: jax.Array, nll: jax.Array | None = None, *,
        normalized: bool,
    ) -> Prediction:  # fmt: skip
        """log_scores [B, R, J, V]: logits, or log-probabilities if `normalized`; nll [B, R, J], None = from these."""
        target = gather_next_tokens(text.tokens, positions, 1, fill=0)[:, None, :, 0]
        real = real_ahead(text.mask, positions, 1, text.starts)[:, None, :, 0]
        best = mask_meta_tokens(log_scores, forbidden).argmax(axis=-1)
        if nll is None:
            nll = jnp.where(real, -pick(log_scores, jnp.broadcast_to(target, best.shape)), 0.0)
        found = Prediction(nll, best, (best == target) & real)
        total = 0.0 if normalized else jax.nn.logsumexp(log_scores, axis=-1, keepdims=True)
        log_probs = log_scores - total
        if candidates is not None:
            at = candidates[:, None, None]
            found = found._replace(candidates=jnp.take_along_axis(log_probs, at, axis=-1))
        if likeliest:
            top, ids = jax.lax.top_k(log_probs, likeliest)
            found = found._replace(top_ids=ids, top_probabilities=jnp.exp(top))
        return found

    def of_chunk(operands: Any, positions: jax.Array, thoughts: Thoughts | None) -> tuple[TokenScores, Any]:
        model, text, candidates, of_policy = operands
        real = real_ahead(text.mask, positions, ahead, text.starts)
        targets = gather_next_tokens(text.tokens, positions, ahead, fill=0)
        logits = model.decoder.logits(here_and_ahead(text.hidden, positions, ahead))  # [B, J, K, V]
        base_nll = jnp.where(real, cross_entropy(logits, targets), 0.0)  # [B, J, K]
        # `map_chunks` joins along axis 2, so results without thoughts have an axis of one thought here: [B, 1, J].
        first, first_real = logits[:, None, :, 0], real[:, None, :, 0]
        here = text, positions, candidates
        base = predict(*here, first, base_nll[:, None, :, 0], normalized=False)
        without = (first_real, base, entropy(first))
        if thoughts is None:
            return TokenScores(*without), None
        scores = score_thoughts(model, text, positions, thoughts.tokens, settings, base_nll, hide_text=hide_text)
        normalized = mixing.traits["log_probs"]
        talk = predict(*here, scores.log_scores[..., 0, :], scores.nll[..., 0], normalized=normalized)
        weight = scores.weight[..., 0]
        reward = (base_nll[:, None] - scores.nll).sum(axis=-1)
        made = ranked = None
        if thinking is not None:
            place, uniform = (here_and_ahead(x, positions, 1)[:, None, :, 0] for x in of_policy)
            hidden = here_and_ahead(text.hidden, positions, 1)[:, None, :, 0]
            gain = None if model.gate is None else predicted_gain(model.gate, hidden)
            begins = log_prob_of(first, settings.start_token)
            seen = Position(first, without[2], place, uniform, gain, begins)  # [B, 1, J]
            if (policy := thinking.policy) is None:
                ranked = rankings(seen)
            else:
                chosen = thinks(policy.name, jnp.array(policy.numbers, jnp.float32), seen)
                made = jnp.broadcast_to(chosen, weight.shape)
                weight, reward = (jnp.where(made, x, 0.0) for x in (weight, reward))
        talk = _unless_unmoved(weight, base, talk)
        spread = mean_over_actions(thoughts.entropy, actions(thoughts.tokens, settings))
        found = TokenScores(*without, talk, reward, weight, spread, thoughts.tokens, made, rankings=ranked)
        return found, scores.talk_hidden[..., :reach, :] if reach > 1 else None

    def with_older_thoughts(operands: Any, positions: jax.Array, inputs: Any) -> tuple[Prediction, jax.Array]:
        model, text, candidates = operands
        talk_hidden, used, base = inputs
        hidden = here_and_ahead(text.hidden, positions, 1)[:, :, 0]
        mixed, weight = mixed_over_thoughts(model, hidden, talk_hidden, used)
        return _unless_unmoved(weight, base, predict(text, positions, candidates, mixed, normalized=True)), weight

    largest = max_positions_per_chunk(model.decoder.architecture, settings, *text.tokens.shape)
    chunk, operands = even_chunk(positions.size, largest), (model, text, candidates, thinking and thinking[1:])
    scores, hidden = map_chunks(of_chunk, operands, positions, chunk, thoughts, axis=2)
    if hidden is not None:
        used = usable(text, positions, reach)[:, None]
        used = used if scores.made is None else used & scores.made[..., None]
        used = jnp.broadcast_to(used, hidden.shape[:-1])
        last = slice(reach - 1, None)
        positions, scores = positions[last], jax.tree.map(lambda x: x[:, :, last], scores)
        inputs = by_token(hidden, reach), by_token(used, reach), scores.base
        chunk = even_chunk(positions.size, largest)
        talk, weight = map_chunks(with_older_thoughts, operands[:3], positions, chunk, inputs, axis=2)
        scores = scores._replace(talk=talk, weight=weight)
    scores = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), scores)
    return TokenScores(*jax.tree.map(lambda x: x[:, 0], scores[:3]), *scores[3:])


def _unless_unmoved(weight: jax.Array, base: Prediction, talk: Prediction) -> Prediction:
    """Returns `talk` [B, R, J, ..], or `base` [B, 1, J, ..] where the mixing weight is 0: any change is rounding."""

    def choose(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(weight == 0, tuple(range(3, after.ndim))), before, after)

    chosen: Prediction = jax.tree.map(choose, base, talk)
    return chosen
