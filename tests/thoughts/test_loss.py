"""The gradient of the objective as a derivative, and the objective over parts of a batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.objective import count_targets
from tests.thoughts.cases import Case, random_model, relative_error, worst_errors

ROOT = Path(__file__).resolve().parents[2]


def loss_of(case: Case, graphdef, tokens, mask, thoughts, counts):
    def loss(params):
        model = merge(graphdef, params)
        return quiet_star_loss(
            model, tokens, mask, lambda *_: thoughts, counts, case.thought, case.positions_per_chunk
        )  # fmt: skip

    return loss


@pytest.mark.parametrize("mixing", ["hidden_states", "log_probabilities"])
def test_gradient_is_the_derivative(mixing: str) -> None:
    """Along random directions. Without the policy term, whose rewards are constants by definition, and with biases that
    keep every ReLU of the mixing head open: finite differences across its kink mean nothing."""
    case = Case("derivative", mask=("1111111", "1111100"), settings={"policy_weight": 0.0}, config={"mixing": mixing})
    params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
    params |= {name: params[name] + 20.0 for name in ("mixing_head.in_bias", "mixing_head.hidden_bias")}
    params["mixing_head.out"] *= 0.02
    (tokens, mask), thoughts = case.text(), case.thoughts()
    loss = loss_of(case, graphdef, tokens, mask, thoughts, count_targets(mask, case.thought.tokens_ahead))
    value, gradient = jax.jit(lambda p: loss(p)[0]), jax.jit(jax.grad(lambda p: loss(p)[0]))(params)
    rng = np.random.default_rng(3)
    for _ in range(3):
        direction = {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.02 for name, x in params.items()}
        slope = sum(float(jnp.vdot(direction[name], gradient[name])) for name in params)

        def central(step, direction=direction):
            ends = [value({n: x + sign * step * direction[n] for n, x in params.items()}) for sign in (1, -1)]
            return float(ends[0] - ends[1]) / (2 * step)

        found = (4 * central(0.02) - central(0.04)) / 3  # without the term in the square of the step
        assert found == pytest.approx(slope, rel=0.01, abs=3e-4)


def test_weight_zero_leaves_the_policy_out() -> None:
    """Phases in which no thought is trained do the same whatever REINFORCE is set to."""

    def run(**config) -> tuple:
        case = Case("untrained", settings={"policy_weight": 0.0}, config=config)
        params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
        (tokens, mask), thoughts = case.text(), case.thoughts()
        loss = loss_of(case, graphdef, tokens, mask, thoughts, count_targets(mask, case.thought.tokens_ahead))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, metrics), _ = mine = run()
    assert "policy_loss" not in metrics
    other = run(score_temperature=1.0, positive_only=False, policy_reduction="sum")
    assert jax.tree.map(np.array_equal, mine, other) == jax.tree.map(lambda _: True, mine)


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [2, 7])
def test_a_mixing_weight_of_zero_rewards_nothing_and_learns(dtype: str, chunk: int) -> None:
    """As at the first step: with one thought the reward is the advantage, and rounding would be one."""
    settings = {"num_thoughts": 1, "policy_weight": 1e6, "compute_dtype": dtype}
    case = Case("begin", mask=("1111111", "1111100"), settings=settings, positions_per_chunk=chunk)
    params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
    params["mixing_head.out"] *= 0.0
    (tokens, mask), thoughts = case.text(), case.thoughts()
    loss = loss_of(case, graphdef, tokens, mask, thoughts, count_targets(mask, case.thought.tokens_ahead))
    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert (float(metrics["reward"]), float(metrics["policy_loss"])) == (0.0, 0.0)
    assert not np.any(gradient["start_embedding"])
    assert not np.any(gradient["mixing_head.hidden"])
    assert np.abs(gradient["mixing_head.out"]).max() > 1e-3
    nearly = jax.jit(jax.grad(loss, has_aux=True))(params | {"mixing_head.out": params["mixing_head.out"] + 1e-9})[0]
    assert relative_error(gradient["mixing_head.out"], nearly["mixing_head.out"]) < 1e-3


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    case = Case("parts", batch=4, mask=("1111111", "1100000", "1111000", "0111111"))
    params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
    (tokens, mask), thoughts = case.text(), case.thoughts()
    counts = count_targets(mask, case.thought.tokens_ahead)

    def grad(rows: slice):
        part = jax.tree.map(lambda x: x[rows], (tokens, mask, thoughts))
        return jax.jit(jax.value_and_grad(loss_of(case, graphdef, *part, counts), has_aux=True))(params)

    (whole, metrics), gradient = grad(slice(None))
    parts = [grad(slice(i, i + 1)) for i in range(4)]
    (total, total_metrics), total_gradient = jax.tree.map(lambda *x: sum(x), *parts)
    assert relative_error(total, whole) < 1e-5
    assert not worst_errors(total_metrics, metrics, 1e-4)
    assert not worst_errors(total_gradient, gradient, 1e-4)


@pytest.mark.some(1)
@pytest.mark.parametrize("prefixes", [("decoder.",), ("decoder.", "start_", "end_"), ("decoder.layers.up", "mixing")])
def test_frozen_weights_get_no_gradient_and_the_others_the_same(prefixes: tuple[str, ...]) -> None:
    case = Case("frozen", mask=("1111111", "1111100"))
    params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
    (tokens, mask), thoughts = case.text(), case.thoughts()
    counts = count_targets(mask, case.thought.tokens_ahead)

    def gradient(frozen):
        def loss(params):
            model = merge(graphdef, params)
            return quiet_star_loss(
                model, tokens, mask, lambda *_: thoughts, counts, case.thought, case.positions_per_chunk, frozen=frozen
            )[0]  # fmt: skip

        return jax.jit(jax.grad(loss))(params)

    full, part = gradient(lambda name: False), gradient(lambda name: name.startswith(prefixes))
    idle = (*prefixes, "start_spare", "end_spare")
    assert {name for name in part if not np.any(part[name])} == {name for name in part if name.startswith(idle)}
    assert not worst_errors(
        part, {n: jnp.zeros_like(x) if n.startswith(prefixes) else x for n, x in full.items()}, 1e-5
    )


@pytest.mark.parametrize(
    ("environment", "which"),
    [
        # The suite compiles without optimizations; what users run must give the same numbers.
        pytest.param({"XLA_FLAGS": ""}, "golden_loss and r2_t2_k2-whole_text", id="optimized"),
        pytest.param({"XLA_FLAGS": ""}, "golden_loss", marks=pytest.mark.slow, id="all_optimized"),
        pytest.param(
            {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}, "golden_loss", marks=pytest.mark.slow,
            id="nnx_without_graphs",
        ),
    ],
)  # fmt: skip
def test_golden_files_hold_in_another_environment(environment: dict[str, str], which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", which]
    found = subprocess.run(
        [*command, "tests/thoughts/test_golden.py"], cwd=ROOT, env={**os.environ, **environment}, capture_output=True,
        text=True, timeout=1200,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
