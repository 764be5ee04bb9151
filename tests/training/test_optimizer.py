import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.config import OptimizerConfig
from quietstar_jax.thought_config import Phase, RateScales
from quietstar_jax.training.optimizer import apply_updates, decay_mask, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("constant", 0, 0.25),  # the first of 4 warm-up steps
        ("constant", 3, 1.0),
        ("constant", 11, 1.0),
        ("linear", 4, 1.0),
        ("linear", 8, 0.75),  # half way from 1 to 0.5 over 8 steps
        ("linear", 11, 0.5625),  # the last step, one of 8 before 0.5
        ("cosine", 8, 0.75),
        ("cosine", 11, 0.5 + 0.25 * (1 + np.cos(np.pi * 7 / 8))),
    ],
)
def test_learning_rate_by_hand(decay, step, expected):
    phase = Phase(steps=12, warmup_steps=4, learning_rate=1.0, decay=decay, final_rate_fraction=0.5)
    assert float(learning_rate(phase, jnp.int32(step))) == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0, 1, 2, 6, 7, 9])
@pytest.mark.parametrize("final", [0.0, 0.3])
def test_every_step_has_a_rate_and_the_decay_only_falls(decay, steps, warmup, final):
    phase = Phase(steps=steps, warmup_steps=warmup, learning_rate=1.0, decay=decay, final_rate_fraction=final)
    rates = np.array([float(learning_rate(phase, jnp.int32(step))) for step in range(steps)])
    assert (rates > final * 0.999).all() or warmup > 1
    assert (rates > 0).all()
    assert (np.diff(rates[max(warmup - 1, 0) :]) <= 1e-7).all()
    assert (np.diff(rates[:warmup]) >= 0).all()


def test_no_warm_up_starts_at_the_full_rate():
    phase = Phase(steps=5, warmup_steps=0, learning_rate=0.3)
    assert float(learning_rate(phase, jnp.int32(0))) == pytest.approx(0.3)


def test_norms_and_biases_do_not_decay():
    names = ("decoder.layers.query", "decoder.layers.query_norm", "decoder.final_norm", "mixing_head.in_bias")
    params = dict.fromkeys(names, jnp.ones(2))
    assert list(decay_mask(params, OptimizerConfig()).values()) == [True, False, False, False]
    assert all(decay_mask(params, OptimizerConfig(decay_mask="all")).values())


def test_adamw_step_by_hand():
    """First step of Adam: the update is the sign of the gradient, plus weight decay."""
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1, clip_norm=0.0, eps=1e-12))
    params = {"decoder.embedding": jnp.array([2.0, -4.0]), "decoder.final_norm": jnp.array([1.0])}
    gradients = {"decoder.embedding": jnp.array([0.5, -0.25]), "decoder.final_norm": jnp.array([3.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after = apply_updates(params, updates, jnp.float32(0.5), RateScales())
    np.testing.assert_allclose(after["decoder.embedding"], [2 - 0.5 * 1.2, -4 + 0.5 * 1.4], rtol=1e-5)
    np.testing.assert_allclose(after["decoder.final_norm"], [0.5], rtol=1e-5)


def test_clipping_bounds_the_whole_gradient():
    clipped = make_optimizer(OptimizerConfig(b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1.0))
    params = {"decoder.embedding": jnp.zeros(2)}
    updates, _ = clipped.update({"decoder.embedding": jnp.array([3.0, 4.0])}, clipped.init(params), params)
    gradient = np.array([0.6, 0.8])
    np.testing.assert_allclose(updates["decoder.embedding"], gradient / (gradient + 1.0), rtol=1e-6)


def test_scale_zero_freezes_bit_for_bit():
    params = {"decoder.embedding": jnp.ones(2), "mixing_head.out": jnp.ones(2), "start_embedding": jnp.ones(2)}
    after = apply_updates(params, params, jnp.float32(0.5), RateScales(decoder=0.0, thought_embeddings=2.0))
    assert [float(value[0]) for value in after.values()] == [1.0, 0.5, 0.0]
