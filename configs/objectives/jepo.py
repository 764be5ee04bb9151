"""JEPO (arXiv 2503.19618): the advantage of a thought is what it adds to the ensemble of its position.

Published: one thought before a whole answer (K = all of it).
"""

import ml_collections

from quietstar_jax.configs.objectives.common import set_objective, without_mixing_head


def objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the constants of the objective; all other settings remain unchanged."""
    return set_objective(
        config,
        advantage="log_mean_exp", positive_only=False,  # the gradient of the ensemble's log-likelihood
        advantage_scale="batch", advantage_clip=1.0,  # A / std(A), within +-1
        policy_reduction="sum", score_temperature=1.0,  # log-probability of the whole thought
        talk_reduction="log_mean_exp", talk_loss_weight=0.1,  # the ensemble's own loss, with a small weight
        base_loss_weight=0.0,
        mixing="none",  # only the prediction after the thought is used
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """The embedded corpus, without the phase that trains the mixing head."""
    return objective(without_mixing_head("jepo", policy_weight=1.0))
