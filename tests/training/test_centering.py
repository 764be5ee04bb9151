"""The mixing head is centred once, before the first step with thoughts, and stays so over a resume."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.config import from_config_dict, to_config_dict
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from quietstar_jax.training.setup import center_mixing_head, first_state, prepare
from tests.training.test_step import batch_of
from tests.training.tiny import repeatable, tiny_config

CENTERED = {"thought__center_mixing_head": True, "thought__mixing": "probabilities"}


def test_the_bias_absorbs_the_mean_of_real_tokens_unless_the_head_has_learned(tmp_path) -> None:
    run = prepare(tiny_config(tmp_path, **CENTERED))
    state, batch = first_state(run), batch_of(run)
    batch = batch._replace(mask=batch.mask.at[0, 5:].set(False))
    with jax.set_mesh(run.mesh):
        centered = center_mixing_head(run, state, batch)
        model = merge(run.graphdef, state.weights)
        text = read_text(model.decoder, *batch, dtype=jnp.float32)
        mean = np.asarray(text.hidden)[np.asarray(batch.mask)].mean(axis=0)
        p = {name: np.asarray(value) for name, value in state.params.items()}
        expected = p["mixing_head.in_bias"] - mean @ (p["mixing_head.base_in"] + p["mixing_head.thought_in"])
        np.testing.assert_allclose(centered.params["mixing_head.in_bias"], expected, atol=1e-5)
        others = {name: x for name, x in centered.params.items() if name != "mixing_head.in_bias"}
        jax.tree.map(np.testing.assert_array_equal, others, {name: p[name] for name in others})
        learned = state._replace(params=state.params | {"mixing_head.out": state.params["mixing_head.out"] + 1})
        kept = center_mixing_head(run, learned, batch)
        np.testing.assert_array_equal(kept.params["mixing_head.in_bias"], p["mixing_head.in_bias"])


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [3, 4])
def test_a_run_centers_once_and_resumes_bit_for_bit(tmp_path, stopped_after) -> None:
    """Stopped right before the first step with thoughts, and after it."""
    whole = tiny_config(tmp_path / "whole", **CENTERED)
    train(whole)
    part = to_config_dict(whole)
    part.workdir, part.phases[1].steps = str(tmp_path / "part"), stopped_after - 3
    train(from_config_dict(part))
    part.phases[1].steps = 4
    train(from_config_dict(part))
    without = tiny_config(tmp_path / "without", thought__mixing="probabilities")
    train(without)
    records = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "part", "without")}
    found = {name: [one for one in repeatable(all) if one["kind"] == "train"] for name, all in records.items()}
    assert found["whole"] == found["part"]
    assert found["whole"][:3] == found["without"][:3]
    for name in ("base_loss", "talk_loss", "mixing_weight"):  # the weight is constant at first
        assert found["whole"][3][name] == found["without"][3][name]
    assert found["whole"][-1] != found["without"][-1]
