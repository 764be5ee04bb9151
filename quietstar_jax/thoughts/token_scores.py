"""Scores of next tokens without thoughts and after thoughts, as `score_tokens.score_tokens` computes them.

Axis letters: B texts, L tokens per text, J positions, R thoughts per position, T tokens per thought, K tokens ahead,
A candidates, N likeliest tokens, V vocabulary. Position j predicts the token x[j+1]. Losses, rewards and entropies are
in nats, float32. Nothing here has a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np


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
      made: [B, R, J] bool, whether the policy of thinking makes the thought. Where it makes none, the reward is 0, also
        if an older thought is used for x[j+1]; if none is used, the weight is 0, and `talk` equals `base`. Unless `use`
        is requested, `thoughts` has no tokens and `thought_entropy` is 0 wherever the policy makes no thought or x[j]
        is padding. None without a policy.
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
