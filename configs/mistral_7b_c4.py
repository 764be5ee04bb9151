"""The paper's run on general web text: Mistral-7B continued on C4, (16, 4)."""

import ml_collections

from quietstar_jax.config import default_config
from quietstar_jax.configs import mistral_7b_openwebmath


def get_config() -> ml_collections.ConfigDict:
    """Reads C4 as prepared by tensorflow-datasets, in array_record files under `--config.data.data_dir`."""
    config = default_config()
    config.workdir = "runs/mistral_7b_c4"
    mistral_7b_openwebmath.mistral_7b(config)
    mistral_7b_openwebmath.paper_recipe(config, thought_tokens=16, tokens_ahead=4)
    config.data.train = ("tfds:c4/en:train",)
    config.data.validation = ("tfds:c4/en:validation",)
    return config
