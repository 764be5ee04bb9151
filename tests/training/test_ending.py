"""A run whose thoughts end when the model samples their end: it learns when, resumes bit for bit, and can be a base."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from quietstar_jax.config import from_config_dict, to_config_dict
from quietstar_jax.errors import ConfigError
from quietstar_jax.thoughts.ending import BIAS
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from quietstar_jax.training.setup import begin_objective, first_state, prepare
from tests.training.test_step import step_of
from tests.training.tiny import repeatable, tiny_config

SAMPLED = {"thought__end": "sampled"}


def heads(params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in params.items() if name.startswith("end_head.")}


def test_a_penalty_makes_ends_likelier_and_a_rate_of_zero_keeps_them(tmp_path) -> None:
    """With no difference but the penalty in the rewards, every update makes the end likelier."""
    changes = {"thought__length_penalty": 5.0, "thought__positive_only": False, "thought__kl_weight": 0.1}
    run = prepare(tiny_config(tmp_path, **SAMPLED, **changes))
    state, phase = begin_objective(run, first_state(run)), run.config.phases[1]
    assert heads(state.params)["end_head.bias"] == pytest.approx(BIAS)
    assert heads(state.reference).keys() == heads(state.params).keys()
    after, metrics = step_of(run, phase, begin_objective(run, first_state(run)))
    assert float(heads(after.params)["end_head.bias"][0]) > BIAS
    assert 0 < float(metrics["empty_thought_rate"]) < 1
    assert 0 < float(metrics["thought_length"]) < 2
    frozen = dataclasses.replace(phase, rates=dataclasses.replace(phase.rates, end_head=0.0))
    still, _ = step_of(run, frozen, begin_objective(run, first_state(run)))
    jax.tree.map(np.testing.assert_array_equal, heads(still.params), heads(state.params))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_is_a_base_with_or_without_its_head(tmp_path) -> None:
    config = tiny_config(tmp_path / "whole", **SAMPLED)
    summary = train(config)
    assert 0 <= summary["empty_thought_rate"] <= 1
    assert 0 <= summary["answer_sampled_thought_length"] <= 2
    part = to_config_dict(config)
    part.workdir = str(tmp_path / "part")
    part.phases[1].steps = 2
    train(from_config_dict(part))
    part.phases[1].steps = 4
    assert train(from_config_dict(part))["loss_with_thoughts"] == summary["loss_with_thoughts"]
    whole, again = (repeatable(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "part"))
    final = [record for record in whole if record["kind"] == "train"][-1]
    assert final in again
    assert "thought_length_p95" in final

    begun = to_config_dict(config)
    begun.workdir, begun.model.checkpoint = str(tmp_path / "begun"), str(tmp_path / "whole")
    inherited = heads(first_state(prepare(from_config_dict(begun))).params)
    assert len(inherited) == 2
    assert np.any(inherited["end_head.weight"])
    begun.thought.end = "fixed"
    assert not heads(first_state(prepare(from_config_dict(begun))).params)


@pytest.mark.slow
def test_a_run_from_a_run_of_fixed_length_gets_a_new_head(tmp_path) -> None:
    config = tiny_config(tmp_path / "first")
    train(config)
    begun = to_config_dict(config)
    begun.workdir, begun.model.checkpoint, begun.thought.end = (
        str(tmp_path / "begun"),
        str(tmp_path / "first"),
        "sampled",
    )
    found = heads(first_state(prepare(from_config_dict(begun))).params)
    assert found["end_head.bias"] == pytest.approx(BIAS)
    assert not np.any(found["end_head.weight"])


def test_an_end_of_several_tokens_and_a_pattern_of_no_token_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"initial_end_token is '\( \)', which is 2 tokens .*it must be one"):
        prepare(tiny_config(tmp_path, thought__end="token", thought__initial_end_token="( )"))
    with pytest.raises(ConfigError, match=r"position_pattern is 'no such text', but no token of the tokenizer"):
        prepare(tiny_config(tmp_path, thought__positions="random", thought__position_pattern="no such text"))
    with pytest.raises(ConfigError, match=r"initial_start_token is '\( \)', which is 2 tokens .*positions is 'start'"):
        prepare(tiny_config(tmp_path, thought__positions="start", thought__initial_start_token="( )"))
