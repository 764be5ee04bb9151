"""A run with a thinking gate: the other weights train as without it, and a base need not have one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from quietstar_jax.config import OptimizerConfig, from_config_dict, to_config_dict
from quietstar_jax.models.parameters import is_gate
from quietstar_jax.training.loop import train
from quietstar_jax.training.optimizer import clip_gradients, decay_mask, make_optimizer
from quietstar_jax.training.setup import begin_objective, first_state, prepare
from quietstar_jax.training.summary import format_summary
from tests.training.test_step import step_of
from tests.training.tiny import tiny_config


def test_the_gate_changes_no_update_of_another_weight(tmp_path):
    run, plain = (prepare(tiny_config(tmp_path, thought__gate=gate)) for gate in (True, False))
    state, metrics = step_of(run, run.config.phases[1])
    expected, plain_metrics = step_of(plain, plain.config.phases[1])
    names = {name for name in state.params if is_gate(name)}
    assert state.params.keys() - expected.params.keys() == names
    moments, wanted = state.opt_state[1].mu, expected.opt_state[1].mu
    for name, value in wanted.items():
        scale = float(np.abs(value).max()) + 1e-12
        np.testing.assert_allclose(moments[name] / scale, value / scale, atol=2e-5, err_msg=name)
    assert float(metrics["gate_loss"]) > 0
    assert float(metrics["gradient_norm"]) == pytest.approx(float(plain_metrics["gradient_norm"]), rel=1e-5)
    assert all(np.any(state.params[name]) for name in names)
    frozen = dataclasses.replace(run.config.phases[1].rates, gate=0.0)
    still, _ = step_of(run, dataclasses.replace(run.config.phases[1], rates=frozen))
    assert not any(np.any(still.params[name]) for name in names)


def test_the_reference_of_the_divergence_has_no_gate(tmp_path):
    run = prepare(tiny_config(tmp_path, thought__gate=True, thought__kl_weight=0.1))
    state = begin_objective(run, first_state(run))
    compared = {name for name in state.params if not name.startswith(("mixing_head.", "gate."))}
    assert set(state.reference) == compared < set(state.params)
    after, metrics = step_of(run, run.config.phases[1], state)
    assert set(after.reference) == compared
    assert float(metrics["kl"]) == 0.0


def test_the_gate_is_clipped_alone():
    config = OptimizerConfig(clip_norm=1.0)
    clip = make_optimizer(config)
    params = {"gate.bias": np.ones(1, np.float32), "decoder.x": np.ones(2, np.float32)}
    state = clip.init(params)
    found, expected = (
        clip.update({"gate.bias": np.float32([gate]), "decoder.x": np.float32([3.0, 4.0])}, state, params)[0]
        for gate in (1e6, 0.0)
    )
    np.testing.assert_array_equal(found["decoder.x"], expected["decoder.x"])
    clipped, _ = clip_gradients(1.0).update(
        {"gate.bias": np.float32([3.0]), "gate.weight": np.float32([-4.0]), "decoder.x": np.float32([0.3, 0.4])},
        optax.EmptyState(),
    )
    np.testing.assert_allclose([*clipped["gate.bias"], *clipped["gate.weight"]], [0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["decoder.x"], [0.3, 0.4], rtol=1e-6)  # its norm is below the bound
    masked = decay_mask({"gate.weight": 0, "gate.bias": 0, "gate.log_slope": 0}, config)
    assert masked == {"gate.weight": True, "gate.bias": False, "gate.log_slope": False}


@pytest.mark.some(1)
@pytest.mark.parametrize("base_has_gate", [True, False])
def test_a_run_from_a_run(tmp_path, base_has_gate):
    config = tiny_config(tmp_path / "first", thought__gate=base_has_gate)
    summary = train(config)
    gated = [name for name in summary if name.startswith(("answers_kept_gate", "thinking_rate_gate"))]
    assert bool(gated) == base_has_gate
    assert ("answer_front" in summary) == base_has_gate
    if base_has_gate:
        front = summary["answer_front"]
        assert front["answers"] == 400
        assert f"keeping 97 %, %\n    random {100 * summary['answers_kept_random']:>41.1f}" in format_summary(summary)
        assert set(front["policies"]) == {"random", "entropy", "margin", "gate", "start", "entropy_band"}
        always = front["policies"]["gate"]["points"][-1]
        assert always["right"] == pytest.approx(summary["answer_accuracy_with_thoughts"])
    again = to_config_dict(config)
    again.workdir, again.model.checkpoint = str(tmp_path / "again"), str(tmp_path / "first")
    again.thought.gate = True
    params = first_state(prepare(from_config_dict(again))).params
    gate = {name: np.asarray(x) for name, x in params.items() if is_gate(name)}
    assert len(gate) == 3
    assert any(map(np.any, gate.values())) == base_has_gate
    again.thought.gate = False
    assert not [name for name in first_state(prepare(from_config_dict(again))).params if is_gate(name)]
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), params))
