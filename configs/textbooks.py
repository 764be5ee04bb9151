"""Continues the base of `configs/textbooks_base.py` with thoughts, on the same real text.

Export the base first: `python -m quietstar_jax.export --checkpoint runs/textbooks_base --output
runs/textbooks_base_hf --format base`.
"""

import ml_collections

from quietstar_jax.config import phase
from quietstar_jax.configs import textbooks_base


def get_config() -> ml_collections.ConfigDict:
    """30 steps in which only the mixing head learns, then 100 with REINFORCE; a quarter of the positions think."""
    config = textbooks_base.get_config()
    config.workdir = "runs/textbooks"
    config.model.checkpoint = "runs/textbooks_base_hf"
    config.data.tokenizer = ""  # that of the checkpoint
    config.thought.positions = "random"
    config.thought.position_fraction = 0.25

    thinking = dict(thought_length=8, num_thoughts=2, tokens_ahead=4, batch_size=8, warmup_steps=0)
    config.phases = [
        phase(name="open_the_mixing_head", steps=30, policy_weight=0.0, learning_rate=3e-3, fresh_optimizer=True,
              rates={"decoder": 0.0, "mixing_head": 1.0, "thought_embeddings": 0.0}, **thinking),
        phase(name="thoughts", steps=100, policy_weight=1.0, learning_rate=1e-4, fresh_optimizer=True,
              rates={"decoder": 1.0, "mixing_head": 1.0, "thought_embeddings": 0.01}, **thinking),
    ]  # fmt: skip
    config.evaluation.every_steps = 0
    config.evaluation.batches = 16
    config.checkpoint.every_steps = 50
    return config
