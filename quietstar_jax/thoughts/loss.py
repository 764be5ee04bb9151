"""The loss of one batch: the base pass over the text, then thoughts, their scores and REINFORCE.

    params ───┬──> read_text ──┬──> nll ──> base_loss
              │                ├──> hidden, prefix, nll ──┐
              │                └──> layer weights ────────┤
              │                                           v
              └──> other weights ──────────────────> sum_chunks ──> thought_loss
                                                          ^
    think (no gradient) ──> thoughts ─────────────────────┘

`sum_chunks` computes the gradients of `thought_loss` with respect to its inputs in its own forward pass, summed over
chunks. The backward pass of `read_text` then runs once, however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.models.decoder import KEY_VALUE_AXES, KeyValues, LayerWeights
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.chunks import map_chunks, sum_chunks, take_chunk, take_positions
from quietstar_jax.thoughts.diagnostics import distinct_thoughts, entropy_histogram
from quietstar_jax.thoughts.ending import actions, length_metrics, mean_over_actions, thought_lengths
from quietstar_jax.thoughts.gate import gate_logits, gate_loss, gate_targets, mean_gain
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.objective import (
    Counts,
    advantages,
    distillation,
    kl_terms,
    policy_loss,
    policy_terms,
    ratio_metrics,
    rewards,
    talk_loss,
)
from quietstar_jax.thoughts.positions import Choose, every_position, ranked_by
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.score import Scores, score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, here_and_ahead, read_text, real_ahead

Metrics = dict[str, jax.Array]
Think = Callable[[QuietStar, Text, jax.Array], Thoughts]
Frozen = Callable[[str], bool]

EQUAL_REWARDS = 1e-6  # nats, or share of the largest reward: differences up to this are rounding

_KEYS_AND_VALUES: Any = (KEY_VALUE_AXES, KEY_VALUE_AXES)
_READ_AXES = {
    "hidden": ("batch", "keys", "hidden"),
    "prefix": KeyValues(*_KEYS_AND_VALUES),
    "nll": ("batch", "keys"),
}


def nothing(name: str) -> bool:
    """Returns False for every name: no parameter is frozen."""
    return False


def language_model_loss(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, counts: Counts, settings: ThoughtSettings,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """Next-token loss for phases without thoughts: tokens, mask, starts [B, L] -> (mean loss, metrics)."""
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype, rematerialize=settings.rematerialize)
    loss = text.nll.sum() / counts.text
    return loss, {"loss": loss, "base_loss": loss}


def quiet_star_loss(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, think: Think, counts: Counts, settings: ThoughtSettings,
    positions_per_chunk: int, *, starts: jax.Array | None = None, choose: Choose = every_position,
    frozen: Frozen = nothing, entropy_bonus: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """Returns the published objective: weighted cross-entropies without and with thoughts, and REINFORCE.

    Args:
      tokens: [B, L] int32; mask: [B, L] bool.
      think: returns the thoughts at the given positions of the text; see `sample_thoughts`.
      counts: counts of the whole batch; these sequences may be one microbatch of it.
      starts: [B, L] int32 as in `Text`, where rows have several documents.
      choose: returns the positions that think; the terms with thoughts then cover only these positions.
      frozen: returns whether the parameter with this dotted name gets no gradient. Gradients that would only reach
        frozen parameters are not computed.
      entropy_bonus: scalar weight of the entropy bonus; None = `ThoughtConfig.entropy_bonus`.

    Returns:
      (loss, metrics); the sums over all microbatches are those of the batch.
    """
    params, graphdef = split(model)
    fixed = {name: jax.lax.stop_gradient(value) for name, value in params.items() if frozen(name)}
    learned = {name: value for name, value in params.items() if name not in fixed}
    model = merge(graphdef, learned | fixed)
    text = read_text(
        model.decoder, tokens, mask, starts, dtype=settings.dtype, rematerialize=settings.rematerialize,
        **ranked_by(settings),
    )  # fmt: skip
    positions = choose(text)
    thoughts = think(model, text, positions)
    bonus = jnp.asarray(settings.config.entropy_bonus if entropy_bonus is None else entropy_bonus, jnp.float32)
    # From here on the chains use the layer weights that the base pass returned. The values are the same, but the
    # chains' gradients become cotangents of the base pass, which adds its own gradients in place (see `layer_scan`).
    learned |= _layers(text.layers, learned)
    # The differentiable arrays of the text that the chains use; constants if the whole decoder is frozen.
    read = {"hidden": text.hidden, "prefix": text.prefix, "nll": text.nll}
    text_is_fixed = all(name in fixed for name in params if name.startswith("decoder."))
    operands = learned if text_is_fixed else learned | read
    constants = (fixed | read if text_is_fixed else fixed, tokens, mask, starts, positions, thoughts, counts, bonus)

    def chunk(operands: Any, constants: Any, start: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        # Closes over no arrays: `sum_chunks` differentiates and shards the arguments that it passes.
        fixed, tokens, mask, starts, positions, thoughts, counts, bonus = constants
        arrays = operands | fixed
        text = Text(tokens, mask, arrays["hidden"], arrays["prefix"], arrays["nll"], starts=starts)
        positions = take_positions(positions, start, positions_per_chunk)
        thoughts = take_chunk(thoughts, start, positions_per_chunk, axis=2)  # positions are axis 2 of [B, R, J, T]
        loss, metrics, layers = _chunk_loss(merge(graphdef, arrays), text, positions, thoughts, counts, bonus, settings)
        # Third result: layer weights as the chains return them, which `sum_chunks` calls `carried`.
        return loss, metrics, _layers(layers, operands)

    axes = {name: axes for name, axes in (graphdef.axes_by_name | _READ_AXES).items() if name in operands}
    thought_loss, metrics = sum_chunks(chunk, operands, constants, positions.shape[-1], positions_per_chunk, axes)
    base_loss = text.nll.sum() / counts.text
    loss = settings.config.base_loss_weight * base_loss + thought_loss
    counted = real_ahead(mask, positions, 1, starts)[..., 0]
    distinct = distinct_thoughts(thoughts.tokens, counted).sum() / (settings.num_thoughts * counts.targets[0])
    acts = actions(thoughts.tokens, settings)
    spread = thoughts.entropy.mean(axis=(1, 3)) if acts is None else mean_over_actions(thoughts.entropy, acts).mean(1)
    histogram = entropy_histogram(spread, counted, model.decoder.architecture.vocab_size)
    metrics |= {"unique_thought_rate": distinct, "entropy_histogram": histogram}
    metrics |= length_metrics(thoughts.tokens, counted) if settings.samples_end else {}
    return loss, {"loss": loss, "base_loss": base_loss, **metrics}


def _layers(layers: LayerWeights | None, wanted: Any) -> dict[str, jax.Array]:
    """The weights of the decoder's layers by dotted path, restricted to the paths in `wanted`."""
    named = {f"decoder.layers.{name}": value for name, value in (layers or {}).items()}
    return {name: value for name, value in named.items() if name in wanted}


