"""The paper's main run: Mistral-7B continued on OpenWebMath, 100 steps of 8 spans of 256 tokens, (12, 4).

Weights, gradients and Adam moments need 116 GB (16 bytes for each of 7.24 billion parameters), more than most devices
have.
"""

import ml_collections

from quietstar_jax.config import default_config, phase


def mistral_7b(config: ml_collections.ConfigDict) -> None:
    """Sets the model to Mistral-7B v0.1; the architecture is written out, for plans without the weights."""
    config.model.checkpoint = "mistralai/Mistral-7B-v0.1"
    config.model.compute_dtype = "bfloat16"
    config.model.rematerialize = True

    architecture = config.model.architecture
    architecture.family = "mistral"
    architecture.vocab_size = 32_000
    architecture.hidden_size = 4_096
    architecture.intermediate_size = 14_336
    architecture.num_layers = 32
    architecture.num_heads = 32
    architecture.num_kv_heads = 8
    architecture.head_dim = 128
    architecture.max_positions = 32_768
    architecture.sliding_window = 4_096


def paper_recipe(config: ml_collections.ConfigDict, *, thought_tokens: int, tokens_ahead: int) -> None:
    """Sets the published hyper-parameters.

    Args:
      thought_tokens: the first number of the paper's (12, 4); it counts start, end and one more token, so three fewer
        are sampled.
    """
    config.seed = 42
    config.data.sequence_length = 256
    config.data.packing = "random_span"
    config.data.prepend_bos = "document_start"  # as in the published code, which adds no end of text either
    config.data.append_eos = False
    config.thought.initial_start_token = "---"
    config.thought.initial_end_token = "---"
    config.thought.chunk_megabytes = 8_192
    config.optimizer.weight_decay = 0.001
    config.optimizer.clip_norm = 1.0
    config.phases = [
        phase(
            name="thoughts", steps=100, batch_size=8, thought_length=thought_tokens - 3, num_thoughts=2,
            tokens_ahead=tokens_ahead, policy_weight=1e6, learning_rate=1e-6, warmup_steps=20, decay="constant",
        ),
    ]  # fmt: skip
    config.evaluation.every_steps = 10
    config.checkpoint.every_steps = 50


def get_config() -> ml_collections.ConfigDict:
    """Set `--config.data.train` and `--config.data.validation` to the files of your copy of OpenWebMath."""
    config = default_config()
    config.workdir = "runs/mistral_7b_openwebmath"
    mistral_7b(config)
    paper_recipe(config, thought_tokens=12, tokens_ahead=4)
    config.data.train = ("data/open-web-math/train/*.parquet",)
    config.data.validation = ("data/open-web-math/validation/*.parquet",)
    return config
