"""Progressively shorter thoughts, then distillation of the prediction with thoughts into the one without thoughts.

The lengths are those of Fast Quiet-STaR (arXiv 2505.17746): thoughts of 13, 9 and 5 tokens before 8, 4 and 4 tokens.
Its last stage rewards predictions without thoughts, with a reward that does not depend on the sampled token; here, a
phase of distillation replaces it (docs/objectives.md). Afterwards the model needs no thoughts: `--thoughts off`.
"""

import ml_collections

from quietstar_jax.config import phase
from quietstar_jax.configs import embedded_corpus


def get_config() -> ml_collections.ConfigDict:
    """The embedded corpus with three phases of thoughts and one of distillation."""
    config = embedded_corpus.get_config()
    config.workdir = "runs/fast_quiet_star"
    pretrain, opening, thoughts = config.phases
    opening.update(thought_length=13, tokens_ahead=8, batch_size=8)
    shared = dict(thoughts.to_dict(), batch_size=8, fresh_optimizer=False)
    lengths = {"thoughts_13": (13, 8), "thoughts_9": (9, 4), "thoughts_5": (5, 4)}
    config.phases = [
        pretrain,
        opening,
        *(
            phase(**shared | {
                "name": name, "steps": 40, "thought_length": length, "tokens_ahead": ahead,
                "fresh_optimizer": name == "thoughts_13",
            })
            for name, (length, ahead) in lengths.items()
        ),
        phase(**shared | {
            "name": "distill", "steps": 60, "thought_length": 5, "tokens_ahead": 4, "policy_weight": 0.0,
            "distill_weight": 1.0, "learning_rate": 1e-3, "fresh_optimizer": True,
        }),
    ]  # fmt: skip
    config.evaluation.thought_length = 5
    return config
