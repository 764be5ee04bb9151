"""Quiet-STaR in JAX."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # only its tokenizers are used here: no word on PyTorch
