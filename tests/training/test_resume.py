"""A run that is killed and started again must come to the same numbers, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.config import Config
from quietstar_jax.errors import CheckpointError, DivergedError
from quietstar_jax.hf.names import Target
from quietstar_jax.settings import to_mapping
from quietstar_jax.training.loop import train
from quietstar_jax.training.resume import check_same_run, incompatible_changes
from tests.training.tiny import repeatable, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def records(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(tiny_config(workdir))


def test_summary_and_records(uninterrupted):
    workdir, summary = uninterrupted
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in ("loss_without_thoughts", "loss_with_thoughts", "answer_accuracy_without_thoughts",
                 "answer_accuracy_with_thoughts", "useful_thought_rate"):  # fmt: skip
        assert isinstance(summary[name], float)
    assert len(summary["sample_thoughts"]) == 3
    steps = [record["step"] for record in records(workdir) if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    evaluated = {record["step"]: record for record in records(workdir) if record["kind"] == "evaluation"}
    assert list(evaluated) == [3, 7]
    plain, thoughts = evaluated.values()
    assert plain["thought_entropy"] == 0, "no thoughts are computed before the first phase that trains them"
    assert plain["loss_with_thoughts"] == plain["loss_without_thoughts"]
    assert plain["answer_accuracy_with_thoughts"] == plain["answer_accuracy_without_thoughts"]
    assert thoughts["thought_entropy"] > 1
    assert plain["sample_thoughts"] == []
    assert thoughts["sample_thoughts"] == summary["sample_thoughts"]


def test_a_finished_run_starts_again_without_a_step(uninterrupted):
    workdir, summary = uninterrupted
    before = records(workdir)
    assert train(tiny_config(workdir)) == summary
    assert records(workdir) == before


def test_killed_and_resumed_is_bit_identical(uninterrupted, tmp_path):
    """kill -9 in the middle of the second phase; the checkpoint is older than the last step."""
    script = (
        "import sys; from pathlib import Path; from quietstar_jax.training.loop import train;"
        "from tests.training.tiny import tiny_config; train(tiny_config(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 300
    while not any(record["step"] >= 5 for record in records(tmp_path)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "summary.json").exists()

    summary = train(tiny_config(tmp_path))
    whole, whole_summary = uninterrupted
    assert repeatable(records(tmp_path)) == repeatable(records(whole))
    assert {**summary, "paths": None} == {**whole_summary, "paths": None}


def test_more_steps_continue_the_last_phase(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    short = tiny_config(tmp_path)
    plain, thoughts = short.phases
    short = dataclasses.replace(short, phases=(plain, dataclasses.replace(thoughts, steps=2)))
    train(short)
    train(tiny_config(tmp_path))
    loss = {record["step"]: record["loss"] for record in records(tmp_path) if record["kind"] == "train"}
    assert loss == {record["step"]: record["loss"] for record in records(workdir) if record["kind"] == "train"}


@pytest.mark.slow
def test_the_state_of_the_objective_is_resumed_bit_for_bit(tmp_path):
    """The adapted entropy bonus and the initial weights; the second phase resets the optimizer, not these."""
    changes = {"thought__entropy_target": 4.7, "thought__entropy_bonus_step": 0.25, "thought__kl_weight": 0.5}
    changes |= {"thought__advantage": "batch_std", "thought__importance_cap": 2.0, "thought__positive_only": False}

    def config(workdir, steps):
        config = tiny_config(workdir, **changes)
        plain, thoughts = config.phases
        return dataclasses.replace(
            config, phases=(plain, dataclasses.replace(thoughts, steps=steps, fresh_optimizer=True))
        )

    train(config(tmp_path / "whole", 4))
    for steps in (2, 4):
        train(config(tmp_path / "parts", steps))
    whole, parts = (
        [record for record in records(tmp_path / name) if record["kind"] == "train"] for name in ("whole", "parts")
    )
    assert parts == whole
    assert [record.get("entropy_bonus") for record in whole] == [None] * 3 + [0.0, 0.25, 0.5, 0.75]
    assert abs(whole[3]["kl"]) < 1e-6, "the reference is the weights when the phase begins"
    assert all(record["kl"] > 1e-6 for record in whole[4:])
    with pytest.raises(CheckpointError, match=r"config\.thought\.kl_weight: 0\.5 -> 0\.0"):
        train(tiny_config(tmp_path / "whole", **changes | {"thought__kl_weight": 0.0}))


def test_a_changed_configuration_is_refused_with_its_differences(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(CheckpointError, match=r"config\.optimizer\.b1: 0\.9 -> 0\.5") as error:
        train(tiny_config(workdir, optimizer__b1=0.5, seed=3))
    assert "config.seed: 0 -> 3" in str(error.value)


def test_what_may_change_between_runs():
    def record(phases, architecture=4, **settings):
        config = {"seed": 0, "logging": {"every_steps": 1}, "phases": phases} | settings
        return {"config": config, "architecture": {"num_layers": architecture}, "model_commit": "", "vocabulary": {}}

    def phase(**settings):
        return {"steps": 4, "decay": "constant", "rate": 1, "thought_length": 0} | settings

    saved = record([phase()])
    check_same_run(saved, record(saved["config"]["phases"], logging={"every_steps": 9}), step=2)
    check_same_run(saved, record([phase(steps=9), phase(steps=1)]), step=4)
    fits_elsewhere = record([phase(microbatches=8)], model={"rematerialize": True, "prefix_attention": "triton"})
    elsewhere = {"rematerialize": False, "prefix_attention": "auto"}
    check_same_run(record([phase(microbatches=1)], model=elsewhere), fits_elsewhere, step=2)
    newer = saved | {"vocabulary": {"start_token": 7, "end_token": None}}  # fields that older records lack
    check_same_run(saved, newer, step=2)
    with pytest.raises(CheckpointError, match=r"vocabulary\.start_token: 7 -> 8"):
        check_same_run(newer, saved | {"vocabulary": {"start_token": 8, "end_token": None}}, step=2)
    with pytest.raises(CheckpointError, match="rate: 1 -> 2"):
        check_same_run(saved, record([phase(rate=2)]), step=2)
    decaying = record([phase(decay="cosine")])
    with pytest.raises(CheckpointError, match="steps: 4 -> 9"):
        check_same_run(decaying, record([phase(decay="cosine", steps=9)]), step=2)
    pause = {"thought": {"control": "pause"}}
    phases = [phase(), phase(thought_length=6)]
    check_same_run(record(phases, thought={"control": "none"}), record(phases, **pause), step=4)
    old, unmasked = {"packing": "packed"}, {"packing": "packed", "document_mask": False}
    check_same_run(record(phases, data=old), record(phases, data=unmasked), step=2)
    with pytest.raises(CheckpointError, match=r"data\.document_mask: False -> True"):
        check_same_run(record(phases, data=old), record(phases, data=unmasked | {"document_mask": True}), step=2)
    spans = {"packing": "random_span"}
    check_same_run(record(phases, data=spans), record(phases, data=spans | {"document_mask": True}), step=2)
    with pytest.raises(CheckpointError, match=r"config\.thought\.control: 'none' -> 'pause'"):
        check_same_run(record(phases, thought={"control": "none"}), record(phases, **pause), step=5)
    all_rewards, untrained = {"thought": {"positive_only": False}}, [phase(thought_length=6, policy_weight=0.0)]
    check_same_run(record(untrained), record(untrained, **all_rewards), step=2)
    trained = [*untrained, phase(thought_length=6, policy_weight=1.0)]
    check_same_run(record(trained), record(trained, **all_rewards), step=4)
    with pytest.raises(CheckpointError, match=r"config\.thought\.positive_only: True -> False"):
        check_same_run(record(trained), record(trained, **all_rewards), step=5)
    frozen = [phase(thought_length=6, rates={"decoder": 0.0, "thought_embeddings": 0.0})]  # trains no thought
    check_same_run(record(frozen), record(frozen, **all_rewards), step=2)
    adapted = {"model": {"checkpoint": "base", "adapters": to_mapping(Adapters("mlp"))}}
    with pytest.raises(CheckpointError, match=r"config\.thought\.positive_only: True -> False"):
        check_same_run(record(frozen, **adapted), record(frozen, **adapted, **all_rewards), step=2)
    with pytest.raises(CheckpointError, match=r"config\.thought\.embedding_scale: 1 -> 2"):
        check_same_run(record([phase()], thought={"embedding_scale": 1}),
                       record([phase()], thought={"embedding_scale": 2}), step=2)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"architecture\.num_layers: 4 -> 5"):
        check_same_run(saved, record(saved["config"]["phases"], architecture=5), step=2)
    newer = {"architecture": {**to_mapping(Architecture()), "num_layers": 4}}
    check_same_run(saved, saved | newer, step=2)
    newer["architecture"]["logit_cap"] = 3.0  # a field that the record does not have
    with pytest.raises(CheckpointError, match=r"architecture\.logit_cap: 0\.0 -> 3\.0"):
        check_same_run(saved, saved | newer, step=2)


@pytest.mark.slow
def test_a_checkpoint_from_before_a_setting_existed_is_resumed():
    """It was written as if the setting had its default; another value is a change."""
    config = to_mapping(Config())
    old = {**config, "data": {name: value for name, value in config["data"].items() if name != "weights"}}
    assert incompatible_changes(old, config, step=2) == []
    weighted = {**config, "data": {**config["data"], "weights": (1.0,)}}
    assert incompatible_changes(old, weighted, step=2) == ["config.data.weights: 0 entries -> 1 entries"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(tmp_path, checkpoint__every_steps=1)
    wild = dataclasses.replace(config.phases[0], learning_rate=1e38, warmup_steps=0)
    config = dataclasses.replace(config, phases=(wild,))
    with pytest.raises(DivergedError, match=r"Step 1 \(phase 'plain'\).*parameter_norm = inf.*checkpoint is none"):
        train(config)
    assert not (tmp_path / "summary.json").exists()


def test_a_damaged_checkpoint_is_as_if_it_had_never_been(uninterrupted, tmp_path):
    """The step before it is resumed, with its data position, and comes to the same numbers bit for bit."""
    whole, summary = uninterrupted
    workdir = shutil.copytree(whole, tmp_path / "run")
    for name in ("params", "data"):
        files = (path for path in (workdir / "checkpoints/7" / name).rglob("*") if path.is_file())
        file = max(files, key=os.path.getsize)
        file.write_bytes(file.read_bytes()[:-9])
    assert {**train(tiny_config(workdir)), "paths": None} == {**summary, "paths": None}
    assert repeatable(records(workdir)) == repeatable(records(whole))
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["6", "7", "7.broken-1"]
    again, before = (open_run(folder, 7).parameters for folder in (workdir, whole))
    assert again.shapes == before.shapes
    for name, shape in before.shapes.items():
        assert (again.read(Target(name, shape)) == before.read(Target(name, shape))).all()
