"""LaTRO (arXiv 2411.04282): the reward decreases if a thought is more likely than before REINFORCE.

The weights when REINFORCE begins are kept in memory and in checkpoints.

Published: one thought before a whole answer (K = all of it).
"""

import ml_collections

from quietstar_jax.configs.objectives.common import set_objective, without_mixing_head


def objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the constants of the objective; all other settings remain unchanged."""
    return set_objective(
        config,
        advantage="leave_one_out", positive_only=False,
        kl_in_reward=0.05,  # s = gain - 0.05 (log pi(z) - log pi_0(z)), summed over the thought
        policy_reduction="sum", score_temperature=1.0,
        base_loss_weight=0.0, talk_loss_weight=0.1,  # cross-entropy after the thought, with a small weight
        mixing="none",  # only the prediction after the thought is used
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """The embedded corpus, without the phase that trains the mixing head."""
    return objective(without_mixing_head("latro", policy_weight=1.0))
