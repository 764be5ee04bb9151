"""The embedded corpus: pre-trains a small decoder, then trains it to think. The base of presets and studies.

`configs/quickstart.py` is a shorter version.
"""

import ml_collections

from quietstar_jax.config import default_config, phase


def get_config() -> ml_collections.ConfigDict:
    """A 3-layer, 128-wide decoder on documents whose answers need steps that are often not written out."""
    config = default_config()
    config.workdir = "runs/embedded_corpus"

    architecture = config.model.architecture
    architecture.vocab_size = 100
    architecture.hidden_size = 128
    architecture.intermediate_size = 384
    architecture.num_layers = 3
    architecture.num_heads = 4
    architecture.num_kv_heads = 4
    architecture.head_dim = 32
    architecture.max_positions = 256
    architecture.initializer_range = 0.09  # about 1/sqrt(hidden_size): a small model learns far sooner

    config.data.tokenizer = "synthetic"
    config.data.sequence_length = 64
    config.data.packing = "packed"

    config.thought.initial_start_token = "("
    config.thought.initial_end_token = ")"
    config.optimizer.weight_decay = 0.001

    thinking = dict(thought_length=6, num_thoughts=4, tokens_ahead=2, batch_size=16, warmup_steps=0)
    config.phases = [
        phase(name="pretrain", steps=560, batch_size=64, thought_length=0, learning_rate=4e-3, warmup_steps=56,
              decay="cosine", final_rate_fraction=0.03),
        phase(name="open_the_mixing_head", steps=34, policy_weight=0.0, learning_rate=3e-3, fresh_optimizer=True,
              rates={"decoder": 0.0, "mixing_head": 1.0, "thought_embeddings": 0.0}, **thinking),
        # The start and end embeddings move a hundred times faster than their rate suggests.
        phase(name="thoughts", steps=70, policy_weight=100.0, learning_rate=3e-4, decay="cosine",
              final_rate_fraction=0.1, fresh_optimizer=True,
              rates={"decoder": 1.0, "mixing_head": 1.0, "thought_embeddings": 0.01}, **thinking),
    ]  # fmt: skip
    config.evaluation.every_steps = 0
    config.evaluation.batches = 4
    config.evaluation.batch_size = 32
    config.checkpoint.update(every_steps=250, keep_phase_ends=True)  # `report --against-step 594` compares with before
    config.logging.every_steps = 10
    return config
