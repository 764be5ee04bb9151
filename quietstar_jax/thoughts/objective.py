"""Learn: cross-entropies and REINFORCE as small pure functions of arrays (paper section 4.4).

Axis letters: B batch, R thoughts per position, J positions, K tokens ahead, T thought tokens. All values are
float32; losses and rewards are in nats. Every sum is divided by a count of the whole batch, so that the loss is a plain
sum over chunks of positions and microbatches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from quietstar_jax.methods.advantages import ADVANTAGES, EPSILON
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.thoughts.ending import mean_over_actions
from quietstar_jax.thoughts.text import real_ahead


class Counts(NamedTuple):
    """The divisors of sums over the whole batch.

    Attributes:
      text: number of real tokens that are predicted without thoughts, at least 1.
      targets: [K] number of x[j+1+k] that are scored (see `real_ahead`), over the positions that think; at least 1.
      rewarded: number of positions that REINFORCE averages over, at least 1: B (L - 1 - K) if all positions think,
        padding included, as published; otherwise the number of chosen positions.
      scored: number of these positions whose x[j+1] is real, at least 1.
      reward_std, advantage_std: standard deviations (ddof 1) over all thoughts of the batch that have a reward; None
        unless a setting divides by them; see `standard_deviation`.
    """

    text: jax.Array
    targets: jax.Array
    rewarded: jax.Array | float
    scored: jax.Array
    reward_std: jax.Array | None = None
    advantage_std: jax.Array | None = None


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
    ahead = real_ahead(mask, jnp.arange(length), tokens_ahead, starts)

    def at_least_one(count: jax.Array) -> jax.Array:
        return jnp.maximum(count, 1).astype(jnp.float32)

    real = at_least_one(ahead.sum(axis=(0, 1)))
    if chosen is None:
        scored = at_least_one(ahead[:, : max(length - 1 - tokens_ahead, 0), 0].sum())
        return Counts(real[0], real, float(batch * max(length - 1 - tokens_ahead, 1)), scored)
    total = at_least_one(chosen.sum())
    return Counts(real[0], jnp.broadcast_to(total, (tokens_ahead,)), total, total)


def talk_loss(nll: jax.Array, counts: Counts, *, reduction: str = "mean") -> jax.Array:
    """Returns the cross-entropy with thoughts per token, over the K tokens ahead; nll [B, R, J, K] is 0 where not real.

    Args:
      reduction: `mean` over the R thoughts, as published: a mean over positions for each k, then over k; or
        `log_mean_exp` (JEPO), the loss of the ensemble of the R thoughts, -log mean_r exp(-sum_k nll), divided by the
        number of all scored tokens.
    """
    chex.assert_rank(nll, 4)
    if reduction == "log_mean_exp":
        return -ensemble(-nll.sum(axis=-1), axis=1).sum() / counts.targets.sum()
    return (nll.sum(axis=(0, 1, 2)) / (nll.shape[1] * counts.targets)).mean()


def ensemble(log_likelihoods: jax.Array, axis: int) -> jax.Array:
    """Returns log mean exp over an axis of thoughts: the log-likelihood under a thought chosen uniformly."""
    return jax.nn.logsumexp(log_likelihoods, axis=axis) - math.log(log_likelihoods.shape[axis])


def rewards(
    base_nll: jax.Array, talk_nll: jax.Array, real: jax.Array | None = None, *, name: str = "information_gain",
    discount: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Returns the rewards of thoughts, by default how much better the K true tokens are predicted with the thought.

    Args:
      base_nll: [B, J, K]; talk_nll: [B, R, J, K]; both 0 where x[j+1+k] is not real.
      real: [B, J, K] bool; None = all tokens are real.
      name: an entry of `REWARDS`.

    Returns:
      [B, R, J], without gradient; 0 where no token is real.
    """
    chex.assert_rank([base_nll, talk_nll], [3, 4])
    real = jnp.ones(base_nll.shape, bool) if real is None else real
    reward = REWARDS[name].fn(base_nll, talk_nll, real, discount)
    return jax.lax.stop_gradient(jnp.where(real.any(axis=-1)[:, None], reward, 0.0))


