"""The paper's main run with adapters: Mistral-7B frozen in bfloat16, so that one accelerator with 80 GB is enough.

The adapters of all linear maps, the mixing head and the embeddings of a thought learn: 0.1 billion parameters in
float32. Gradients and Adam moments exist only for these.
"""

import ml_collections

from quietstar_jax.configs import mistral_7b_openwebmath


def get_config() -> ml_collections.ConfigDict:
    """Set `--config.data.train` and `--config.data.validation` to the files of your copy of OpenWebMath."""
    config = mistral_7b_openwebmath.get_config()
    config.workdir = "runs/mistral_7b_lora"
    config.model.adapters.update(maps="all", rank=16, alpha=32.0)
    config.phases[0].update(learning_rate=1e-5, microbatches=4)  # adapters need larger steps than full training
    config.thought.chunk_megabytes = 4_096
    return config
