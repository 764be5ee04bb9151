"""One step of every family, in either compute dtype, on this machine's own backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.families import FAMILIES
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.setup import first_state, prepare
from quietstar_jax.training.step import make_train_step
from tests.training.tiny import tiny_config


@pytest.mark.some(4)
@pytest.mark.parametrize(("tied", "compute_dtype"), [(False, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step(tmp_path, family, tied, compute_dtype):
    take_step(tmp_path, 0, family, tied, compute_dtype)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_one_step_with_thoughts_in_bfloat16(tmp_path, tied):
    take_step(tmp_path, 1, "llama", tied, "bfloat16")


def take_step(folder, phase, family, tied, compute_dtype):
    """Compiles and takes one step of a phase of the tiny run; every weight of the decoder moves."""
    known = FAMILIES[family]
    caps = {name: getattr(known, name) for name in ("score_cap", "logit_cap") if getattr(known, name)}
    shape = dict(family=family, tie_embeddings=tied, num_layers=1, **known.fixed, **caps)
    changes = {f"model__architecture__{name}": value for name, value in shape.items()}
    run = prepare(tiny_config(folder, model__compute_dtype=compute_dtype, data__sequence_length=6, **changes))
    batch = Batch(jnp.tile(jnp.arange(6, 12), (2, 1)), jnp.ones((2, 6), bool))
    before = first_state(run)
    step = make_train_step(run.config, run.config.phases[phase], run.graphdef, run.vocabulary)
    after, metrics = jax.jit(step)(before, batch, run.key, jnp.int32(0))
    assert all(np.isfinite(value).all() for value in metrics.values())
    still = [name for name, value in after.params.items() if np.array_equal(value, before.params[name])]
    assert not [name for name in still if name.startswith("decoder.")]
