"""The thinking gate: its loss by hand, its price, and that it changes nothing else."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quietstar_jax.models.parameters import is_gate, merge, split
from quietstar_jax.thought_config import RateScales
from quietstar_jax.thoughts.flops import step_flops
from quietstar_jax.thoughts.gate import ThinkingGate, gate_logits, gate_loss, gate_targets, mean_gain, predicted_gain
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import abstract_params, init_quiet_star
from quietstar_jax.thoughts.objective import count_targets
from tests.thoughts.cases import TINY, Case, random_model


def gate_of(weight: list[float], bias: float, log_slope: float = 0.0) -> ThinkingGate:
    gate = ThinkingGate(len(weight), nnx.Rngs(0))
    for name, value in (("weight", weight), ("bias", [bias]), ("log_slope", [log_slope])):
        getattr(gate, name).set_value(jnp.array(value, jnp.float32))
    return gate


def test_the_loss_by_hand():
    # Three thoughts with gains 1.5, -0.3 and 0.6 over two tokens; a gate of 0.3 at a price of 0.1.
    base, talk = jnp.array([[[2.0, 1.0]]]), jnp.array([[[1.0, 0.5]], [[2.2, 1.1]], [[1.6, 0.8]]])[None]
    gain = mean_gain(base, talk, 2)
    np.testing.assert_allclose(gain, [[0.6]], atol=1e-6)
    np.testing.assert_allclose(mean_gain(base, talk, 1), [[0.4]], atol=1e-6)  # the next token only
    logits = jnp.full((1, 1, 1), math.log(0.3 / 0.7))
    np.testing.assert_allclose(gate_loss(logits, gate_targets(gain, (0.1,))), [[1.203973]], atol=1e-6)
    np.testing.assert_allclose(gate_loss(logits, gate_targets(gain, (0.6001,))), [[0.356675]], atol=1e-6)  # -log 0.7
    np.testing.assert_allclose(gate_targets(jnp.array([0.1, 0.3]), (0.1, 0.2)), [[0, 0], [1, 1]])  # more, not as much


def test_the_price_is_where_the_gate_is_one_half():
    gate = gate_of([2.0, -1.0], 0.5, math.log(4.0))
    hidden = jnp.array([[1.0, 0.5], [0.0, 0.5], [-1.0, 1.0]])  # u . h + b = 2, 0, -2.5; the slope is 4
    gain = predicted_gain(gate, hidden)
    np.testing.assert_allclose(gain, [0.5, 0.0, -0.625], rtol=1e-6)
    prices = (-1.0, 0.0, 0.3, 0.7)
    logits = gate_logits(gate, hidden, prices)
    np.testing.assert_allclose(logits[0], [6.0, 2.0, 0.8, -0.8], rtol=1e-5)  # 4 (0.5 - price)
    np.testing.assert_array_equal(logits > 0, gain[:, None] > np.array(prices))


def test_a_trained_gate_predicts_the_rate_at_prices_that_it_was_not_trained_at():
    """Gains of a logistic distribution around 0.8 h - 0.1, with the scale 0.25."""
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(20_000, 1)).astype(np.float32)
    gain = jnp.asarray(0.8 * hidden[:, 0] - 0.1 + draw.logistic(scale=0.25, size=20_000), jnp.float32)
    params, graphdef = split(ThinkingGate(1, nnx.Rngs(0)))
    optimizer, prices = optax.sgd(1.0, momentum=0.9), (0.0, 0.2, 0.5)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return gate_loss(gate_logits(merge(graphdef, params), hidden, prices), gate_targets(gain, prices)).mean()

    @jax.jit
    def step(_: int, carry: tuple) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, 600, step, (params, optimizer.init(params)))
    assert math.exp(-params["log_slope"][0]) == pytest.approx(0.25, rel=0.03)
    gate = merge(graphdef, params)
    np.testing.assert_allclose(predicted_gain(gate, jnp.array([[0.0], [1.0]])), [-0.1, 0.7], atol=0.02)
    for price in (-0.3, 0.1, 0.8):
        predicted = jax.nn.sigmoid(gate_logits(gate, hidden, (price,))[:, 0])
        for part in np.array_split(np.argsort(predicted), 5):
            assert float(predicted[part].mean()) == pytest.approx(float((gain[part] > price).mean()), abs=0.03)


CASE = Case("gate", mask=("1111111", "1111100"), positions_per_chunk=2)


def with_gate(config: dict) -> tuple:
    """(loss, metrics, gradients) of the case with a model whose weights are random."""
    plain = random_model(CASE.decoder, 7.0)
    model = init_quiet_star(CASE.decoder, [0], [0], 7.0, jax.random.key(0), heads=("gate",) if config["gate"] else ())
    params, graphdef = split(model)
    draw = np.random.default_rng(1)
    gate = {name: jnp.asarray(draw.normal(size=x.shape), jnp.float32) for name, x in params.items() if "gate." in name}
    params |= split(plain)[0] | gate
    chunk = config.pop("positions_per_chunk", 2)
    settings = dataclasses.replace(CASE.thought, config=dataclasses.replace(CASE.thought.config, **config))
    tokens, mask = CASE.text()

    def loss(params: dict[str, jax.Array]) -> tuple:
        counts = count_targets(mask, settings.tokens_ahead)
        thoughts = CASE.thoughts()
        return quiet_star_loss(
            merge(graphdef, params), tokens, mask, lambda *_: thoughts, counts, settings, chunk
        )  # fmt: skip

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, metrics, gradients


def test_the_gate_learns_and_nothing_else_changes():
    prices = (0.0, 0.2)
    value, metrics, gradients = with_gate({"gate": True, "gate_prices": prices})
    plain, plain_metrics, plain_gradients = with_gate({"gate": False})
    assert float(value) == pytest.approx(float(plain + metrics["gate_loss"]), rel=1e-5)
    assert gradients.keys() - plain_gradients.keys() == {"gate.weight", "gate.bias", "gate.log_slope"}
    assert metrics.keys() - plain_metrics.keys() == {"gate_loss", "gate_rate", "gate_target_rate"}
    for name, gradient in plain_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-5, atol=1e-6, err_msg=name)
    for name in ("gate.weight", "gate.bias", "gate.log_slope"):
        assert np.abs(gradients[name]).max() > 1e-3, name
    assert 0 < metrics["gate_target_rate"] < 1
    assert 0 < metrics["gate_rate"] < 1
    whole = with_gate({"gate": True, "gate_prices": prices, "positions_per_chunk": 7})
    np.testing.assert_allclose(whole[1]["gate_loss"], metrics["gate_loss"], rtol=1e-5)
    np.testing.assert_allclose(whole[2]["gate.weight"], gradients["gate.weight"], rtol=1e-4, atol=1e-6)


def test_a_model_without_a_gate_has_no_weight_and_no_work_for_it():
    assert not [name for name in abstract_params(TINY)[0] if is_gate(name)]
    with_and_without = [abstract_params(TINY, heads=heads)[0] for heads in (("gate",), ())]
    assert with_and_without[0].keys() - with_and_without[1].keys() == {"gate.weight", "gate.bias", "gate.log_slope"}
    settings = CASE.thought
    gated = dataclasses.replace(settings, config=dataclasses.replace(settings.config, gate=True))
    costs = [step_flops(TINY, s, 2, 7) for s in (gated, settings)]
    assert costs[0].scoring_heads - costs[1].scoring_heads == 2 * 7 * 2 * TINY.hidden_size
    assert costs[0].backward - costs[1].backward == 2 * 7 * 2 * TINY.hidden_size
    frozen = RateScales(decoder=0.0, thought_embeddings=0.0)
    costs = [step_flops(TINY, s, 2, 7, frozen) for s in (gated, settings)]
    assert costs[0].backward - costs[1].backward == 2 * 7 * 2 * TINY.hidden_size
