"""Long thoughts at few positions, the regime of RLP (arXiv 2510.01265): 512 tokens at one position of each sequence.

SmolLM2-135M with adapters and the preset `rlp`. Memory grows linearly with the length of a thought, see
docs/performance.md. RLP as published trains all weights of larger models, with 16 thoughts at one position of each
document.
"""

import ml_collections

from quietstar_jax.config import phase
from quietstar_jax.configs import smollm2_135m_lora
from quietstar_jax.configs.objectives.rlp import objective


def get_config() -> ml_collections.ConfigDict:
    """Set `--config.data.train` and `--config.data.validation` to text files of your own."""
    config = objective(smollm2_135m_lora.get_config())
    config.workdir = "runs/long_thoughts"
    config.thought.positions = "random"
    config.thought.positions_per_sequence = 1
    config.phases = [
        phase(name="thoughts", steps=400, batch_size=8, thought_length=512, num_thoughts=4, tokens_ahead=1,
              policy_weight=1.0, learning_rate=1e-5),
    ]  # fmt: skip
    # Evaluation thinks at every position: 256 thoughts for each sequence, against 4 in training.
    config.evaluation.every_steps = 0
    config.evaluation.batches = 1
    config.evaluation.batch_size = 1
    return config
