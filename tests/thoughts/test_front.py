"""Loss and answers at each thinking rate: by hand, against single policies, and from the command line."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quietstar_jax.methods.thinking import Position, parse_policy, thinks
from quietstar_jax.thoughts.front import BANDS, Positions, best_bands, summarize_front, trace

# The drawing in front.py: two answers of two tokens each.
BY_HAND = Positions(
    base_nll=np.array([1, 2, 1, 1], np.float32),
    talk_nll=np.array([2, 1, 0.5, 0.5], np.float32),
    base_correct=np.array([True, False, True, False]),
    talk_correct=np.array([False, True, True, True]),
    answer=np.array([0, 0, 1, 1]),
    rankings={"entropy": np.array([0.4, 3.1, 2.0, 2.0]), "random": np.array([0.1, 0.2, 0.3, 0.4])},
)


def test_figures_by_hand():
    front = trace(BY_HAND, "entropy")
    np.testing.assert_allclose(front.share, [0, 1 / 4, 3 / 4, 1])  # equal entropies think together
    np.testing.assert_allclose(front.loss, [5 / 4, 4 / 4, 3 / 4, 4 / 4])
    np.testing.assert_allclose(front.right, [0, 1 / 2, 1, 1 / 2])  # the thought at the first token spoils answer 0
    np.testing.assert_allclose(front.kept, [0, 0, 1, 1])  # with all thoughts, only answer 1 is right
    np.testing.assert_allclose(front.threshold, [math.inf, 2.55, 1.2, -math.inf])
    front = trace(BY_HAND, "random")  # thinks where the number is small
    np.testing.assert_allclose(front.loss, [5 / 4, 6 / 4, 5 / 4, 4.5 / 4, 4 / 4])
    np.testing.assert_allclose(front.right, [0, 0, 0, 0, 1 / 2])
    np.testing.assert_allclose(front.kept, [0, 0, 0, 0, 1])
    np.testing.assert_allclose(front.threshold, [-math.inf, 0.15, 0.25, 0.35, math.inf])


def test_summary_by_hand():
    found = summarize_front(BY_HAND)
    assert (found["positions"], found["answers"]) == (4, 2)
    entropy = found["policies"]["entropy"]
    assert [point["think"] for point in entropy["points"]] == ["never", "entropy:2.55", "entropy:1.2", "always"]
    assert entropy["at_most_15_percent"]["think"] == "never"
    assert entropy["keeps_97_percent"] == entropy["points"][2]
    assert entropy["points"][2]["thinking_rate"] == 3 / 4
    assert found["policies"]["random"]["keeps_97_percent"]["think"] == "always"
    nothing_right = BY_HAND._replace(talk_correct=np.zeros(4, bool))
    found = summarize_front(nothing_right)["policies"]["entropy"]
    assert found["keeps_97_percent"] is None
    assert {point["kept"] for point in found["points"]} == {None}


def test_best_bands_by_hand():
    """Sorted by entropy, the gains are 1, (0.5, 0.5), -1."""
    found = summarize_front(BY_HAND, 5)["policies"][BANDS]
    points = {point["thinking_rate"]: point for point in found["points"]}
    assert [points[share]["think"] for share in (0, 1 / 4, 3 / 4, 1)] == [
        "never",
        "entropy:2.55",
        "entropy:1.2",
        "always",
    ]
    without_noise = BY_HAND._replace(rankings={"entropy": np.array([3.1, 2.0, 2.0, 0.4])})  # the top gains nothing
    front = best_bands(without_noise, np.array([0.25, 0.5]))
    np.testing.assert_allclose(front.share, [1 / 4, 1 / 2])
    np.testing.assert_allclose(front.loss, [(5 - 0.5) / 4, (5 - 1.5) / 4])
    np.testing.assert_allclose([front.threshold, front.most], [[-math.inf, 1.2], [1.2, 2.55]])


def test_equal_entropies_make_a_band_shorter():
    """Entropies 9 (4 times), 5 (twice), 1 (4 times); only the last gain. Half of the positions: the last 4, not 5."""
    ones, entropy = np.ones(10), np.repeat([9.0, 5.0, 1.0], [4, 2, 4])
    positions = Positions(ones, 1.0 * (entropy > 1), ones > 0, ones > 0, np.arange(10), {"entropy": entropy})
    front = best_bands(positions, np.array([0.5]))
    np.testing.assert_allclose([front.share, front.loss, front.most], [[0.4], [0.6], [3.0]])


@pytest.mark.parametrize("seed", range(4))
def test_no_band_of_the_entropy_is_better(seed):
    """Against every band, and the policy itself at the bands found."""
    at = drawn(seed, 60, 20)
    value = at.rankings["entropy"]
    gain = at.base_nll - at.talk_nll
    points = summarize_front(at, 11)["policies"][BANDS]["points"]
    assert len(points) > 5
    for point in points:
        policy = parse_policy(point["think"])
        if policy.constant is None:
            least, most = policy.numbers
            made = (value >= least) & (value <= most)
        else:
            made = np.full(len(value), point["think"] == "always")
        assert point["thinking_rate"] == pytest.approx(made.mean())
        assert point["nats_per_token"] == pytest.approx(np.where(made, at.talk_nll, at.base_nll).mean(), rel=1e-6)
        correct = np.where(made, at.talk_correct, at.base_correct)
        numbers = [number for number in np.unique(at.answer) if number >= 0]
        assert point["right"] == pytest.approx(np.mean([correct[at.answer == number].all() for number in numbers]))
    for share in np.linspace(0, 1, 11):
        found = min(point["nats_per_token"] for point in points if point["thinking_rate"] <= share + 1e-9)
        width = int(share * 60 + 1e-6)
        for least in np.unique(value):
            for most in np.unique(value[value >= least]):
                made = (value >= least) & (value <= most)
                if made.sum() == width:
                    assert found <= at.base_nll.mean() - gain[made].sum() / 60 + 1e-6


def drawn(seed: int, count: int = 300, answers: int = 60) -> Positions:
    """Random positions with many equal quantities, answers of several lengths, and positions of no answer."""
    draw = np.random.default_rng(seed)
    base, talk = draw.exponential(size=(2, count)).astype(np.float32)
    correct = draw.random((2, count)) < 0.7
    ranking = {"entropy": draw.integers(0, 40, count) / 10, "margin": draw.random(count)}
    return Positions(base, talk, *correct, draw.integers(-1, answers, count), ranking)


@pytest.mark.parametrize("name", ["entropy", "margin"])
def test_a_front_has_the_figures_of_each_of_its_policies(name):
    """Against the policy itself and a plain loop over answers."""
    at, value = drawn(0), drawn(0).rankings[name]
    found = summarize_front(at)["policies"][name]["points"]
    assert len(found) > 30
    assert len(summarize_front(at, 20)["policies"][name]["points"]) <= 20
    front = trace(at, name)
    assert (np.diff(front.kept) >= 0).all(), "so the first point that keeps 97 % is the smallest share that does"
    assert (np.diff(front.right) < 0).any()
    for point in found:
        policy = parse_policy(point["think"])
        here = Position(np.log([[0.5 + x / 2, 0.5 - x / 2] for x in value % 1]), value, value.astype(int), value)
        made = np.asarray(thinks(policy.name, np.array(policy.numbers, np.float32), here))
        assert point["thinking_rate"] == pytest.approx(made.mean())
        assert point["nats_per_token"] == pytest.approx(np.where(made, at.talk_nll, at.base_nll).mean(), rel=1e-6)
        correct = np.where(made, at.talk_correct, at.base_correct)
        numbers = [number for number in np.unique(at.answer) if number >= 0]
        right = np.array([correct[at.answer == number].all() for number in numbers])
        always = np.array([at.talk_correct[at.answer == number].all() for number in numbers])
        assert point["right"] == pytest.approx(right.mean())
        assert point["kept"] == pytest.approx(right[always].mean())
