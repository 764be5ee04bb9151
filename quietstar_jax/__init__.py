"""Quiet-STaR in JAX."""

import os

from quietstar_jax import signals

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no advice about PyTorch: only tokenizers are used
signals.while_importing(os.path.dirname(__file__))
