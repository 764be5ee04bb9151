"""The objective's small functions, with numbers worked by hand."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.thoughts.objective import (
    adapted_entropy_bonus,
    advantages,
    count_targets,
    distillation,
    kl_terms,
    policy_loss,
    policy_terms,
    rewards,
    standard_deviation,
    talk_loss,
    with_batch_std,
)


def test_counts_of_a_padded_batch() -> None:
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    counts = count_targets(mask, 2)
    np.testing.assert_array_equal(counts.targets, [4 + 2, 3 + 1])  # x[j+1], x[j+2] that are real
    assert (counts.text, counts.rewarded) == (6.0, 2 * (5 - 1 - 2))


def test_counts_never_divide_by_zero() -> None:
    counts = count_targets(jnp.zeros((1, 3), bool), 2)
    np.testing.assert_array_equal(counts.targets, [1, 1])
    assert counts.rewarded == 1


def test_talk_loss_is_a_mean_per_step_ahead() -> None:
    counts = count_targets(jnp.ones((1, 3), bool), 2)  # 2 and 1 targets
    nll = jnp.array([[[[1.0, 4.0], [3.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 0.0], [0.0, 0.0]]]])
    # k = 0: (1 + 3 + 2 + 2) / (2 thoughts * 2) = 2;  k = 1: (4 + 2) / (2 * 1) = 3
    assert float(talk_loss(nll, counts)) == pytest.approx(2.5)


def test_rewards_sum_over_the_tokens_ahead() -> None:
    base = jnp.array([[[2.0, 1.0]]])
    talk = jnp.array([[[[1.5, 0.5]], [[3.0, 1.0]]]])
    np.testing.assert_allclose(rewards(base, talk), [[[1.0], [-1.0]]])


def test_advantages_against_the_other_thoughts() -> None:
    reward = jnp.array([[[3.0], [1.0], [-1.0]]])
    np.testing.assert_allclose(advantages(reward, positive_only=True), [[[2.0], [0.0], [0.0]]])
    np.testing.assert_allclose(advantages(reward, positive_only=False), [[[2.0], [0.0], [-2.0]]])


def test_a_single_thought_keeps_its_reward() -> None:
    reward = jnp.array([[[3.0, -2.0]]])
    np.testing.assert_allclose(advantages(reward, positive_only=True), [[[3.0, 0.0]]])


def test_policy_loss_mean_and_sum() -> None:
    counts = count_targets(jnp.ones((1, 5), bool), 2)  # 2 rewarded positions
    advantage = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    log_probs = jnp.array([[[[-1.0, -3.0], [-9.0, -9.0]], [[-9.0, -9.0], [-0.5, -1.5]]]])
    # (1 * 2 + 2 * 1) / (1 sequence * 2 thoughts * 2 positions) for the mean over the two tokens of a thought
    terms = policy_terms(advantage, log_probs)
    assert float(policy_loss(terms, counts, reduction="mean")) == pytest.approx(1.0)
    assert float(policy_loss(terms, counts, reduction="sum")) == pytest.approx(2.0)
    assert float(policy_loss(terms, counts, reduction="sum_over_max", longest=8)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "call",
    [
        lambda: count_targets(jnp.ones(3, bool), 1),
        lambda: rewards(jnp.ones((1, 2)), jnp.ones((1, 1, 2, 1))),
        lambda: advantages(jnp.ones((1, 2)), positive_only=True),
        lambda: talk_loss(jnp.ones((1, 2, 3)), count_targets(jnp.ones((1, 3), bool), 1)),
    ],
)
def test_a_wrong_rank_is_refused(call) -> None:
    with pytest.raises(AssertionError, match="rank"):
        call()


# ------------------------------------------------------------------------- the family: one position, R = 3 and K = 2

BASE = jnp.array([[[2.0, 1.0]]])
TALK = jnp.array([[[[1.0, 0.5]], [[2.2, 1.1]], [[1.6, 0.8]]]])
REWARD = jnp.array([[[1.5], [-0.3], [0.6]]])


def of(x: jax.Array) -> list[float]:
    return [float(value) for value in x.reshape(-1)]


@pytest.mark.parametrize(
    ("name", "tokens", "discount", "expected"),
    [
        ("information_gain", 2, 1.0, (1.5, -0.3, 0.6)),
        ("information_gain", 2, 0.7, (1.35, -0.27, 0.54)),
        ("probability", 1, 1.0, (0.367879, 0.110803, 0.201897)),
        ("mean_probability", 2, 1.0, (0.487205, 0.221837, 0.325613)),
    ],
)
def test_rewards_worked_by_hand(name: str, tokens: int, discount: float, expected: tuple[float, ...]) -> None:
    found = rewards(BASE[..., :tokens], TALK[..., :tokens], name=name, discount=discount)
    assert of(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", (0.9, -0.9, 0.0)),
        ("leave_one_out", (1.35, -1.35, 0.0)),
        ("group_std", (0.999999, -0.999999, 0.0)),
        ("log_mean_exp", (0.605646, -0.294354, -0.106178)),
        ("posterior", (0.636186, 0.105161, 0.258654)),
        ("posterior_centered", (0.302853, -0.228172, -0.074679)),
    ],
)
def test_advantages_worked_by_hand(name: str, expected: tuple[float, ...]) -> None:
    assert of(advantages(REWARD, name=name, positive_only=False)) == pytest.approx(expected, abs=2e-6)
    positive = tuple(max(x, 0.0) for x in expected)
    assert of(advantages(REWARD, name=name, positive_only=True)) == pytest.approx(positive, abs=2e-6)


def test_batch_std_worked_by_hand() -> None:
    reward = jnp.array([[[1.5, 0.1], [-0.3, 0.0], [0.6, -0.1]]])
    counts = with_batch_std(count_targets(jnp.ones((1, 5), bool), 2), reward, jnp.ones((1, 2), bool), "batch_std")
    assert float(counts.reward_std) == pytest.approx(0.660303, abs=1e-6)
    found = advantages(reward, name="batch_std", positive_only=False, reward_std=counts.reward_std)
    assert of(found[..., 0]) == pytest.approx((1.363009, -1.363009, 0.0), abs=3e-6)
    assert of(found[..., 1]) == pytest.approx((0.151445, 0.0, -0.151445), abs=1e-6)


def test_a_standard_deviation_leaves_out_what_is_not_counted() -> None:
    values, where = jnp.array([1.0, 2.0, 100.0, 4.0]), jnp.array([True, True, False, True])
    assert float(standard_deviation(values, where)) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert float(standard_deviation(values, jnp.array([True, False, False, False]))) == 0.0


def test_latro_worked_by_hand() -> None:
    gain = jnp.array([[[-1.5], [-3.3], [-2.4]]])  # minus the sums of nats: what is common to all thoughts cancels
    own, reference = jnp.array([-6.0, -8.0, -7.0]), jnp.array([-7.0, -7.5, -7.0])
    reward = gain - 0.05 * (own - reference)[None, :, None]
    assert of(reward) == pytest.approx((-1.55, -3.275, -2.4))
    assert of(advantages(reward, name="leave_one_out", positive_only=False)) == pytest.approx(
        (1.2875, -1.3, 0.0125), abs=1e-6
    )


def test_clipped_surrogate_and_correction_worked_by_hand() -> None:
    sampled, scored = jnp.zeros((1, 1, 1, 3)), jnp.log(jnp.array([[[[1.0, 1.3, 0.8]]]]))
    for advantage, expected in ((0.9, -0.9), (-0.9, 0.93)):
        terms = policy_terms(jnp.full((1, 1, 1), advantage), scored, sampled, clip_epsilon=0.2)
        assert -float(terms.mean()) == pytest.approx(expected)
    terms = policy_terms(jnp.ones((1, 1, 1)), scored, sampled, importance_cap=1.2)
    assert of(terms) == pytest.approx((0.0, 1.2 * math.log(1.3), 0.8 * math.log(0.8)), abs=1e-6)


def test_kl_talk_losses_and_distillation_worked_by_hand() -> None:
    assert float(kl_terms(jnp.float32(-1.2), jnp.float32(-1.0))) == pytest.approx(math.exp(0.2) - 0.2 - 1, abs=1e-6)
    assert float(kl_terms(jnp.float32(-1.0), jnp.float32(-1.2))) == pytest.approx(0.018731, abs=1e-6)
    counts = count_targets(jnp.ones((1, 4), bool), 2)._replace(targets=jnp.ones(2))
    assert 2 * float(talk_loss(TALK, counts)) == pytest.approx(2.4)
    assert 2 * float(talk_loss(TALK, counts, reduction="log_mean_exp")) == pytest.approx(2.146347, abs=1e-6)

    base, talk = jnp.array([[[2.0, 1.0, 0.0, -1.0]]]), jnp.array([[[[1.0, 2.0, 0.0, -1.0]]]])
    value, gradient = jax.value_and_grad(lambda base: distillation(talk, base).sum())(base)
    assert float(value) == pytest.approx(0.407031, abs=1e-6)
    assert of(gradient) == pytest.approx((0.407031, -0.407031, 0.0, 0.0), abs=1e-6)


def test_the_entropy_bonus_grows_below_the_target_and_stays_in_its_bounds() -> None:
    step = functools.partial(adapted_entropy_bonus, target=2.0, step=0.1, largest=1.0)
    assert [round(float(step(jnp.float32(c), jnp.float32(h))), 6) for c, h in ((0.5, 1.0), (0.5, 3.0))] == [0.6, 0.4]
    assert [float(step(jnp.float32(c), jnp.float32(h))) for c, h in ((1.0, 1.0), (0.05, 3.0))] == [1.0, 0.0]


GROUPS = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=6)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(group=GROUPS, shift=st.floats(-3, 3), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_what_is_common_to_all_thoughts_cancels_and_order_does_not_matter(
    name: str, group: list[float], shift: float, seed: int
) -> None:
    # Numbers that float32 adds exactly, so that equal rewards stay equal.
    s = jnp.round(jnp.array(group, jnp.float32) * 64) / 64
    shift = round(shift * 64) / 64

    def of_group(values: jax.Array) -> jax.Array:
        return advantages(values[None, :, None], name=name, positive_only=False, reward_std=jnp.float32(0.7))[0, :, 0]

    found = of_group(s)
    np.testing.assert_allclose(of_group(s + shift), found, atol=2e-4)
    order = np.random.default_rng(seed).permutation(len(group))
    np.testing.assert_allclose(of_group(s[order]), found[order], atol=2e-5)
    if len(set(s.tolist())) == 1:
        np.testing.assert_array_equal(found, 0.0)
    elif name == "group_std":
        np.testing.assert_allclose(of_group(4 * s), found, atol=1e-3)
    elif name in ("mean", "leave_one_out", "batch_std"):
        np.testing.assert_allclose(of_group(4 * s), 4 * found, rtol=1e-4, atol=1e-4)


def test_a_baseline_changes_batch_std_by_one_factor() -> None:
    reward = jnp.array([[[1.5, 0.1], [-0.3, 0.0], [0.6, -0.1]]])
    scored, counts = jnp.ones((1, 2), bool), count_targets(jnp.ones((1, 5), bool), 2)

    def found(reward: jax.Array) -> jax.Array:
        std = with_batch_std(counts, reward, scored, "batch_std").reward_std
        return advantages(reward, name="batch_std", positive_only=False, reward_std=std)

    before, after = found(reward), found(reward + jnp.array([2.0, -1.0]))  # another number at each position
    np.testing.assert_allclose(after, before * after[0, 0, 0] / before[0, 0, 0], atol=1e-6)
    assert 0 < float(after[0, 0, 0] / before[0, 0, 0]) < 0.9


@pytest.mark.parametrize("name", ADVANTAGES)
def test_one_thought_keeps_its_reward_unless_there_must_be_others(name: str) -> None:
    found = advantages(jnp.array([[[3.0, -2.0]]]), name=name, positive_only=False, reward_std=jnp.float32(0.7))
    np.testing.assert_allclose(found, [[[0.0, 0.0]]] if name == "leave_one_out" else [[[3.0, -2.0]]])


@pytest.mark.parametrize("name", REWARDS)
def test_a_position_without_real_tokens_has_no_reward(name: str) -> None:
    real = jnp.array([[[False, False]]])
    np.testing.assert_array_equal(rewards(0 * BASE, 0 * TALK, real, name=name), jnp.zeros((1, 3, 1)))


def test_every_entry_says_what_it_assumes() -> None:
    for entry in (*REWARDS.values(), *ADVANTAGES.values(), *MIXINGS.values()):
        assert all((entry.assumes, entry.source, entry.formula, entry.fn.__doc__))
