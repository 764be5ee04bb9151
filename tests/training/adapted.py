"""The tiny run with adapters on a base in the Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quietstar_jax.config import Config
from tests.hf.checkpoints import random_tensors, write
from tests.training.tiny import tiny_config


def write_base(folder: Path, seed: int = 0) -> Path:
    """A decoder of the size of the tiny run; its values are not exact in bfloat16."""
    architecture = tiny_config(folder).model.architecture
    tensors = {name: 0.2 * (1 + seed) * value for name, value in random_tensors(architecture).items()}
    norms = {name: np.abs(value) + 0.5 for name, value in tensors.items() if name.endswith("norm.weight")}
    return write(folder, tensors | norms, architecture)


def adapted_config(workdir: Path, base: Path, **changes: Any) -> Config:
    settings = {"maps": "all", "rank": 2, "alpha": 4.0}
    settings = {f"model__adapters__{name}": value for name, value in settings.items()}
    return tiny_config(workdir, model__checkpoint=str(base), **(settings | changes))
