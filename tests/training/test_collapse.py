"""Runs whose thoughts become constant warn, and stop if `stop_on_collapse` is set."""

from __future__ import annotations

import dataclasses
import json

import pytest

from quietstar_jax.config import Config
from quietstar_jax.errors import EXIT_USER_ERROR, CollapsedError, bounded
from quietstar_jax.training.collapse import CollapseCheck, Seen, is_collapsed, seen_before
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from tests.training.tiny import repeatable, tiny_config

COLLAPSED = {"entropy": 0.01, "frac_reward_zero_std": 0.95}
VARIED = {"entropy": 0.5, "frac_reward_zero_std": 0.1}


def collapsing(workdir, **changes) -> Config:
    """A run of which every thought is the likeliest one: at so low a temperature nothing else is sampled."""
    return tiny_config(workdir, thought__sampling_temperature=1e-4, checkpoint__every_steps=100, **changes)


def test_what_counts(tmp_path):
    config = tiny_config(tmp_path)
    plain, thoughts = config.phases
    assert is_collapsed(config, thoughts, COLLAPSED)
    assert not is_collapsed(config, thoughts, COLLAPSED | {"entropy": 0.06})
    assert not is_collapsed(config, thoughts, COLLAPSED | {"frac_reward_zero_std": 0.9})
    assert not is_collapsed(config, thoughts, {"entropy": 0.0}), "with one thought per position there is no share"
    assert not is_collapsed(config, plain, {"base_loss": 1.0})
    assert not is_collapsed(config, dataclasses.replace(thoughts, policy_weight=0.0), COLLAPSED)
    pause = dataclasses.replace(config, thought=dataclasses.replace(config.thought, control="pause"))
    assert not is_collapsed(pause, thoughts, COLLAPSED)
    never = tiny_config(tmp_path, logging__collapse_entropy=0.0)
    assert not is_collapsed(never, thoughts, COLLAPSED | {"entropy": 0.0})


def test_three_steps_in_a_row_and_one_warning(tmp_path):
    config = tiny_config(tmp_path)
    check, phase = CollapseCheck(config), config.phases[1]
    seen = [COLLAPSED, COLLAPSED, VARIED, COLLAPSED, COLLAPSED, COLLAPSED, COLLAPSED, VARIED, *[COLLAPSED] * 4]
    warned = [bool(check.follow(step, phase, values)) for step, values in enumerate(seen, start=1)]
    assert [step for step, warning in enumerate(warned, start=1) if warning] == [6]
    assert check.warned_at == 6
    assert check.collapsed
    assert "at step 11" in check.warning, "a stop reports the latest"
    for name in ("sampling_temperature", "entropy_bonus", "entropy_target", "num_thoughts", "kl_weight",
                 "policy_weight", "learning_rate", "collapse_entropy = 0.05", "0.01", "0.95"):  # fmt: skip
        assert name in check.warning


def test_what_a_resumed_run_knows(tmp_path):
    config = tiny_config(tmp_path)

    def record(kind, step, **values):
        return {"kind": kind, "step": step, "phase": "thoughts", **values}

    train_records = [record("train", step, **(VARIED if step == 4 else COLLAPSED)) for step in range(4, 9)]
    assert seen_before(config, [], 0) == Seen()
    assert seen_before(config, train_records[:3], 6) == Seen(streak=2)
    assert seen_before(config, train_records, 9) == Seen(), "step 9 has no record"
    warning = record("warning", 7, warning="text", **COLLAPSED)
    assert seen_before(config, [*train_records, warning], 8) == Seen(4, 7, "text")
    assert seen_before(config, [warning], 8) == Seen(3, 7, "text"), "few steps have records"
    assert seen_before(config, [warning], 9) == Seen(0, 7, "text")
    never = tiny_config(tmp_path, logging__collapse_entropy=0.0)
    assert seen_before(never, [*train_records, warning], 8) == Seen(0, 7, "text")
    assert seen_before(config, [record("train", 1, **COLLAPSED) | {"phase": "gone"}], 1) == Seen()


@pytest.mark.slow
def test_a_run_warns_once_and_goes_on(tmp_path, capsys):
    idle = {"thought__entropy_bonus_max": 2.0}  # a setting without effect, which the run names
    summary = train(collapsing(tmp_path / "whole", **idle))
    printed = capsys.readouterr().out
    assert printed.count("Note: config.thought.entropy_bonus_max is 2.0, which has no effect") == 1
    assert printed.count("warning: Thoughts have collapsed at step 6 (phase 'thoughts')") == 1
    assert summary["step"] == 7
    assert summary["thoughts_collapsed_at_step"] == 6
    assert json.loads((tmp_path / "whole/summary.json").read_text()) == summary
    records = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "warning"] == [6]

    with pytest.raises(CollapsedError):
        train(collapsing(tmp_path / "stopped", logging__stop_on_collapse=True, **idle))
    again = train(collapsing(tmp_path / "stopped", **idle))
    assert {**again, "paths": 0} == {**summary, "paths": 0}
    assert repeatable(read_metrics(tmp_path / "stopped/metrics.jsonl")) == repeatable(records)


@pytest.mark.some(1)
@pytest.mark.parametrize("every", [1, 5])
def test_a_run_stops_and_stops_again(tmp_path, every):
    config = collapsing(tmp_path, logging__stop_on_collapse=True, logging__every_steps=every)
    for _ in range(2):
        with pytest.raises(CollapsedError) as stopped:
            train(config)
        assert stopped.value.status == EXIT_USER_ERROR
        for part in ("collapsed at step 6", "sampling_temperature", "state after step 7 is saved", "Start another run"):
            assert part in bounded(str(stopped.value))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]
        assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_varied_thoughts_are_no_collapse(tmp_path):
    assert train(tiny_config(tmp_path, logging__stop_on_collapse=True))["thoughts_collapsed_at_step"] is None
