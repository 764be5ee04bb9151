"""What the presets of objectives share."""

import ml_collections

from quietstar_jax.config import default_config

OBJECTIVE = (
    "reward", "discount", "advantage", "advantage_scale", "advantage_clip", "positive_only", "policy_reduction",
    "importance_cap", "clip_epsilon", "entropy_bonus", "entropy_target", "kl_weight", "kl_in_reward", "talk_reduction",
    "base_loss_weight", "talk_loss_weight", "sampling_temperature", "score_temperature", "mixing",
)  # fmt: skip


def set_objective(config: ml_collections.ConfigDict, **constants: object) -> ml_collections.ConfigDict:
    """Sets the constants of an objective, and everything else that defines one to its default."""
    defaults = default_config().thought
    config.thought.update({name: defaults[name] for name in OBJECTIVE} | constants)
    return config