class Rewarded(NamedTuple):
    """Thoughts of J positions and their rewards.

    Attributes:
      thoughts: arrays [B, R, J, T].
      rewards: [B, R, J]; scored: [B, J] bool, whether the position has a reward and x[j+1] is real.
      positions: [B, J] if sequences differ; None if all positions think.
    """

    thoughts: Thoughts
    rewards: jax.Array
    scored: jax.Array
    positions: jax.Array | None


def reward_thoughts(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, think: Think, settings: ThoughtSettings,
    positions_per_chunk: int, *, starts: jax.Array | None = None, choose: Choose = every_position,
) -> Rewarded:  # fmt: skip
    """Samples and rewards thoughts without gradients, for settings that divide by a statistic of the whole batch.

    Costs a forward pass over text and chains. The arguments are those of `quiet_star_loss`, which then uses these
    thoughts.
    """
    model = jax.lax.stop_gradient(model)
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype, **ranked_by(settings))
    positions = choose(text)
    thoughts = think(model, text, positions)

    def chunk(read: tuple[QuietStar, Text], positions: jax.Array, thoughts: Thoughts) -> jax.Array:
        model, text = read
        scores = score_thoughts(model, text, positions, thoughts.tokens, settings)
        return _rewards(text, positions, thoughts, scores, settings)[0]

    reward = map_chunks(chunk, (model, text), positions, positions_per_chunk, thoughts, axis=2)
    chosen = positions if positions.ndim == 2 else None
    return Rewarded(thoughts, reward, _scored(text, positions, settings), chosen)


