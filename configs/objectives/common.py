"""What the presets of objectives share."""

import ml_collections

from quietstar_jax.config import default_config
from quietstar_jax.configs import embedded_corpus

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


def without_mixing_head(name: str, **thoughts: object) -> ml_collections.ConfigDict:
    """`configs/embedded_corpus.py` without the phase that trains the mixing head.

    Args:
      name: of the folder of the run; thoughts: settings of the phase with REINFORCE.
    """
    config = embedded_corpus.get_config()
    config.workdir = f"runs/objectives/{name}"
    pretrain, _, reinforce = config.phases
    reinforce.update(thoughts)
    config.phases = [pretrain, reinforce]
    return config
