"""Running a study: phases that runs share are done once, to the same numbers; killed studies go on."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.studies import runner
from quietstar_jax.studies.results import collect, read_results
from quietstar_jax.studies.runner import plan, run_study
from quietstar_jax.studies.study import Study
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from tests.training.tiny import repeatable

ROOT = Path(__file__).resolve().parents[2]
TINY = """
from pathlib import Path
from tests.training.tiny import phase, tiny_config_dict

def get_config():
    config = tiny_config_dict(Path("set on the command line"))
    config.data.synthetic.validation_documents = 6
    config.phases.append(phase(**(config.phases[1].to_dict() | dict(name="more", steps=2, fresh_optimizer=True))))
    config.phases[1].policy_weight = 0.0
    config.evaluation.every_steps = 2
    return config
"""
VARIANTS = {
    "pause": {"thought.control": "pause"},  # first phase as the baseline, measured in another way
    "baseline": {},
    "no_policy": {"phases[2].policy_weight": 0.0},  # two phases as the baseline
    "all_rewards": {"thought.positive_only": False},  # two phases, in which no thought is trained
    "short": {"phases[0].steps": 2},  # nothing in common
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = tmp_path_factory.mktemp("base") / "tiny.py"
    base.write_text(TINY)
    return Study(str(base), VARIANTS, "baseline", seeds=(0, 1), metrics=("loss_with_thoughts",))


@pytest.fixture
def in_this_process(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train here: a process of its own would compile everything again."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        workdir = Path(next(word for word in command if word.startswith("--config.workdir=")).partition("=")[2])
        planned = plan(study, workdir.parents[1])
        train(next(run.config for run in planned if run.workdir == workdir))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runner.subprocess, "run", run)


def weights(workdir: Path) -> dict[str, bytes]:
    arrays = open_run(workdir).parameters._arrays
    return {name: np.asarray(array.read().result()).tobytes() for name, array in arrays.items()}


@pytest.mark.slow
def test_shared_phases_are_done_once_to_the_same_bits(study: Study, in_this_process: None, tmp_path: Path) -> None:
    runs, said = plan(study, tmp_path / "study"), []
    assert [(run.seed, run.variant) for run in runs[:6]] == [
        (0, "baseline"), (0, "pause"), (0, "no_policy"), (0, "all_rewards"), (0, "short"), (1, "baseline"),
    ]  # fmt: skip
    first = [run for run in runs if run.seed == 0]
    assert list(run_study(runs, first.__contains__, said.append)) == first
    begun = {entry["variant"]: entry["begun_from"] for entry in collect(study, runs)["runs"]}
    assert begun == {
        "baseline": None, "pause": {"run": "baseline/seed_0", "step": 3},
        "no_policy": {"run": "baseline/seed_0", "step": 7}, "all_rewards": {"run": "baseline/seed_0", "step": 7},
        "short": None,
    }  # fmt: skip
    assert len(collect(study, runs)["missing"]) == 5

    for run, alone in zip(first[1:4], plan(study, tmp_path / "alone")[1:4], strict=True):
        whole = train(alone.config)
        assert {**run.summary, "paths": 0} == {**whole, "paths": 0}, run.variant
        assert weights(run.workdir) == weights(alone.workdir), run.variant
        mine, theirs = read_metrics(run.workdir / "metrics.jsonl"), read_metrics(alone.workdir / "metrics.jsonl")
        if run.variant == "pause":  # what the baseline measured in the middle of the shared phase is left out
            theirs = [record for record in theirs if record["kind"] != "evaluation" or record["step"] >= 3]
        assert repeatable(mine) == repeatable(theirs), run.variant

    finished = {run.workdir / "summary.json": (run.workdir / "summary.json").stat().st_mtime_ns for run in first}
    assert list(run_study(runs, first.__contains__, said.append)) == []
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


@pytest.mark.slow
def test_a_damaged_copy_or_another_seed_is_no_beginning(study: Study, in_this_process: None, tmp_path: Path) -> None:
    runs = plan(study, tmp_path)
    by_name = {(run.variant, run.seed): run for run in runs}
    baseline, pause, other_seed = (by_name[key] for key in (("baseline", 0), ("pause", 0), ("pause", 1)))
    train(baseline.config)
    (baseline.workdir / "checkpoints" / "3" / "config" / "metadata").write_text("{")
    for run in (pause, other_seed):
        runner._begin_from_another(run, [other for other in runs if other.seed == run.seed], print)
        assert not run.workdir.exists()


def test_a_folder_in_use_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        with runner._alone(tmp_path, said.append):
            assert time.monotonic() - began > 0.2
    assert "in use by another process" in said[0]


COMMAND = """
from quietstar_jax.studies.study import Study

def get_study():
    return Study(base={base!r}, baseline="baseline", seeds=(0,), metrics=("loss_with_thoughts", "step"), variants={{
        "baseline": {{}}, "diverges": {{"phases[2].learning_rate": 1e38, "phases[2].policy_weight": 1e38}}}})
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_and_a_failed_run_is_reported(study: Study, tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(COMMAND.format(base=study.base))
    root = tmp_path / "runs"
    command = [
        sys.executable,
        "-m",
        "quietstar_jax.study",
        "--study",
        str(tmp_path / "study.py"),
        "--workdir",
        str(root),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    metrics = root / "baseline/seed_0/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not any(record["step"] >= 5 for record in read_metrics(metrics)):
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline, "the study made no progress"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "baseline/seed_0/summary.json").exists()

    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "diverges, seed 0 starts from step 7 of baseline" in ended.stdout
    assert "diverges, seed 0 FAILED with status 2" in ended.stdout
    assert "not finite" in (root / "diverges/seed_0/log.txt").read_text()
    assert "| baseline | 1 |" in (root / "table.md").read_text()
    results = read_results(root)
    assert results["missing"] == [{"variant": "diverges", "seed": 0}]
    assert json.dumps(results) == json.dumps(collect_again(tmp_path, root))
    whole = train(plan(study, tmp_path / "whole")[0].config)
    assert results["runs"][0]["figures"]["loss_with_thoughts"] == whole["loss_with_thoughts"]


def collect_again(tmp_path: Path, root: Path) -> dict:
    from quietstar_jax.studies.study import load_study

    study = load_study(str(tmp_path / "study.py"))
    return collect(study, plan(study, root))