def _scored(text: Text, positions: jax.Array, settings: ThoughtSettings) -> jax.Array:
    """Returns which positions have a reward and a real next token, [B, J]."""
    return real_ahead(text.mask, positions, 1, text.starts)[..., 0] & _rewarded(text, positions, settings)


def _rewarded(text: Text, positions: jax.Array, settings: ThoughtSettings) -> jax.Array:
    """Returns which positions have a reward, [J] or [B, J]: j = 0 .. L - 2 - K, as published; none past the text."""
    return positions <= text.tokens.shape[1] - 2 - settings.tokens_ahead


def _rewards(
    text: Text, positions: jax.Array, thoughts: Thoughts, scores: Scores, settings: ThoughtSettings
) -> tuple[jax.Array, jax.Array]:
    """Returns (rewards [B, R, J], which of the K tokens ahead are real [B, J, K])."""
    config, ahead = settings.config, settings.tokens_ahead
    # text.nll[j+k] is the cross-entropy of x[j+1+k] without a thought: base_nll [B, J, K], scores.nll [B, R, J, K].
    real = real_ahead(text.mask, positions, ahead, text.starts)
    base_nll = jnp.where(real, here_and_ahead(text.nll, positions, ahead), 0.0)
    reward = rewards(base_nll, scores.nll, real, name=config.reward, discount=config.discount)
    if config.kl_in_reward and thoughts.reference_log_probs is not None:  # absent where thoughts are not trained
        ratio = (scores.log_probs - thoughts.reference_log_probs).sum(axis=-1)
        reward = jnp.where(real[:, None, :, 0], reward - config.kl_in_reward * jax.lax.stop_gradient(ratio), 0.0)
    if settings.samples_end:
        cost = config.length_penalty * thought_lengths(thoughts.tokens).astype(jnp.float32)
        reward = jnp.where(real[:, None, :, 0], reward - cost, 0.0)
    rewarded = _rewarded(text, positions, settings)[..., None, :]  # [1, J] or [B, 1, J], against [B, R, J]
    return jnp.where(rewarded, reward, 0.0), real


