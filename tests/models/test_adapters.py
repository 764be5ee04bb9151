"""Adapters: their gradients by the chain rule, which weights learn, and what the compiled program stores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Adapters
from quietstar_jax.models.adapters import MAPS, A, B, input_axes, is_adapter, learns, merge_adapters
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import abstract_params, init_quiet_star
from quietstar_jax.thoughts.objective import count_targets
from tests.thoughts.cases import Case, random_model, worst_errors

CASE = Case("adapters", mask=("1111111", "1111100"))
NORMS = {"norm_placement": "around", "norm_adds_one": True, "qk_norm": True, "score_cap": 2.0, "logit_cap": 3.0}
WITH_NORMS = dataclasses.replace(CASE, architecture=NORMS)
ADAPTERS = Adapters("all", rank=3, alpha=5.0)


def adapted(adapters: Adapters, seed: int = 0, case: Case = CASE):
    """(parameters of a random model with random adapters, its graph definition)."""
    base = split(random_model(case.decoder, case.thought.config.embedding_scale))[0]
    model = init_quiet_star(case.decoder, [0], [0], 1.0, jax.random.key(seed), adapters)
    params, graphdef = split(model)
    rng = np.random.default_rng(seed)
    draws = {name: jnp.float32(0.4 * rng.normal(size=x.shape)) for name, x in params.items() if is_adapter(name)}
    return base | draws, graphdef


def objective(graphdef, rematerialize: bool, adapters: Adapters):
    """The loss as a function of (weights that learn, others)."""
    settings = dataclasses.replace(CASE.thought, rematerialize=rematerialize)
    (tokens, mask), thoughts = CASE.text(), CASE.thoughts()
    counts = count_targets(mask, settings.tokens_ahead)

    def loss(learned, others):
        model = merge(graphdef, learned | others)
        return quiet_star_loss(
            model, tokens, mask, lambda *_: thoughts, counts, settings, 3, frozen=lambda name: name in others
        )[0]

    return loss


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("adapters", "rematerialize", "case"),
    [
        (ADAPTERS, True, CASE), (ADAPTERS, False, CASE),
        (Adapters("attention", rank=2, rank_stabilized=True, norms=True), True, CASE),
        (dataclasses.replace(ADAPTERS, norms=True), True, WITH_NORMS),
    ],
)  # fmt: skip
def test_gradients_follow_from_those_of_the_merged_model(adapters, rematerialize, case):
    """W = W0 + s A B:  dA = s dW B^T,  dB = s A^T dW; loss and the gradients of all else are equal."""
    params, graphdef = adapted(adapters, case=case)
    learned = {name: value for name, value in params.items() if learns(name, adapters)}
    others = {name: value for name, value in params.items() if name not in learned}
    loss, found = jax.jit(jax.value_and_grad(objective(graphdef, rematerialize, adapters)))(learned, others)
    merged = merge_adapters(params, adapters)
    plain = objective(abstract_params(case.decoder)[1], rematerialize, adapters)
    wanted_loss, gradients = jax.jit(jax.value_and_grad(plain))(merged, {})
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    wanted = {name: gradients[name] for name in learned if not is_adapter(name)}
    for name in MAPS[adapters.maps]:
        path, inputs = f"decoder.layers.{name}", input_axes(name)
        gradient, a, b = (np.asarray(x, np.float64) for x in (gradients[path], params[path + A], params[path + B]))
        flat = gradient.reshape(len(gradient), int(np.prod(gradient.shape[1 : 1 + inputs])), -1)
        flat_a, flat_b = a.reshape(len(a), -1, adapters.rank), b.reshape(len(b), adapters.rank, -1)
        wanted[path + A] = (adapters.scale * flat @ flat_b.swapaxes(1, 2)).reshape(a.shape)
        wanted[path + B] = (adapters.scale * flat_a.swapaxes(1, 2) @ flat).reshape(b.shape)
    assert not worst_errors(found, wanted, 2e-4)


def test_the_scale():
    assert Adapters(rank=16, alpha=32.0).scale == 2.0
    assert Adapters(rank=16, alpha=32.0, rank_stabilized=True).scale == 8.0


def test_which_weights_learn():
    names = abstract_params(CASE.decoder, ADAPTERS)[0]
    learned = {name for name in names if learns(name, ADAPTERS)}
    assert learned == {name for name in names if is_adapter(name) or not name.startswith("decoder.")}
    assert len([name for name in learned if is_adapter(name)]) == 14
    more = {name for name in names if learns(name, dataclasses.replace(ADAPTERS, norms=True))} - learned
    assert more == {"decoder.final_norm", "decoder.layers.attention_norm", "decoder.layers.mlp_norm"}
    assert all(learns(name, Adapters()) for name in names)


def test_first_adapters():
    """A is uniform within 1 / sqrt(inputs), B zero; what has no adapter is drawn as without."""
    params = split(init_quiet_star(CASE.decoder, [0], [0], 1.0, jax.random.key(3), ADAPTERS))[0]
    for name in MAPS["all"]:
        a, b = params[f"decoder.layers.{name}{A}"], params[f"decoder.layers.{name}{B}"]
        bound = np.prod(a.shape[1:-1]) ** -0.5
        assert not np.any(b)
        assert 0.9 * bound < np.abs(a).max() < bound
    plain = split(init_quiet_star(CASE.decoder, [0], [0], 1.0, jax.random.key(3)))[0]
    for name, value in plain.items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)
