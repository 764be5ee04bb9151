"""LaTRO (arXiv 2411.04282): a thought pays for being likelier than under the initial weights, which are kept.

Published: one thought before a whole answer (K = all of it).
"""

import ml_collections

from configs import quickstart


def objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the constants of the objective; all other settings stay."""
    config.thought.update(
        advantage="leave_one_out", positive_only=False,
        kl_in_reward=0.05,  # s = gain - 0.05 (log pi(z) - log pi_0(z)), summed over the thought
        policy_reduction="sum", score_temperature=1.0,
        base_loss_weight=0.0, talk_loss_weight=0.1,  # cross-entropy after the thought, with a small weight
        mixing="none",  # the prediction after the thought stands alone
    )  # fmt: skip
    return config


def get_config() -> ml_collections.ConfigDict:
    """The quickstart, without the phase that trains the mixing head."""
    config = objective(quickstart.get_config())
    config.workdir = "runs/objectives/latro"
    pretrain, _, thoughts = config.phases
    thoughts.update(policy_weight=1.0)
    config.phases = [pretrain, thoughts]
    return config
