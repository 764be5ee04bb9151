"""The paper's main run with a small model: SmolLM2-135M-Instruct continued on mathematics textbooks, (12, 4).

Set `--config.data.train` and `--config.data.validation` to text files of your own; those of docs/results.md are
OpenStax books, as `configs/textbooks_base.py` describes them.
"""

import ml_collections

from quietstar_jax.config import default_config
from quietstar_jax.configs.mistral_7b_openwebmath import paper_recipe
from quietstar_jax.configs.smollm2_135m_lora import smollm2_135m


def get_config() -> ml_collections.ConfigDict:
    """The published recipe with half of its sequences and a sixteenth of its positions, for CPUs; all weights learn."""
    config = default_config()
    config.workdir = "runs/smollm2_textbooks"
    config.model.checkpoint = "HuggingFaceTB/SmolLM2-135M-Instruct"
    smollm2_135m(config)
    config.data.train = ("data/textbooks/*.jsonl",)
    config.data.validation = ("data/textbooks_held_out.jsonl",)
    paper_recipe(config, thought_tokens=12, tokens_ahead=4)
    config.thought.positions = "random"
    config.thought.position_fraction = 0.0625
    config.thought.chunk_megabytes = 1_024
    # The published rate. With the published policy weight, a ten times larger rate ruins the text model
    # (docs/results.md). The mixing head must open within 100 steps, so it learns faster.
    config.phases[0].update(batch_size=4, learning_rate=1e-6)
    config.phases[0].rates.mixing_head = 1_000.0
    config.evaluation.every_steps = 0
    config.evaluation.batches = 4
    config.evaluation.batch_size = 2
    config.checkpoint.every_steps = 20
    config.checkpoint.keep_every_steps = 20
    return config
