"""The whole objective of one batch: read, think, talk, learn."""

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
    """No parameter is frozen."""
    return False


def language_model_loss(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, counts: Counts, settings: ThoughtSettings,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """Plain next-token loss, for phases without thoughts: tokens, mask, starts [B, L] -> mean loss and metrics."""
    text = read_text(model.decoder, tokens, mask, starts, dtype=settings.dtype, rematerialize=settings.rematerialize)
    loss = text.nll.sum() / counts.text
    return loss, {"loss": loss, "base_loss": loss}


def quiet_star_loss(
    model: QuietStar, tokens: jax.Array, mask: jax.Array, think: Think, counts: Counts, settings: ThoughtSettings,
    positions_per_chunk: int, *, starts: jax.Array | None = None, choose: Choose = every_position,
    frozen: Frozen = nothing,
) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """The published objective: weighted cross-entropies without and with thoughts, and REINFORCE.

    Args:
      tokens: [B, L] int32; mask: [B, L] bool.
      think: gives the thoughts of the text at some positions; see `sample_thoughts`.
      counts: of the whole batch, of which these sequences may be a microbatch.
      starts: [B, L] int32 as in `Text`, where rows have several documents.
      choose: says which positions think; the objective is then that of these positions.
      frozen: says by its dotted name which parameter gets no gradient; what only leads to such is not computed.

    Returns:
      (loss, metrics); both add up over the microbatches of a batch.
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
    learned |= _layers(text.layers, learned)
    read = {"hidden": text.hidden, "prefix": text.prefix, "nll": text.nll}
    text_is_fixed = all(name in fixed for name in params if name.startswith("decoder."))
    operands = learned if text_is_fixed else learned | read
    constants = (fixed | read if text_is_fixed else fixed, tokens, mask, starts, positions, thoughts, counts)

    def chunk(operands: Any, constants: Any, start: jax.Array) -> tuple[jax.Array, Metrics, Any]:
        fixed, tokens, mask, starts, positions, thoughts, counts = constants
        arrays = operands | fixed
        text = Text(tokens, mask, arrays["hidden"], arrays["prefix"], arrays["nll"], starts=starts)
        positions = take_positions(positions, start, positions_per_chunk)
        thoughts = take_chunk(thoughts, start, positions_per_chunk, axis=2)
        loss, metrics, layers = _chunk_loss(merge(graphdef, arrays), text, positions, thoughts, counts, settings)
        return loss, metrics, _layers(layers, operands)

    axes = {name: axes for name, axes in (graphdef.axes_by_name | _READ_AXES).items() if name in operands}
    thought_loss, metrics = sum_chunks(chunk, operands, constants, positions.shape[-1], positions_per_chunk, axes)
    base_loss = text.nll.sum() / counts.text
    loss = settings.config.base_loss_weight * base_loss + thought_loss
    return loss, {"loss": loss, "base_loss": base_loss, **metrics}


def _layers(layers: Any, wanted: Any) -> dict[str, jax.Array]:
    """The weights of the decoder's layers under their dotted paths, those that are wanted."""
    named = {f"decoder.layers.{name}": value[...] for name, value in named_parameters(layers).items()}
    return {name: value for name, value in named.items() if name in wanted}


def _chunk_loss(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: Thoughts, counts: Counts, settings: ThoughtSettings
) -> tuple[jax.Array, Metrics, Layers]:
    """(what the thoughts of some positions add to the loss, and to the metrics; layers as from `run_layers`)."""
    config, ahead, length = settings.config, settings.tokens_ahead, text.tokens.shape[1]
    scores = score_thoughts(model, text, positions, thoughts.tokens, settings)
    talk = talk_loss(scores.nll, counts)

    rewarded = (positions <= length - 2 - ahead)[..., None, :]  # [1, J] or [B, 1, J]
    real = real_ahead(text.mask, positions, ahead, text.starts)
    base_nll = jnp.where(real, here_and_ahead(text.nll, positions, ahead), 0.0)
    reward = jnp.where(rewarded, rewards(base_nll, scores.nll), 0.0)
    loss, trained = (1.0 - config.base_loss_weight) * talk, {}
    if settings.reinforced:
        advantage = advantages(reward, positive_only=config.positive_only)
        policy = policy_loss(advantage, scores.log_probs, counts, reduction=config.policy_reduction)
        loss, trained = loss + settings.policy_weight * policy, {"policy_loss": policy}
    first = real[:, None, :, 0]

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
