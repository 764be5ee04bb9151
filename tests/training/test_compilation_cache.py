"""A run that starts again loads the programs it compiled before, and computes the same."""

from __future__ import annotations

import warnings

import jax
import pytest
from jax._src import compiler

from quietstar_jax.training.compilation_cache import COMPILED, compilation_cache
from quietstar_jax.training.loop import train
from tests.support.compile_once import compile_each
from tests.training.tiny import tiny_config

MINIMUM = "jax_persistent_cache_min_compile_time_secs"


DIRECTORY = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def no_folder():
    """Whatever the variables of JAX say where the suite runs."""
    before = getattr(jax.config, DIRECTORY)
    jax.config.update(DIRECTORY, None)
    yield
    jax.config.update(DIRECTORY, before)


@pytest.fixture
def enabled():
    """The suite runs without the cache: conftest.py."""
    before = {name: getattr(jax.config, name) for name in ("jax_enable_compilation_cache", MINIMUM)}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update(MINIMUM, 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("enabled")
def test_nothing_is_compiled_twice(tmp_path, monkeypatch):
    compiled: list[str] = []

    def compile_and_note(backend, module, *rest):
        compiled.append(module.operation.attributes["sym_name"].value)
        return compile_each(backend, module, *rest)  # a program that an earlier test compiled may not be stored

    monkeypatch.setattr(compiler, "backend_compile_and_load", compile_and_note)
    first = train(tiny_config(tmp_path / "run"))
    assert any("step" in name for name in compiled)
    assert any(path.name.startswith("jit_step") for path in (tmp_path / "run" / COMPILED).glob("*-cache"))
    assert jax.config.jax_compilation_cache_dir is None, "later runs of this process have caches of their own"

    (tmp_path / "again").mkdir()
    (tmp_path / "run" / COMPILED).rename(tmp_path / "again" / COMPILED)
    compiled.clear()
    again = train(tiny_config(tmp_path / "again"))
    assert not [name for name in compiled if "step" in name or "score" in name]
    assert again["loss_with_thoughts"] == first["loss_with_thoughts"]


@pytest.mark.usefixtures("enabled")
def test_a_program_that_was_half_written_is_written_again(tmp_path):
    compute = lambda: jax.jit(lambda x: x * 3 + 1)(2.0)  # noqa: E731
    with compilation_cache(tmp_path):
        assert compute() == 7
    (program,) = (path for path in (tmp_path / COMPILED).glob("*-cache") if "lambda" in path.name)
    whole = program.read_bytes()
    program.write_bytes(whole[: len(whole) // 2])
    with compilation_cache(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute() == 7
    assert len(program.read_bytes()) > len(whole) // 2


def test_jax_can_be_told_not_to_store_programs(tmp_path):
    with compilation_cache(tmp_path):  # the suite has JAX_ENABLE_COMPILATION_CACHE=false
        assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("enabled")
def test_a_folder_that_jax_was_given_is_used(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        with compilation_cache(tmp_path / "run"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
