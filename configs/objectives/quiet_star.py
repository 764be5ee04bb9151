"""Quiet-STaR as published (arXiv 2403.09629), on the embedded corpus.

The reward is the gain over the prediction without a thought, only gains above the mean of the position's thoughts are
reinforced, and the mixing head decides how much a thought changes the prediction.
"""

import ml_collections

from quietstar_jax.configs import embedded_corpus
from quietstar_jax.configs.objectives.common import set_objective


def objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the constants of the objective; all other settings remain unchanged."""
    return set_objective(
        config,
        reward="information_gain", discount=1.0, advantage="mean", positive_only=True,
        policy_reduction="mean", score_temperature=3.0, sampling_temperature=1.0,
        talk_reduction="mean", base_loss_weight=0.5, mixing="hidden_states",
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """The embedded corpus, whose phases set K = 2 and T = 6 (published: 4 and 9) and their own policy weight."""
    config = objective(embedded_corpus.get_config())
    config.workdir = "runs/objectives/quiet_star"
    return config
