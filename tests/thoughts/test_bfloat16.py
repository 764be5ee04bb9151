"""The objective computed in bfloat16 stays close to float32: how close is stated here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.objective import count_targets, rewards
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.text import here_and_ahead, read_text
from tests.thoughts.cases import Case, random_model

CASE = Case(
    "bfloat16", length=24, mask=("1" * 24, "1" * 19 + "0" * 5), positions_per_chunk=7, settings={"thought_length": 4},
    architecture={"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2,
                  "head_dim": 16},
)  # fmt: skip
# Relative: of the loss, and of the 2-norm of every parameter's gradient. ChainMask: 0.0003 and 0.10.
LOSS, GRADIENT = 0.001, 0.13


@pytest.fixture(scope="module")
def params_and_structure():
    return split(random_model(CASE.decoder, CASE.thought.config.embedding_scale))


def test_loss_and_gradients_within_the_stated_bounds(params_and_structure) -> None:
    params, graphdef = params_and_structure
    (tokens, mask), thoughts = CASE.text(), CASE.thoughts()
    counts = count_targets(mask, CASE.thought.tokens_ahead)

    def value_and_gradient(dtype: str):
        # Without the policy: its advantages are cut off at 0, and rounding may carry one across.
        settings = dataclasses.replace(CASE.thought, compute_dtype=dtype, policy_weight=0.0)

        def loss(params):
            model = merge(graphdef, params)
            return quiet_star_loss(
                model, tokens, mask, lambda *_: thoughts, counts, settings, CASE.positions_per_chunk
            )[0]  # fmt: skip

        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradient), (narrow, narrow_gradient) = value_and_gradient("float32"), value_and_gradient("bfloat16")
    assert narrow.dtype == jnp.float32
    assert abs(narrow - value) < LOSS * value
    for name, wanted in gradient.items():
        assert narrow_gradient[name].dtype == jnp.float32, name
        error = float(jnp.linalg.norm(narrow_gradient[name] - wanted))
        assert error <= GRADIENT * float(jnp.linalg.norm(wanted)), (name, error)


def test_rewards_of_a_hardly_opened_mixing_head_survive(params_and_structure) -> None:
    """At the size of early rewards, where rounding mixed states to bfloat16 leaves exact zeros and noise."""
    params, graphdef = params_and_structure
    tokens, mask = CASE.text()
    quiet = {**params, "mixing_head.out": params["mixing_head.out"] * 1e-5}

    def reward(dtype: str) -> np.ndarray:
        settings = dataclasses.replace(CASE.thought, compute_dtype=dtype)
        model = merge(graphdef, quiet)
        text = read_text(model.decoder, tokens, mask, dtype=settings.dtype)
        positions = jnp.arange(12)
        scores = score_thoughts(model, text, positions, CASE.thoughts().tokens[:, :, :12], settings)
        return np.asarray(rewards(here_and_ahead(text.nll, positions, settings.tokens_ahead), scores.nll)).ravel()

    wide, narrow = reward("float32"), reward("bfloat16")
    assert np.abs(wide).max() < 1e-3
    assert np.corrcoef(wide, narrow)[0, 1] > 0.95
    assert (np.sign(wide) == np.sign(narrow)).mean() > 0.9
