"""Confidence intervals of means, paired comparisons, and the accuracy of a majority vote of k samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


def confidence_interval(values: Sequence[float] | np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % confidence interval of the mean; None for fewer than two values.

    Clopper and Pearson's exact interval if all values are 0 or 1, so that 20 right of 20 is not certainty; a percentile
    bootstrap otherwise.
    """
    sample = np.asarray(values, np.float64)
    if sample.size < 2:
        return None
    if np.isin(sample, (0.0, 1.0)).all():
        exact = stats.binomtest(int(sample.sum()), sample.size).proportion_ci(CONFIDENCE, method="exact")
        return float(exact.low), float(exact.high)
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    found = stats.bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, batch=max(1, 10**7 // sample.size), confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def interval_of_ratio(
    totals: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray, seed: int, *, rate: bool = False
) -> tuple[float, float] | None:
    """95 % interval of sum(totals) / sum(counts) over units of unequal size, linearised around their mean size.

    Args:
      totals, counts: of each unit, such as the nats and the tokens of a window.
      rate: totals are numbers of right answers among `counts`. The interval is within [0, 1]; if all or none are right,
        it is the exact one of `confidence_interval`, in which each unit that is not empty is one trial.
    """
    amount, size = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    mean = amount.sum() / size.sum()
    if rate and mean in (0.0, 1.0):
        return confidence_interval(np.full(int((size > 0).sum()), mean), seed)
    deviations = (amount - mean * size) / size.mean()
    # Deviations that are all 0 are not wrong answers, for which `confidence_interval` has an exact interval.
    found = confidence_interval(deviations, seed) if deviations.any() or size.size < 2 else (0.0, 0.0)
    if found is None:
        return None
    low, high = (float(mean + end) for end in found)
    return (max(0.0, low), min(1.0, high)) if rate else (low, high)


def interval_of_difference(better: int, worse: int, pairs: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired rates (Agresti and Min, 2005: half a pair is added to each cell).

    Args:
      better, worse: number of pairs in which only the first, or only the second, is right.
    """
    size, change, moved = pairs + 2, better - worse, better + worse + 1
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(moved - change**2 / size) / size
    return max(-1.0, change / size - half), min(1.0, change / size + half)


def compare_paired(
    with_thoughts: Sequence[float] | np.ndarray, without: Sequence[float] | np.ndarray, seed: int
) -> dict[str, Any]:
    """Tests whether thoughts changed the mean over the same questions.

    Right or wrong (0 or 1 in both) is compared with McNemar's exact test, all other values with a sign-flip permutation
    test of the mean difference; both are two-sided.

    Returns:
      `difference` (with minus without), its `interval`, `p_value` and `test`; the last three are None for fewer than
      two questions.
    """
    pair = np.asarray([with_thoughts, without], np.float64)
    change = pair[0] - pair[1]
    result: dict[str, Any] = {
        "difference": float(change.mean()),
        "interval": confidence_interval(change, seed),
        "p_value": None,
        "test": None,
    }
    if change.size < 2:
        return result
    if np.isin(pair, (0.0, 1.0)).all():
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        p_value = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        interval = interval_of_difference(better, worse, change.size)
        return {**result, "interval": interval, "p_value": float(p_value), "test": "McNemar, exact"}
    if not change.any():  # no rates: the exact interval of a rate of 0 has nothing to do with them
        return {**result, "interval": (0.0, 0.0), "p_value": 1.0, "test": "sign flips"}
    found = stats.permutation_test(
        (change,), np.mean, permutation_type="samples", vectorized=True, n_resamples=9999,
        batch=max(1, 10**7 // change.size), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {**result, "p_value": float(found.pvalue), "test": "sign flips"}


def majority_accuracy(votes: Sequence[Hashable | None], truth: Hashable, k: int) -> float:
    """Probability that a majority vote of k of these samples is right: the exact mean over all subsets of size k.

    This is an unbiased estimate for k fresh samples, and uses all samples at every k. Ties are broken at random;
    a sample without an answer (None) does not vote; a vote without voters is wrong.

    Raises:
      ValueError: k is not within 1 .. number of samples.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"A majority of {k} of {len(votes)} samples does not exist.")
    counts = Counter(vote for vote in votes if vote is not None)
    right = counts.pop(truth, 0)
    silent = sum(vote is None for vote in votes)
    won = 0.0
    for most in range(1, min(right, k) + 1):
        ways = _ways(list(counts.values()), silent, k - most, most)
        won += math.comb(right, most) * sum(number / (ties + 1) for ties, number in enumerate(ways))
    return won / math.comb(len(votes), k)


def _ways(others: Sequence[int], silent: int, size: int, most: int) -> list[int]:
    """Number of ways to choose `size` of the other samples so that no answer has more than `most` votes.

    Args:
      others: number of samples with each wrong answer; silent: number of samples without an answer.

    Returns:
      one number for each count of wrong answers that have exactly `most` votes, from 0 on.
    """
    ties = size // most
    ways = [[0] * (ties + 1) for _ in range(size + 1)]  # [samples chosen so far][ties so far]
    ways[0][0] = 1
    for count in others:
        after = [[0] * (ties + 1) for _ in range(size + 1)]
        for chosen in range(size + 1):
            for tied, number in enumerate(ways[chosen]):
                if not number:
                    continue
                for more in range(min(count, most, size - chosen) + 1):
                    after[chosen + more][tied + (more == most)] += number * math.comb(count, more)
        ways = after
    return [
        sum(ways[chosen][tied] * math.comb(silent, size - chosen) for chosen in range(size + 1))
        for tied in range(ties + 1)
    ]
