"""Rewards of thoughts. To add one, write a function, here or in your own file, and decorate it.

Every reward is a function `(base_nll, talk_nll, real, discount) -> [B, R, J]`:

  base_nll: [B, J, K] nats of the K true tokens without the thought.
  talk_nll: [B, R, J, K] the same with each of the R thoughts.
  real: [B, J, K] bool; where False, there is no true token and both losses are 0.
  discount: g; the token k = 0 .. K - 1 counts g^k. Only rewards registered with `discounted=True` use it.

A term that is the same for all R thoughts of a position cancels in every advantage (docs/objectives.md has the proof).
`base_nll` is such a baseline: it matters only with one thought per position, and in logs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from quietstar_jax.lazy import jax, jnp
from quietstar_jax.methods.registry import Registry

RewardFn: TypeAlias = "Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]"
REWARDS: Registry[RewardFn] = Registry(discounted=False, nats=False)


@REWARDS.register(
    formula=r"\sum_k \gamma^k (\mathrm{nll}^{\mathrm{base}}_k - \mathrm{nll}^{\mathrm{talk}}_{r,k})",
    assumes="Any K and R. Nats are unbounded: one very unlikely token can dominate the position.",
    source="Quiet-STaR, RLP, JEPO",
    discounted=True,
    nats=True,
)
def information_gain(base_nll: jax.Array, talk_nll: jax.Array, real: jax.Array, discount: float) -> jax.Array:
    """By how many nats the thought makes the K true tokens more likely, a sum over k."""
    gain = base_nll[:, None] - talk_nll
    if discount != 1.0:
        gain *= discount ** jnp.arange(gain.shape[-1], dtype=gain.dtype)
    return gain.sum(axis=-1)


@REWARDS.register(
    formula=r"\exp(-\sum_k \mathrm{nll}^{\mathrm{talk}}_{r,k})",
    assumes="Small K: the probability of many tokens together is near 0 for every thought.",
    source="VeriFree; for K = 1 the expectation of RPT's 0/1 reward",
)
def probability(base_nll: jax.Array, talk_nll: jax.Array, real: jax.Array, discount: float) -> jax.Array:
    """Probability of the K true tokens together after the thought; bounded, so rare tokens do not dominate."""
    return jnp.exp(-talk_nll.sum(axis=-1))


@REWARDS.register(
    formula=r"\frac1K \sum_k \exp(-\mathrm{nll}^{\mathrm{talk}}_{r,k})",
    assumes="Any K and R. Bounded; a token that is certain already gives no reward to any thought.",
    source="RLPR",
)
def mean_probability(base_nll: jax.Array, talk_nll: jax.Array, real: jax.Array, discount: float) -> jax.Array:
    """Mean probability of each of the K true tokens after the thought."""
    probability = jnp.where(real[:, None], jnp.exp(-talk_nll), 0.0)
    return probability.sum(axis=-1) / jnp.maximum(real.sum(axis=-1, dtype=jnp.float32), 1)[:, None]
