"""Quiet-STaR in JAX: language models that think before every token, trained from plain text."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from quietstar_jax import signals

if TYPE_CHECKING:
    from quietstar_jax.api import Model as Model
    from quietstar_jax.api import Score as Score
    from quietstar_jax.api import Thoughts as Thoughts
    from quietstar_jax.api import train_model as train_model
    from quietstar_jax.config import default_config as default_config
    from quietstar_jax.config import phase as phase
    from quietstar_jax.errors import UserError as UserError
    from quietstar_jax.inference.batch import Generation as Generation
    from quietstar_jax.inference.batch import Token as Token
    from quietstar_jax.methods.advantages import ADVANTAGES as ADVANTAGES
    from quietstar_jax.methods.rewards import REWARDS as REWARDS

__version__ = "0.1.0"  # the only place that says it
# The Python API (docs/api.md) by the modules that define it, imported at the first use: commands import what they need.
API = {
    "Model": "api", "train_model": "api", "default_config": "config", "phase": "config",
    "ADVANTAGES": "methods.advantages", "REWARDS": "methods.rewards", "UserError": "errors",
    "Thoughts": "api", "Score": "api", "Generation": "inference.batch", "Token": "inference.batch",
}  # fmt: skip

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no advice about PyTorch: only tokenizers are used
signals.while_importing(os.path.dirname(__file__))


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"quietstar_jax.{API[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *API})
