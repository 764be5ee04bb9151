"""Figures that show whether predictions use the content of thoughts: perturbed thoughts, thoughts alone, ensembles.

All losses are in nats per token, of the same tokens; intervals and comparisons are over windows of text, each weighted
by its number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quietstar_jax.evals.statistics import compare_paired, interval_of_ratio
from quietstar_jax.thoughts.ending import thought_lengths
from quietstar_jax.thoughts.perturbations import PERCENTS, changed_tokens
from quietstar_jax.thoughts.token_scores import TokenScores, ensemble_nll


class WindowLosses:
    """Losses of windows in nats per token, with intervals; and their differences, window by window."""

    def __init__(self, counts: np.ndarray, seed: int):
        """Args: counts: tokens of each window; seed: of the bootstrap."""
        self._counts, self._seed = counts, seed

    def loss(self, per_window: np.ndarray) -> dict[str, Any]:
        """Returns `nats_per_token` and `nats_per_token_interval`; per_window: nats of each window."""
        return {
            "nats_per_token": float(per_window.sum() / self._counts.sum()),
            "nats_per_token_interval": interval_of_ratio(per_window, self._counts, self._seed),
        }

    def difference(self, after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
        """Returns `compare_paired` of nats per token, after minus before; arguments as in `loss`."""
        # Divided by the mean count, not each window's own, so that the mean is the difference of the two losses.
        mean = self._counts.mean()
        return compare_paired(after / mean, before / mean, self._seed)


def summarize_use(columns: Sequence[TokenScores], seed: int, samples: int = 0) -> dict[str, Any]:
    """Computes the figures of the scored tokens of windows.

    Args:
      columns: [tokens] of each window, as from `TokenScores.average_thought`, with `use`.
      samples: R, the number of sampled thoughts per position of which `columns` are means; 0 = one greedy thought.

    Returns:
      `thought_only_loss`, and `thought_only` with the loss, its interval, that of an empty thought without the text
      (`empty_thought`), and the paired `gain_over_empty_thought`;
      with samples, `ensemble`: `samples`, the loss, its interval, `one_thought` (the mean of the losses with one of the
      thoughts), `gain_over_one_thought` and `gain_over_no_thoughts`;
      with perturbations, `perturbed` by kind, a row for each share: `percent`, `changed_tokens` of each thought
      (their mean where thoughts differ in length), the
      loss, its interval, and the paired `change` from share 0.
    """
    losses = WindowLosses(np.array([column.base.nll.size for column in columns]), seed)
    uses: list[Any] = [column.use for column in columns]
    alone, empty = (_totals([getattr(use, name) for use in uses]) for name in ("thought_only", "empty_only"))
    found: dict[str, Any] = {"thought_only_loss": losses.loss(alone)["nats_per_token"]}
    found["thought_only"] = {
        **losses.loss(alone),
        "empty_thought": losses.loss(empty),
        "gain_over_empty_thought": losses.difference(empty, alone),
    }
    if samples:
        together = _totals([use.ensemble for use in uses])
        one, without = (
            _totals([column.talk.nll for column in columns]),
            _totals([column.base.nll for column in columns]),
        )
        found["ensemble"] = {"samples": samples, **_ensemble(losses, together, one, without)}
    for kind in uses[0].perturbed:
        curve = [_totals([use.perturbed[kind][i] for use in uses]) for i in range(len(PERCENTS))]
        found.setdefault("perturbed", {})[kind] = [
            {
                "percent": percent,
                "changed_tokens": _changed_tokens(columns, percent),
                **losses.loss(perturbed),
                "change": losses.difference(perturbed, curve[0]),
            }
            for percent, perturbed in zip(PERCENTS, curve, strict=True)
        ]
    return found


def ensembles(columns: Sequence[TokenScores], seed: int) -> list[dict[str, Any]]:
    """Returns the figures of ensembles of 1 .. R thoughts, as `ensemble` in `summarize_use`.

    An ensemble of k of the R thoughts is averaged over the R choices of k neighbours in a circle: for k = 1 it is the
    mean loss with one thought, and every thought counts equally for each k.

    Args:
      columns: of each window, [tokens] without and [R, tokens] after thoughts, as from `TokenScores.of_text`.
    """
    losses = WindowLosses(np.array([column.base.nll.size for column in columns]), seed)
    without = _totals([column.base.nll for column in columns])
    one = _totals([column.talk.nll.mean(axis=0) for column in columns])
    found = []
    for k in range(1, len(columns[0].talk.nll) + 1):
        circle = [np.stack([np.roll(column.talk.nll, -i, axis=0) for i in range(k)]) for column in columns]
        together = _totals([ensemble_nll(nll, axis=0).mean(axis=0) for nll in circle])
        found.append({"samples": k, **_ensemble(losses, together, one, without)})
    return found


def _ensemble(losses: WindowLosses, together: np.ndarray, one: np.ndarray, without: np.ndarray) -> dict[str, Any]:
    return {
        **losses.loss(together),
        "one_thought": losses.loss(one),
        "gain_over_one_thought": losses.difference(one, together),
        "gain_over_no_thoughts": losses.difference(without, together),
    }


def _changed_tokens(columns: Sequence[TokenScores], percent: int) -> float:
    """Returns how many tokens of a thought are changed; the mean where thoughts differ in length."""
    lengths = np.concatenate([np.ravel(thought_lengths(column.thoughts)) for column in columns])
    mean = float(changed_tokens(lengths, percent).mean())
    return int(mean) if mean.is_integer() else round(mean, 2)


def _totals(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([value.sum(dtype=np.float64) for value in values])
