"""Settings of the whole suite: CPU unless told otherwise, reproducible random examples."""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # one test of it; others shall compile what they test
# Tiny shapes: nearly all time goes into compiling, which without optimizations takes a quarter as long.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    # Later ones stop at this flag.
    + " --xla_cpu_use_fusion_emitters=false"
    * (tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12)),
)

import hypothesis
import jax
import pytest

from tests.support import compile_once

compile_once.install()
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # the suite runs under nohup, and commands of tests would too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """Mixing dtypes without saying so is an error, as our own code must not. (Optax does, so not everywhere.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that are marked as needing what this machine lacks; marks all but n cases of `some(n)` as slow."""
    cases = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("some"):
            cases[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, wanted), same in cases.items():
        kept = {i * len(same) // wanted for i in range(wanted)}
        for i, item in enumerate(same):
            if i not in kept:
                item.add_marker(pytest.mark.slow)
    absent = {}
    if importlib.util.find_spec("libtpu") is None:
        absent["tpu"] = "libtpu (the extra tpu) is not installed"
    if not os.environ.get("QUIETSTAR_TRANSFORMERS4"):
        absent["transformers4"] = "QUIETSTAR_TRANSFORMERS4 does not name a Python that has transformers 4"
    for item in items:
        for mark in item.iter_markers():
            if mark.name in absent:
                item.add_marker(pytest.mark.skip(reason=absent[mark.name]))
