"""RLP (arXiv 2510.01265): reinforcement alone, on the information gain about the next token.

Published: thoughts of 512 tokens and more at one position of a document, an EMA of the weights as the baseline, and
clipping. A baseline that is the same for all thoughts of a position cancels, so no EMA is kept. With one update per
sample, clipping has no effect. See docs/objectives.md.
"""

import ml_collections

from quietstar_jax.configs.objectives.common import set_objective, without_mixing_head


def objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Sets the constants of the objective; all other settings remain unchanged."""
    return set_objective(
        config,
        advantage="leave_one_out", positive_only=False,  # unbiased, and bad thoughts are made less likely
        sampling_temperature=0.7, score_temperature=0.7,  # thoughts are sampled from the trained distribution
        base_loss_weight=0.0, talk_loss_weight=0.0,  # no cross-entropy: only the policy term
        mixing="none",  # only the prediction after the thought is used
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """The embedded corpus with K = 1, and without the phase that trains the mixing head."""
    return objective(without_mixing_head("rlp", tokens_ahead=1, policy_weight=1.0))
