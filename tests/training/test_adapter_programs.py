"""What a step with adapters computes and stores, by its program: no gradient and no copy of the frozen weights."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from quietstar_jax.parallel.mesh import make_mesh
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.setup import abstract_state
from quietstar_jax.training.step import make_train_step
from tests.training.tiny import tiny_config

# No activation has the shape of a weight.
SIZES = {"hidden_size": 22, "intermediate_size": 26, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10}


def lowered_step(workdir, phase, maps, **changes):
    """(abstract state, the lowered step of a phase)."""
    sizes = {f"model__architecture__{name}": value for name, value in SIZES.items()}
    adapters = {"model__adapters__maps": maps, "model__adapters__rank": 3, "model__checkpoint": "the base"}
    config = tiny_config(workdir, **(sizes | adapters | changes))
    architecture = config.model.architecture
    state = abstract_state(config, architecture, make_mesh(config.mesh, architecture, jax.devices()[:1]))
    graphdef = abstract_params(architecture, config.model.adapters)[1]
    step = make_train_step(config, config.phases[phase], graphdef, Vocabulary(0, (1,), (2,), (3,)))
    shape = (4, config.data.sequence_length)
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    return state, jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(0), jnp.int32(0))


def shapes_of_maps(state):
    """For each linear map of a layer, its dimensions as the program writes them."""
    shapes = {
        name: x.shape[1:] for name, x in state.weights.items() if name.startswith("decoder.layers.") and x.ndim > 2
    }
    return {"x".join(map(str, shape)) for name, shape in shapes.items() if "_lora_" not in name}


@pytest.mark.some(1)
@pytest.mark.parametrize("rematerialize", [False, True])
def test_the_frozen_weights_have_no_gradient_and_no_float32_copy(tmp_path, rematerialize):
    settings = {"model__compute_dtype": "bfloat16", "model__rematerialize": rematerialize}

    def found(maps):
        state, lowered = lowered_step(tmp_path, 1, maps, **settings)
        text, shapes = lowered.as_text(), shapes_of_maps(state)
        assert len(shapes) == 5
        products = set(re.findall(r"dot_general .* -> tensor<([0-9x]+)x[bf0-9]+>", text))
        wide = {shape for shape in shapes if re.search(rf"tensor<(\d+x)?{shape}xf32>", text)}
        return shapes & products, wide, shapes

    gradients, wide, shapes = found("none")
    assert gradients == wide == shapes  # what the test looks for exists where all weights learn
    gradients, wide, shapes = found("all")
    assert not gradients
    assert not wide


@pytest.mark.slow
def test_memory_of_a_step(tmp_path):
    """No stack of gradients among the temporaries; no moments of frozen weights; the state is updated in place."""
    large = {"model__architecture__hidden_size": 128, "model__architecture__intermediate_size": 512,
             "model__architecture__num_layers": 8, "data__sequence_length": 8, "model__rematerialize": True,
             "model__frozen_dtype": "float32"}  # fmt: skip
    temporaries = {}
    for maps in ("none", "all"):
        state, lowered = lowered_step(tmp_path, 0, maps, **large)
        memory = lowered.compile().memory_analysis()
        temporaries[maps] = memory.temp_size_in_bytes
        assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    stack = sum(4 * x.size for name, x in state.frozen.items() if name.startswith("decoder.layers."))
    assert temporaries["none"] - temporaries["all"] > 0.9 * stack
    assert temporaries["all"] < 0.5 * stack  # nor a copy of the frozen weights
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 1 + 2 * sum(x.size for x in state.params.values())
