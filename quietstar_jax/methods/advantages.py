"""Advantages: how much better a thought is than the other thoughts of its position.

To add one, write a function, here or in your own file, and decorate it.

Every advantage is a function `(rewards [B, R, J], batch_std) -> [B, R, J]` for R >= 2; `batch_std` is the standard
deviation (ddof 1) of all rewards of the batch, a scalar, or None where the entry is not registered with
`needs_batch_std=True`. `objective.advantages` does what is common to all: it treats single thoughts and equal
rewards, scales and clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from quietstar_jax.lazy import jax, jnp
from quietstar_jax.methods.registry import Registry

AdvantageFn: TypeAlias = "Callable[[jax.Array, jax.Array | None], jax.Array]"
ADVANTAGES: Registry[AdvantageFn] = Registry(one_thought_is_zero=False, needs_batch_std=False)
EPSILON = 1e-6  # added to standard deviations


@ADVANTAGES.register(
    formula=r"s_r - \bar s",
    assumes="Nothing. The gradient keeps the scale of the rewards, shrunk by (R - 1) / R.",
    source="Quiet-STaR (with `positive_only`), Dr. GRPO",
)
def mean(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """Reward minus the mean over the thoughts of the position."""
    return rewards - rewards.mean(axis=1, keepdims=True)


@ADVANTAGES.register(
    formula=r"\frac{R}{R-1}(s_r - \bar s)",
    assumes="R >= 2. The baseline does not depend on the thought itself, so the gradient is unbiased.",
    source="RLOO; RLP (eq. 7)",
    one_thought_is_zero=True,
)
def leave_one_out(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """Reward minus the mean over the other thoughts of the position."""
    return rewards.shape[1] / (rewards.shape[1] - 1) * mean(rewards, batch_std)


@ADVANTAGES.register(
    formula=r"(s_r - \bar s) / (\mathrm{std}_r(s) + \epsilon)",
    assumes="Rewards that differ by more than rounding: positions where thoughts hardly matter count as much as any.",
    source="GRPO",
)
def group_std(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """`mean` divided by the standard deviation (ddof 1) over the thoughts of the position."""
    return mean(rewards, batch_std) / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)


@ADVANTAGES.register(
    formula=r"(s_r - \bar s) / (\mathrm{std}_{\mathrm{batch}}(s) + \epsilon)",
    assumes="A batch large enough for its standard deviation. Costs one more forward pass.",
    source='TRL, `scale_rewards="batch"`',
    needs_batch_std=True,
)
def batch_std(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """`mean` divided by the standard deviation (ddof 1) of all rewards of the batch, over all devices."""
    assert batch_std is not None
    return mean(rewards, None) / (batch_std + EPSILON)


@ADVANTAGES.register(
    formula=r"\log\tfrac1R\sum_q e^{s_q} - \log\tfrac1{R-1}\sum_{q \ne r} e^{s_q}",
    assumes="Rewards in nats: the R thoughts are an ensemble whose likelihood is the mean of theirs.",
    source="VIMCO; JEPO",
)
def log_mean_exp(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """What the thought adds to the log-likelihood of the ensemble of all thoughts of the position."""
    count, rewards = rewards.shape[1], mean(rewards, batch_std)  # what is subtracted cancels
    others = jnp.where(jnp.eye(count, dtype=bool)[..., None], -jnp.inf, rewards[:, None])  # [B, R, R, J]
    without = jax.nn.logsumexp(others, axis=2) - math.log(count - 1)
    exact = jax.nn.logsumexp(rewards, axis=1, keepdims=True) - math.log(count) - without
    # Of small rewards, the logarithms above keep only what exceeds the rounding of log(count).
    excess = jnp.expm1(rewards)
    total = excess.sum(axis=1, keepdims=True)
    small = jnp.log1p(total / count) - jnp.log1p((total - excess) / (count - 1))
    return jnp.where(jnp.abs(rewards).max(axis=1, keepdims=True) < 0.5, small, exact)


@ADVANTAGES.register(
    formula=r"w_r = e^{s_r} / \sum_q e^{s_q}",
    assumes="Rewards in nats. Never negative: every thought is made more likely, the better ones more.",
    source="EM, TRICE, BoLT",
)
def posterior(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """Posterior probability of the thought among the R thoughts of the position."""
    return jax.nn.softmax(rewards, axis=1)


@ADVANTAGES.register(
    formula=r"w_r - 1/R",
    assumes="Rewards in nats. Bounded by 1, so a single rare token cannot dominate.",
    source="EM with a baseline",
)
def posterior_centered(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
    """`posterior` minus its mean, without the rounding of 1/R for small rewards."""
    rewards = rewards - rewards.max(axis=1, keepdims=True)
    return mean(jnp.expm1(rewards), batch_std) / jnp.exp(rewards).sum(axis=1, keepdims=True)
