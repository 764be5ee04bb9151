import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar_jax.evals.statistics import (
    compare_paired,
    confidence_interval,
    interval_of_difference,
    interval_of_ratio,
    majority_accuracy,
)


def by_brute_force(votes, truth, k):
    """Every subset, every tie."""
    total = []
    for subset in itertools.combinations(votes, k):
        counts = Counter(vote for vote in subset if vote is not None)
        winners = [vote for vote, count in counts.items() if count == max(counts.values())]
        total.append((truth in winners) / len(winners) if winners else 0.0)
    return np.mean(total)


@given(votes=st.lists(st.sampled_from(["18", "3", "7", "9", None]), min_size=1, max_size=9), data=st.data())
def test_majority_is_the_mean_over_all_subsets(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    assert majority_accuracy(votes, "18", k) == pytest.approx(by_brute_force(votes, "18", k), abs=1e-12)


def test_majority_by_hand():
    # Two of three right. k = 1: 2/3. k = 2: {r, r} wins, two of {r, w} tie -> (1 + 1/2 + 1/2) / 3. k = 3: right.
    votes = ["18", "18", "5"]
    assert majority_accuracy(votes, "18", 1) == pytest.approx(2 / 3)
    assert majority_accuracy(votes, "18", 2) == pytest.approx(2 / 3)
    assert majority_accuracy(votes, "18", 3) == 1.0
    assert majority_accuracy([None, None], "18", 2) == 0.0
    assert majority_accuracy(["18", None], "18", 2) == 1.0  # silence does not vote


def test_majority_of_many_samples_is_fast_and_within_bounds():
    votes = ["a"] * 20 + ["b"] * 20 + [str(i % 7) for i in range(24)]
    rates = [majority_accuracy(votes, "a", k) for k in range(1, 65)]
    assert rates[0] == pytest.approx(20 / 64)
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[-1] == pytest.approx(0.5)  # all samples: a and b tie


def test_majority_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="3 of 2"):
        majority_accuracy(["1", "2"], "1", 3)


def test_interval_holds_the_mean_and_narrows_with_more_values():
    draw = np.random.default_rng(0)
    few, many = draw.random(20), draw.random(2000)
    for values in (few, many):
        low, high = confidence_interval(values, seed=0)
        assert low < values.mean() < high
    assert np.ptp(confidence_interval(many, seed=0)) < np.ptp(confidence_interval(few, seed=0)) / 3
    assert confidence_interval([0.5, 0.5], seed=0) == (0.5, 0.5)
    assert confidence_interval([1.0], seed=0) is None
    assert confidence_interval(few, seed=1) == confidence_interval(few, seed=1)


def test_all_right_and_all_wrong_are_not_certain():
    # None of n: the upper end solves (1 - p)^n = 0.025.
    for size in (2, 20, 1319):
        low, high = confidence_interval(np.zeros(size), seed=0)
        assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / size)))
        assert confidence_interval(np.ones(size), seed=0) == (pytest.approx(1 - high), 1.0)
    assert confidence_interval(np.zeros(1319), seed=0)[1] == pytest.approx(0.0028, abs=1e-4)
    for pairs in (np.zeros((2, 20)), np.ones((2, 20))):
        low, high = compare_paired(*pairs, seed=0)["interval"]
        assert low < -0.05
        assert high > 0.05


def test_intervals_of_ratios():
    counts = [3, 0, 1, 2, 5]  # four units that are not empty
    for wrong, right in ((np.zeros(5), np.array(counts)), (np.zeros(5, int), np.array(counts, float))):
        assert interval_of_ratio(wrong, counts, seed=0, rate=True) == (0.0, pytest.approx(1 - 0.025**0.25))
        assert interval_of_ratio(right, counts, seed=0, rate=True) == (pytest.approx(0.025**0.25), 1.0)
    assert interval_of_ratio([1], [1], seed=0, rate=True) is None
    assert interval_of_ratio([2.0], [1], seed=0) is None
    # Without `rate`: a loss that is the same in all units has no spread, whatever its value.
    for loss in (0.0, 0.5, 1.0, 2.0):
        assert interval_of_ratio(loss * np.array(counts), counts, seed=0) == (loss, loss)
    # One unit has most answers: linearised, the interval exceeds [0, 1] on one side.
    for totals in ([1, 1, 1, 0], [0, 0, 0, 97]):
        low, high = interval_of_ratio(totals, [1, 1, 1, 97], seed=0)
        bounded = interval_of_ratio(totals, [1, 1, 1, 97], seed=0, rate=True)
        assert low < 0.0 or high > 1.0
        assert bounded == (max(0.0, low), min(1.0, high))


def test_the_interval_of_a_paired_difference_covers_it_as_often_as_it_says():
    draw, inside = np.random.default_rng(2), []
    for _ in range(400):
        better, worse, _ = draw.multinomial(80, (0.1, 0.05, 0.85))
        low, high = interval_of_difference(int(better), int(worse), 80)
        inside.append(low <= 0.05 <= high)
    assert 0.92 < np.mean(inside) < 0.99


def test_interval_covers_the_true_mean_as_often_as_it_says():
    draw = np.random.default_rng(1)
    inside = [low <= 0.3 <= high for low, high in (confidence_interval(draw.random(60) < 0.3, 0) for _ in range(60))]
    assert np.mean(inside) > 0.85


def test_paired_by_hand():
    # Of ten questions five turn right, none wrong: 2 * 0.5 ** 5.
    found = compare_paired([1] * 8 + [0] * 2, [1] * 3 + [0] * 7, seed=0)
    assert found["difference"] == pytest.approx(0.5)
    assert found["p_value"] == pytest.approx(2 * 0.5**5)
    assert found["test"] == "McNemar, exact"
    # Four differences of one sign: of 2 ** 4 flips, 2 are as large.
    found = compare_paired([0.5, 0.6, 0.7, 0.8], [0.4, 0.5, 0.6, 0.7], seed=0)
    assert found["p_value"] == pytest.approx(2 / 16)
    assert found["test"] == "sign flips"
    assert compare_paired([0.3, 0.4], [0.3, 0.4], seed=0)["p_value"] == 1.0
    assert compare_paired([0.3], [0.4], seed=0)["p_value"] is None
