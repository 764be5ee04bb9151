"""The paper's run on general web text: Mistral-7B continued on C4, (16, 4)."""

import runpy
from pathlib import Path

import ml_collections

from quietstar_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Reads C4 as prepared by tensorflow-datasets, in array_record files under `--config.data.data_dir`."""
    openwebmath = runpy.run_path(str(Path(__file__).with_name("mistral_7b_openwebmath.py")))
    config = default_config()
    config.workdir = "runs/mistral_7b_c4"
    openwebmath["mistral_7b"](config)
    openwebmath["paper_recipe"](config, thought_tokens=16, tokens_ahead=4)
    config.data.train = ("tfds:c4/en:train",)
    config.data.validation = ("tfds:c4/en:validation",)
    return config
