"""AdamW with optax; the learning rate depends on the phase and the kind of parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from quietstar_jax.config import OptimizerConfig
from quietstar_jax.models.adapters import is_adapter
from quietstar_jax.models.parameters import is_end_head, is_gate
from quietstar_jax.thought_config import Phase, RateScales

Params = dict[str, jax.Array]


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping, Adam and decoupled weight decay; the updates are not yet multiplied by `-learning_rate`.

    The learning rate is applied separately because each phase has its own, while the moments persist across phases.
    """
    return optax.chain(
        clip_gradients(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: decay_mask(params, config)),
    )


def clip_gradients(max_norm: float) -> optax.GradientTransformation:
    """Returns clipping by the norm of the whole gradient, without the thinking gate, which is clipped by its own norm.

    So the gate does not change the updates of other weights.
    """
    clip = optax.clip_by_global_norm(max_norm)

    def clipped(updates: Params, params: Params | None) -> Params:
        parts = [{name: x for name, x in updates.items() if is_gate(name) == own} for own in (False, True)]
        each: Any = [clip.update(part, optax.EmptyState())[0] for part in parts if part]
        return {name: x for part in each for name, x in part.items()}

    return optax.stateless(clipped)


def decay_mask(params: Params, config: OptimizerConfig) -> dict[str, bool]:
    """Returns which parameters have weight decay, by dotted path."""
    exempt = ("bias", "log_slope")
    return {name: config.decay_mask == "all" or not ("norm" in name or name.endswith(exempt)) for name in params}


def learning_rate(phase: Phase, step: jax.Array) -> jax.Array:
    """Returns the rate of step 0, 1, ... of a phase: linear warm-up from 0, then the decay of the phase.

    The decay reaches its final rate one step after the last step, because a last step with rate 0 would have no effect.
    """
    rest = max(phase.steps - phase.warmup_steps, 1)
    final = phase.learning_rate * phase.final_rate_fraction
    after = {
        "constant": optax.constant_schedule(phase.learning_rate),
        "linear": optax.linear_schedule(phase.learning_rate, final, rest),
        "cosine": optax.cosine_decay_schedule(phase.learning_rate, rest, phase.final_rate_fraction),
    }[phase.decay]
    warmup = optax.linear_schedule(0.0, phase.learning_rate, max(phase.warmup_steps, 1))
    # The first step counts as step 1 of the warm-up, because a step with rate 0 would have no effect.
    shifted = step + 1
    return jnp.where(shifted < phase.warmup_steps, warmup(shifted), after(jnp.maximum(step - phase.warmup_steps, 0)))


def rate_scale(name: str, rates: RateScales) -> float:
    """Returns the learning-rate factor of the parameter with this dotted path."""
    if name.startswith("mixing_head."):
        return rates.mixing_head
    if is_gate(name):
        return rates.gate
    if is_end_head(name):
        return rates.end_head
    if name in ("start_embedding", "end_embedding"):
        return rates.thought_embeddings
    if name in ("start_spare", "end_spare"):
        return 0.0  # the model does not use them
    if is_adapter(name):
        return rates.adapters
    return rates.decoder


def apply_updates(params: Params, updates: Params, rate: jax.Array, rates: RateScales) -> Params:
    """Returns params - rate * scale * updates; parameters with scale 0 are unchanged, bit for bit."""
    return {
        name: value - (rate * scale) * updates[name] if (scale := rate_scale(name, rates)) else value
        for name, value in params.items()
    }
