"""The Python API, `import quietstar_jax as qs`: a model as an object, and training from a configuration object."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_collections
import numpy as np

from quietstar_jax.config import Config, from_config_dict
from quietstar_jax.errors import DataError
from quietstar_jax.evals.language_modeling import Windows
from quietstar_jax.evals.measure import WINDOW
from quietstar_jax.evals.tails import ContinuationScorer
from quietstar_jax.inference.generator import Generator, Prompt
from quietstar_jax.methods.thinking import ALWAYS, NEVER, ThinkPolicy, choose_policy
from quietstar_jax.reports.observe import Window, longest_window, observe
from quietstar_jax.thoughts.ending import thought_ids
from quietstar_jax.training.loop import train


@dataclass(frozen=True)
class Thoughts:
    """The thoughts at one position of a text, each between `token` and `next_token`.

    Attributes:
      position: index of `token` in the text, from 0.
      token, next_token: their texts.
      texts: the greedy thought, then the sampled ones.
      ids: [R, T] int32, their tokens; -2 after the end of a thought that ended before T tokens.
      rewards: [R] float32, nats by which each thought makes the next `tokens_ahead` tokens more likely.
      mixing_weights: [R] float32, of the prediction of the next token.
      nll: negative log-likelihood of the next token without a thought, in nats; nll_with_thoughts: [R], after each.
    """

    position: int
    token: str
    next_token: str
    texts: tuple[str, ...]
    ids: np.ndarray
    rewards: np.ndarray
    mixing_weights: np.ndarray
    nll: float
    nll_with_thoughts: np.ndarray


@dataclass(frozen=True)
class Score:
    """How likely a text is.

    Attributes:
      tokens: the texts of the n tokens that are scored: all, if the model has a token that begins or ends a text.
      nll: [n] float32, their negative log-likelihoods without thoughts, in nats.
      nll_with_thoughts: [n], each after a greedy thought; None without thoughts.
    """

    tokens: tuple[str, ...]
    nll: np.ndarray
    nll_with_thoughts: np.ndarray | None


class Model(Generator):
    """A trained model: `generate` and `stream` continue texts, `think` shows thoughts, `score` measures texts."""

    def think(
        self, text: Prompt, positions: Sequence[int] | None = None, *, samples: int = 0,
        thought_length: int | None = None, tokens_ahead: int | None = None, reach: int | None = None, seed: int = 0,
    ) -> list[Thoughts]:  # fmt: skip
        """Thinks inside a text, and scores the thoughts on the tokens that follow.

        Only thoughts that are needed are computed. A program is compiled once per text length, rounded up to a multiple
        of 8, and reused by later calls.

        Args:
          text: a text, which begins as the training texts did, or token ids; n tokens.
          positions: indices of tokens after which to think, 0 .. n - 2; negative ones count from the end, as in Python.
            None = all but the last.
          samples: number of random thoughts at each position, after the greedy one.
          thought_length, tokens_ahead: T and K; None = as trained.
          reach: number of tokens after a thought for which it is used; above 1 only with the mixing `probabilities`;
            None = that of the model, at most `tokens_ahead`.
          seed: of the random thoughts.

        Raises:
          UserError: the model cannot think, the text is too long, or there is no such position.
        """
        model, ids = self.model, self.encode(text)
        reach = model.own_reach(tokens_ahead) if reach is None else reach
        settings = model.settings(thought_length, tokens_ahead or model.tokens_ahead, reach)
        if not settings.thought_length:
            raise DataError(f"{model.path} has no thoughts of its own. Give a run or an export trained with thoughts.")
        longest = longest_window(model, settings, len(ids))
        if not 2 <= len(ids) <= longest:
            raise DataError(f"The text has {len(ids)} tokens; it must have 2 .. {longest}, thoughts need the rest.")
        count = len(ids)
        chosen = range(count - 1) if positions is None else [p + count if p < 0 else p for p in positions]
        if wrong := [p for p in chosen if not 0 <= p < count - 1]:
            raise DataError(f"positions has {wrong[0]}; it must be within 0 .. {count - 2}: a token must follow.")
        used = np.zeros((1, count), bool)  # with a reach, also the older thoughts that predictions use
        used[0, [max(p - age, 0) for p in chosen for age in range(reach)]] = True
        window = Window(0, np.asarray(ids, np.int32))
        (seen,) = observe(model, settings, [window], samples=samples, seed=seed, among=used)
        decode = model.tokenizer.decode
        return [
            Thoughts(
                p, decode(ids[p : p + 1]), decode(ids[p + 1 : p + 2]),
                tuple(decode(thought_ids(thought)) for thought in seen.thoughts[:, p]),
                seen.thoughts[:, p], seen.reward[:, p], seen.weight[:, p], float(seen.base.nll[p]),
                seen.talk.nll[:, p],
            )
            for p in chosen
        ]  # fmt: skip

    def score(self, text: Prompt, *, thoughts: bool | None = None, think: str | None = None, seed: int = 0) -> Score:
        """Scores each token of a text without thoughts, and after a greedy thought.

        Long texts are read in overlapping windows of up to 1,024 tokens, as `quietstar evaluate --task
        language_modeling` does. The program is compiled once for each choice of `thoughts`, `think` and `seed`.

        Args:
          text: a text or token ids. The first token is scored only after a token that begins or ends texts.
          thoughts: whether to think; None = if the model can.
          think: policy that chooses the tokens that get a thought, see `methods/thinking.py`; None = that of the model.
          seed: of a policy that draws.

        Raises:
          UserError: thoughts are requested from a model that cannot think, or nothing can be scored.
        """
        model = self.model
        ids = list(self.encode(text))
        begin = model.bos or model.eos_ids[:1]
        if isinstance(text, str) and not model.bos:
            ids = [*begin, *ids]
        if len(ids) < 2:
            raise DataError("The text has one token, before which there is nothing. Give a longer text.")
        policy = model.check_policy(choose_policy(thoughts, think, model.think))
        scorer = self._scorer(policy, seed)
        length = min(WINDOW, scorer.longest)
        tails = [tail._replace(number=number) for number, tail in enumerate(Windows(length, length // 2).tails(ids))]
        scores = scorer(tails)
        base = np.concatenate([score.base.nll for score in scores])
        talk = None if policy == NEVER else np.concatenate([score.talk.nll for score in scores])
        return Score(tuple(model.tokenizer.decode([i]) for i in ids[1:]), base, talk)

    @functools.cached_property
    def _scorers(self) -> dict[tuple[ThinkPolicy, int], ContinuationScorer]:
        return {}

    def _scorer(self, policy: ThinkPolicy, seed: int) -> ContinuationScorer:
        if (policy, seed) not in self._scorers:
            length, reach = self.model.thought_length or 1, self.model.own_reach()  # 1: is refused
            settings = self.model.settings(0) if policy == NEVER else self.model.settings(length, reach=reach)
            think = ALWAYS if policy == NEVER else policy  # of no thoughts, which are nowhere
            self._scorers[policy, seed] = ContinuationScorer(
                self.model, settings, self.batch_size, think=think, seed=seed
            )
        return self._scorers[policy, seed]


def train_model(config: Config | ml_collections.ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Trains the model of a configuration, or resumes the run in its work directory, in this process.

    Args:
      config: from `default_config()` or a module of `quietstar_jax.configs`, changed as needed.

    Returns:
      the summary, which is also in `summary.json` of the work directory; `Model.open(config.workdir)` opens the model.

    Raises:
      UserError: a setting is impossible, or the run cannot start or continue; the message says what to do.
    """
    return train(config if isinstance(config, Config) else from_config_dict(config))
