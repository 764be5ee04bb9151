"""Learn: cross-entropies and REINFORCE as small pure functions of arrays (paper section 4.4).

Axis letters: B batch, R thoughts per position, J positions, K tokens ahead, T thought tokens. All values are
float32; losses and rewards are in nats. Every sum is divided by a count of the whole batch, so that the loss is a plain
sum over chunks of positions and microbatches.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from quietstar_jax.thoughts.text import real_ahead


class Counts(NamedTuple):
    """The divisors of sums over the whole batch.

    Attributes:
      text: number of real tokens that are predicted without thoughts, at least 1.
      targets: [K] number of x[j+1+k] that are scored (see `real_ahead`), over the positions that think; at least 1.
      rewarded: number of positions that REINFORCE averages over, at least 1: B (L - 1 - K) if all positions think,
        padding included, as published; otherwise the number of chosen positions.
    """

    text: jax.Array
    targets: jax.Array
    rewarded: jax.Array | float


def count_targets(
    mask: jax.Array, tokens_ahead: int, chosen: jax.Array | None = None, starts: jax.Array | None = None
) -> Counts:
    """Returns the counts of a batch with mask [B, L].

    Args:
      starts: [B, L] int32, for each token the first token of its document; None = each row is one document.
      chosen: [B] number of positions of each sequence that think, all with K real targets; None = all positions think.
    """
    chex.assert_rank(mask, 2)
    batch, length = mask.shape
    real = real_ahead(mask, jnp.arange(length), tokens_ahead, starts).sum(axis=(0, 1))
    real = jnp.maximum(real, 1).astype(jnp.float32)
    if chosen is None:
        return Counts(real[0], real, float(batch * max(length - 1 - tokens_ahead, 1)))
    total = jnp.maximum(chosen.sum(), 1).astype(jnp.float32)
    return Counts(real[0], jnp.broadcast_to(total, (tokens_ahead,)), total)


def talk_loss(nll: jax.Array, counts: Counts) -> jax.Array:
    """Returns the mean cross-entropy with thoughts over the K tokens ahead; nll [B, R, J, K] is 0 where not real."""
    chex.assert_rank(nll, 4)
    return (nll.sum(axis=(0, 1, 2)) / (nll.shape[1] * counts.targets)).mean()


def rewards(base_nll: jax.Array, talk_nll: jax.Array) -> jax.Array:
    """Returns how much better the K true tokens are predicted with the thought than without it.

    Args:
      base_nll: [B, J, K]; talk_nll: [B, R, J, K]; both 0 where not real text.

    Returns:
      [B, R, J] nats, without gradient.
    """
    chex.assert_rank([base_nll, talk_nll], [3, 4])
    return jax.lax.stop_gradient((base_nll[:, None] - talk_nll).sum(axis=-1))


def advantages(reward: jax.Array, *, positive_only: bool) -> jax.Array:
    """Returns reward [B, R, J] minus its mean over the R thoughts of a position; with R = 1, the reward itself."""
    chex.assert_rank(reward, 3)
    if reward.shape[1] > 1:
        reward = reward - reward.mean(axis=1, keepdims=True)
    return jnp.maximum(reward, 0.0) if positive_only else reward


def policy_loss(advantage: jax.Array, log_probs: jax.Array, counts: Counts, *, reduction: str) -> jax.Array:
    """Returns the REINFORCE loss: minus the mean of advantage times log-probability of the thought.

    Args:
      advantage: [B, R, J] without gradient, 0 at positions without a reward; log_probs: [B, R, J, T].
      reduction: `mean` or `sum` over the tokens of a thought.
    """
    chex.assert_rank([advantage, log_probs], [3, 4])
    thought = log_probs.mean(axis=-1) if reduction == "mean" else log_probs.sum(axis=-1)
    return -(advantage * thought).sum() / (advantage.shape[1] * counts.rewarded)
