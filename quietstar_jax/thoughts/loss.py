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
from typing import Any

import jax
import jax.numpy as jnp

from quietstar_jax.models.decoder import KEY_VALUE_AXES, KeyValues, Layers
from quietstar_jax.models.parameters import merge, named_parameters, split
from quietstar_jax.thoughts.chunks import sum_chunks, take_chunk, take_positions
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.objective import Counts, advantages, policy_loss, rewards, talk_loss
from quietstar_jax.thoughts.positions import Choose, every_position
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, here_and_ahead, read_text, real_ahead

Metrics = dict[str, jax.Array]
Think = Callable[[QuietStar, Text, jax.Array], Thoughts]
Frozen = Callable[[str], bool]

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
    frozen: Frozen = nothing,
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

    Returns:
      (loss, metrics); the sums over all microbatches are those of the batch.
    """
    params, graphdef = split(model)
    fixed = {name: jax.lax.stop_gradient(value) for name, value in params.items() if frozen(name)}
    learned = {name: value for name, value in params.items() if name not in fixed}
    model = merge(graphdef, learned | fixed)
    text = read_text(
        model.decoder, tokens, mask, starts, dtype=settings.dtype, rematerialize=settings.rematerialize,
        with_entropy=settings.config.positions == "entropy",
    )  # fmt: skip
    positions = choose(text)
    thoughts = think(model, text, positions)
    # From here on the chains use the layer weights that the base pass returned. The values are the same, but the
    # chains' gradients become cotangents of the base pass, which adds its own to them in place (see `layer_scan`).
    learned |= _layers(text.layers, learned)
    # The differentiable arrays of the text that the chains use; constants if the whole decoder is frozen.
    read = {"hidden": text.hidden, "prefix": text.prefix, "nll": text.nll}
    text_is_fixed = all(name in fixed for name in params if name.startswith("decoder."))
    operands = learned if text_is_fixed else learned | read
    constants = (fixed | read if text_is_fixed else fixed, tokens, mask, starts, positions, thoughts, counts)

    def chunk(operands: Any, constants: Any, start: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        # Closes over no arrays: `sum_chunks` differentiates and shards the arguments that it passes.
        fixed, tokens, mask, starts, positions, thoughts, counts = constants
        arrays = operands | fixed
        text = Text(tokens, mask, arrays["hidden"], arrays["prefix"], arrays["nll"], starts=starts)
        positions = take_positions(positions, start, positions_per_chunk)
        thoughts = take_chunk(thoughts, start, positions_per_chunk, axis=2)  # positions are axis 2 of [B, R, J, T]
        loss, metrics, layers = _chunk_loss(merge(graphdef, arrays), text, positions, thoughts, counts, settings)
        # Third result: layer weights as the chains return them, which `sum_chunks` calls `carried`.
        return loss, metrics, _layers(layers, operands)

    axes = {name: axes for name, axes in (graphdef.axes_by_name | _READ_AXES).items() if name in operands}
    thought_loss, metrics = sum_chunks(chunk, operands, constants, positions.shape[-1], positions_per_chunk, axes)
    base_loss = text.nll.sum() / counts.text
    loss = settings.config.base_loss_weight * base_loss + thought_loss
    return loss, {"loss": loss, "base_loss": base_loss, **metrics}


def _layers(layers: Any, wanted: Any) -> dict[str, jax.Array]:
    """The weights of the decoder's layers by dotted path, restricted to the names in `wanted`."""
    named = {f"decoder.layers.{name}": value[...] for name, value in named_parameters(layers).items()}
    return {name: value for name, value in named.items() if name in wanted}


def _chunk_loss(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts, counts: Counts, settings: ThoughtSettings
) -> tuple[jax.Array, Metrics, Layers]:
    """Returns (loss terms of the thoughts at these positions, their metrics, layers as from `run_layers`).

    Every term is a sum over positions divided by a count of the whole batch, so chunks add up to the batch.
    """
    config, ahead, length = settings.config, settings.tokens_ahead, text.tokens.shape[1]
    scores = score_thoughts(model, text, positions, thoughts.tokens, settings)
    talk = talk_loss(scores.nll, counts)

    # REINFORCE covers j = 0 .. L - 2 - K, as published; positions past the text have no reward either.
    rewarded = (positions <= length - 2 - ahead)[..., None, :]  # [1, J] or [B, 1, J], against [B, R, J]
    # text.nll[j+k] is the cross-entropy of x[j+1+k] without a thought: base_nll [B, J, K], scores.nll [B, R, J, K].
    real = real_ahead(text.mask, positions, ahead, text.starts)
    base_nll = jnp.where(real, here_and_ahead(text.nll, positions, ahead), 0.0)
    reward = jnp.where(rewarded, rewards(base_nll, scores.nll), 0.0)
    loss, trained = (1.0 - config.base_loss_weight) * talk, {}
    if settings.reinforced:
        advantage = advantages(reward, positive_only=config.positive_only)
        policy = policy_loss(advantage, scores.log_probs, counts, reduction=config.policy_reduction)
        loss, trained = loss + settings.policy_weight * policy, {"policy_loss": policy}
    first = real[:, None, :, 0]  # [B, 1, J], x[j+1] is real

    def mean_where_real(x: jax.Array) -> jax.Array:
        return jnp.where(first, x, 0.0).sum() / (settings.num_thoughts * counts.targets[0])

    metrics = {
        "talk_loss": talk,
        **trained,
        "reward": reward.sum() / (settings.num_thoughts * counts.rewarded),
        "reward_std_within_position": reward.std(axis=1).sum() / counts.rewarded,
        "mixing_weight": mean_where_real(scores.weight[..., 0]),
        "thought_entropy": mean_where_real(thoughts.entropy.mean(axis=-1)),
    }
    for k in range(ahead):
        metrics[f"talk_loss_{k + 1}"] = scores.nll[..., k].sum() / (settings.num_thoughts * counts.targets[k])
    return loss, jax.lax.stop_gradient(metrics), scores.layers
