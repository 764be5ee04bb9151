"""A small model with adapters: SmolLM2-135M, whose frozen base needs 0.3 GB."""

import ml_collections

from quietstar_jax.config import default_config, phase


def smollm2_135m(config: ml_collections.ConfigDict) -> None:
    """Sets the shape of SmolLM2-135M, written out for plans without the weights."""
    config.model.architecture.update(
        family="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_positions=8_192, rope_theta=100_000.0, tie_embeddings=True,
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """Set `--config.data.train` and `--config.data.validation` to text files of your own."""
    config = default_config()
    config.workdir = "runs/smollm2_135m_lora"
    config.model.checkpoint = "HuggingFaceTB/SmolLM2-135M"
    config.model.compute_dtype = "bfloat16"
    config.model.rematerialize = True
    smollm2_135m(config)
    config.model.adapters.update(maps="all", rank=16, alpha=32.0)
    config.data.train = ("data/train/*.jsonl",)
    config.data.validation = ("data/validation/*.jsonl",)
    config.data.sequence_length = 256
    config.data.packing = "packed"
    config.thought.chunk_megabytes = 2_048
    config.phases = [
        # First only the mixing head and the embeddings of a thought learn; the decoder is still exactly the base.
        phase(
            name="opening", steps=100, batch_size=8, thought_length=8, num_thoughts=2, tokens_ahead=4,
            policy_weight=0.0, learning_rate=1e-3, rates={"adapters": 0.0},
        ),
        phase(
            name="thoughts", steps=400, batch_size=8, thought_length=8, num_thoughts=2, tokens_ahead=4,
            policy_weight=1e6, learning_rate=1e-5, fresh_optimizer=True,
        ),
    ]  # fmt: skip
    config.evaluation.every_steps = 50
    config.checkpoint.every_steps = 50
    return config