def _chunk_loss(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts, counts: Counts, entropy_bonus: jax.Array,
    settings: ThoughtSettings,
) -> tuple[jax.Array, Metrics, LayerWeights]:  # fmt: skip
    """Returns (loss terms of the thoughts at these positions, their metrics, layers as from `run_layers`).

    Every term is a sum over positions divided by a count of the whole batch, so chunks add up to the batch.
    """
    config, ahead, count = settings.config, settings.tokens_ahead, settings.num_thoughts
    with_entropy = settings.reinforced and (config.entropy_bonus > 0 or config.entropy_target > 0)
    scores = score_thoughts(model, text, positions, thoughts.tokens, settings, with_entropy=with_entropy)
    reward, real = _rewards(text, positions, thoughts, scores, settings)
    first, scored = real[:, None, :, 0], _scored(text, positions, settings)[:, None]  # [B, 1, J]

    def mean_where(where: jax.Array, x: jax.Array, total: jax.Array) -> jax.Array:
        return jnp.where(where, x, 0.0).sum() / (x.shape[1] * total)

    acts = actions(thoughts.tokens, settings)

    talk = talk_loss(scores.nll, counts, reduction=config.talk_reduction)
    loss, metrics = config.talk_weight * talk, {"talk_loss": talk}
    if settings.reinforced:
        advantage = advantages(
            reward, name=config.advantage, positive_only=config.positive_only, scale=config.advantage_scale,
            clip=config.advantage_clip, reward_std=counts.reward_std, advantage_std=counts.advantage_std,
        )  # fmt: skip
        limits = {"clip_epsilon": config.clip_epsilon, "importance_cap": config.importance_cap}
        terms = policy_terms(advantage, scores.log_probs, thoughts.log_probs, **limits)
        longest = settings.longest_thought or settings.thought_length
        policy = policy_loss(terms, counts, reduction=config.policy_reduction, longest=longest, acts=acts)
        loss, metrics = loss + settings.policy_weight * policy, metrics | {"policy_loss": policy}
        if thoughts.log_probs is not None:
            metrics |= {
                name: mean_where(scored, mean_over_actions(x, acts), counts.scored)
                for name, x in ratio_metrics(advantage, scores.log_probs, thoughts.log_probs, **limits).items()
            }
        if scores.entropy is not None:
            bonus = mean_where(scored, mean_over_actions(scores.entropy, acts), counts.scored)
            loss, metrics = loss - entropy_bonus * bonus, metrics | {"policy_entropy": bonus}
        if thoughts.reference_log_probs is not None:
            # Masked before the exponential: 0 times the gradient of an overflow would be NaN.
            own = scores.log_probs if config.kl_weight else jax.lax.stop_gradient(scores.log_probs)
            reference = jnp.where(scored[..., None], thoughts.reference_log_probs, jax.lax.stop_gradient(own))
            kl = mean_where(scored, mean_over_actions(kl_terms(own, reference), acts), counts.scored)
            loss, metrics = loss + config.kl_weight * kl, metrics | {"kl": kl}
    if settings.distill_weight:
        # The text's own logits, computed once more for the chunk, so that the gradient reaches the base pass.
        base_logits = model.decoder.logits(here_and_ahead(text.hidden, positions, 1)[..., 0, :])
        divergence = distillation(scores.log_scores[..., 0, :], base_logits)
        distill = mean_where(first, divergence, counts.targets[0])
        loss, metrics = loss + settings.distill_weight * distill, metrics | {"distillation_loss": distill}

    if model.gate is not None:
        base_nll = jnp.where(real, here_and_ahead(text.nll, positions, ahead), 0.0)
        hidden = here_and_ahead(text.hidden, positions, 1)[..., 0, :]
        logits = gate_logits(model.gate, hidden, config.gate_prices)
        pays = gate_targets(mean_gain(base_nll, scores.nll, config.gate_tokens_ahead), config.gate_prices)
        gate = {
            "gate_loss": gate_loss(logits, pays),
            "gate_rate": (logits > 0).mean(axis=-1),
            "gate_target_rate": pays.mean(axis=-1),
        }
        metrics |= {name: mean_where(first, x[:, None], counts.targets[0]) for name, x in gate.items()}
        loss = loss + metrics["gate_loss"]

    spread = reward.std(axis=1, ddof=1, keepdims=True) if count > 1 else jnp.zeros_like(reward)
    metrics |= {
        "reward": reward.sum() / (count * counts.rewarded),
        "reward_std": mean_where(scored, spread, counts.scored),
        "mixing_weight": mean_where(first, scores.weight[..., 0], counts.targets[0]),
        "entropy": mean_where(first, mean_over_actions(thoughts.entropy, acts), counts.targets[0]),
    }
    if count > 1:
        unit = 1.0 if REWARDS[config.reward].traits["nats"] else jnp.abs(reward).max(axis=1, keepdims=True)
        alike = jnp.ptp(reward, axis=1, keepdims=True) <= EQUAL_REWARDS * unit
        metrics["frac_reward_zero_std"] = mean_where(scored, alike.astype(jnp.float32), counts.scored)
    for k in range(ahead):
        metrics[f"talk_loss_{k + 1}"] = scores.nll[..., k].sum() / (count * counts.targets[k])
    return loss, jax.lax.stop_gradient(metrics), scores.layers