def advantages(
    reward: jax.Array, *, name: str = "mean", positive_only: bool, scale: str = "none", clip: float = 0.0,
    reward_std: jax.Array | None = None, advantage_std: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Returns how much better each thought is than the others of its position, without gradient.

    The advantage of a single thought is its reward (0 for `leave_one_out`, which needs other thoughts). Where all R
    rewards are equal, every advantage is exactly 0: equal rewards do not distinguish the thoughts.

    Args:
      reward: [B, R, J].
      name: an entry of `ADVANTAGES`.
      positive_only: negative advantages become 0, after all other operations.
      scale: `batch` divides by `advantage_std`; `none` does not.
      clip: bound of the absolute value, after the scale; 0 = none.
      reward_std, advantage_std: see `Counts`.
    """
    chex.assert_rank(reward, 3)
    reward, entry = jax.lax.stop_gradient(reward), ADVANTAGES[name]
    if reward.shape[1] > 1:
        differ = (reward != reward[:, :1]).any(axis=1, keepdims=True)
        advantage = jnp.where(differ, entry.fn(reward, reward_std), 0.0)
    else:
        advantage = jnp.zeros_like(reward) if entry.traits["one_thought_is_zero"] else reward
    if scale == "batch":
        assert advantage_std is not None
        advantage = advantage / (advantage_std + EPSILON)
    if clip:
        advantage = jnp.clip(advantage, -clip, clip)
    return jnp.maximum(advantage, 0.0) if positive_only else advantage


def standard_deviation(values: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the standard deviation (ddof 1) of the values for which `where` is True; 0 for one value."""
    count = where.sum(dtype=jnp.float32)
    mean = jnp.where(where, values, 0.0).sum() / jnp.maximum(count, 1)
    squares = jnp.where(where, (values - mean) ** 2, 0.0).sum()
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def with_batch_std(counts: Counts, reward: jax.Array, scored: jax.Array, advantage: str) -> Counts:
    """Returns counts with the standard deviations over the whole batch.

    Args:
      reward: [B, R, J]; scored: [B, J] bool, the positions whose rewards are included; advantage: an entry of
        `ADVANTAGES`.
    """
    where = jnp.broadcast_to(scored[:, None], reward.shape)
    reward_std = standard_deviation(reward, where)
    raw = advantages(reward, name=advantage, positive_only=False, reward_std=reward_std)
    return counts._replace(reward_std=reward_std, advantage_std=standard_deviation(raw, where))


def policy_terms(
    advantage: jax.Array, log_probs: jax.Array, sampled_log_probs: jax.Array | None = None, *,
    clip_epsilon: float = 0.0, importance_cap: float = 0.0,
) -> jax.Array:  # fmt: skip
    """Returns what the policy gradient maximizes for each thought token, [B, R, J, T].

    With rho = exp(log_probs - sampled_log_probs), the ratio of the scored to the sampling distribution:

      neither option     A log pi
      importance_cap c   A min(rho, c) log pi, no gradient through rho: corrects for sampling from another distribution
      clip_epsilon e     min(rho A, clip(rho, 1 - e, 1 + e) A): PPO's surrogate

    Args:
      advantage: [B, R, J] without gradient; log_probs: [B, R, J, T] at the temperature of scoring;
        sampled_log_probs: the same at the temperature of sampling, without gradient.
    """
    chex.assert_rank([advantage, log_probs], [3, 4])
    advantage = advantage[..., None]
    if not clip_epsilon and not importance_cap:
        return advantage * log_probs
    assert sampled_log_probs is not None
    ratio = jnp.exp(log_probs - sampled_log_probs)
    if clip_epsilon:
        return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon) * advantage)
    return advantage * jax.lax.stop_gradient(jnp.minimum(ratio, importance_cap)) * log_probs


def ratio_metrics(
    advantage: jax.Array,
    log_probs: jax.Array,
    sampled_log_probs: jax.Array,
    *,
    clip_epsilon: float,
    importance_cap: float,
) -> dict[str, jax.Array]:
    """Returns `importance_ratio`, and `clip_ratio`, 1 where `policy_terms` limits the ratio; both [B, R, J, T]."""
    ratio, advantage = jnp.exp(log_probs - sampled_log_probs), advantage[..., None]
    metrics = {"importance_ratio": ratio}
    if clip_epsilon:
        limited = ((ratio > 1 + clip_epsilon) & (advantage > 0)) | ((ratio < 1 - clip_epsilon) & (advantage < 0))
        metrics["clip_ratio"] = limited.astype(jnp.float32)
    elif importance_cap:
        metrics["clip_ratio"] = (ratio > importance_cap).astype(jnp.float32)
    return metrics


def reduce_tokens(values: jax.Array, reduction: str, longest: int, acts: jax.Array | None = None) -> jax.Array:
    """Reduces values [..., T] over the tokens of a thought.

    Args:
      reduction: `mean` (published code), `sum` (paper), or `sum_over_max` (Dr. GRPO), the sum divided by `longest`, so
        that a token has the same weight in phases with different thought lengths.
      longest: largest thought length of this phase and those before it.
      acts: see `ending.actions`; the mean is over the actions of each thought, and others do not count.
    """
    if reduction == "mean":
        return mean_over_actions(values, acts)
    total = (values if acts is None else jnp.where(acts, values, 0.0)).sum(axis=-1)
    return total if reduction == "sum" else total / longest


def policy_loss(
    terms: jax.Array, counts: Counts, *, reduction: str, longest: int = 1, acts: jax.Array | None = None
) -> jax.Array:
    """Returns the REINFORCE loss: minus the mean over thoughts and positions of the reduced terms [B, R, J, T].

    The terms must be 0 at positions without a reward; see `policy_terms` and `reduce_tokens`.
    """
    chex.assert_rank(terms, 4)
    return -reduce_tokens(terms, reduction, longest, acts).sum() / (terms.shape[1] * counts.rewarded)


def kl_terms(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the estimate e^d - d - 1 (k3) of the KL divergence to a reference, d = reference - log_probs.

    Args:
      log_probs, reference: log-probabilities of the same sampled tokens.
    """
    difference = reference - log_probs
    return jnp.expm1(difference) - difference


def distillation(talk_logits: jax.Array, base_logits: jax.Array) -> jax.Array:
    """Returns KL(talk || base) in nats, [B, R, J].

    It trains the prediction without thoughts to match the prediction with thoughts.

    Args:
      talk_logits: [B, R, J, V], the teacher, without gradient; base_logits: [B, J, V], or broadcastable.
    """
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(talk_logits))
    student = jax.nn.log_softmax(base_logits)[:, None]
    return (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)


def adapted_entropy_bonus(
    bonus: jax.Array, entropy: jax.Array, *, target: float, step: float, largest: float
) -> jax.Array:
    """Returns the next bonus: a step higher if the entropy is below the target, lower if above, within 0 .. largest."""
    return jnp.clip(bonus + jnp.sign(target - entropy) * step, 0.0, largest)
