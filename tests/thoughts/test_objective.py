"""The objective's small functions, with numbers worked by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.thoughts.objective import (
    advantages,
    count_targets,
    policy_loss,
    rewards,
    talk_loss,
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
    assert float(policy_loss(advantage, log_probs, counts, reduction="mean")) == pytest.approx(1.0)
    assert float(policy_loss(advantage, log_probs, counts, reduction="sum")) == pytest.approx(2.0)


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
