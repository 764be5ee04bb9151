"""Settings of the whole suite: CPU unless told otherwise, reproducible random examples."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny shapes: nearly all time goes into compiling, which without optimizations takes a quarter as long.
_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):  # later ones stop at the flag
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Mixing dtypes without saying so is an error, as our own code must not. (Optax does, so not everywhere.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield
