"""Runs a study: every run once; a run resumes where it stopped, or starts from phases that another run has done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.checkpoint.steps import absolute, damage, saved_steps
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.io import locked, write_json
from quietstar_jax.settings import OnResume, differences, from_mapping, to_mapping
from quietstar_jax.studies.study import Study, command, configuration
from quietstar_jax.training.metrics import read_metrics, write_metrics
from quietstar_jax.training.resume import MARKED, incompatible_changes
from quietstar_jax.training.summary import config_hash

Log = Callable[[str], None]


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed."""

    variant: str
    seed: int
    workdir: Path
    config: Config
    command: list[str]

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of the run; None until it has finished with this configuration."""
        try:
            summary: dict[str, Any] = json.loads((self.workdir / "summary.json").read_text("utf-8"))
            return summary if summary["config_hash"] == config_hash(self.config) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def plan(study: Study, root: Path) -> list[PlannedRun]:
    """Returns all runs, in order: seed by seed, so that an unfinished study is complete for its first seeds; the
    baseline first, since most variants can start from it.

    Raises:
      ConfigError: a variant cannot be run.
    """
    variants = sorted(study.variants, key=lambda variant: variant != study.baseline)
    places = [(variant, seed, root / variant / f"seed_{seed}") for seed in study.seeds for variant in variants]
    return [PlannedRun(*place, configuration(study, *place), command(study, *place)) for place in places]


def run_study(runs: Sequence[PlannedRun], selected: Callable[[PlannedRun], bool], log: Log) -> Iterator[PlannedRun]:
    """Executes the selected runs that are not finished, one after another, each in its own process.

    A run resumes where it stopped. A new run reuses the phases that another run with its seed has done with the same
    settings: it starts from a copy of that run's checkpoint, with the same result as from scratch, bit for bit. A run
    that fails is reported, and the others are still executed.

    Yields:
      every run that was started, once it has ended.
    """
    for run in filter(selected, runs):
        run.workdir.mkdir(parents=True, exist_ok=True)
        with _alone(run.workdir, log) as lock:
            if run.summary is not None:
                continue
            if not _saved_steps(run.workdir):
                _begin_from_another(run, [other for other in runs if other.seed == run.seed], log)
            log(f"{run.variant}, seed {run.seed}: {run.workdir}")
            with (run.workdir / "log.txt").open("a", encoding="utf-8") as output:
                status_of_run = _run(run.command, stdout=output, stderr=subprocess.STDOUT, pass_fds=(lock,))
            if status_of_run or run.summary is None:
                status = f"FAILED with status {status_of_run}"
                if not status_of_run:  # the study's files, or this program, changed during the run
                    status = "ended, but its summary.json has another configuration: run the study again"
                log(f"{run.variant}, seed {run.seed} {status}; see {run.workdir / 'log.txt'}")
        yield run


@contextlib.contextmanager
def _alone(workdir: Path, log: Log) -> Iterator[int]:
    """Locks the work directory; yields a file descriptor that keeps the lock as long as any process has it open.

    A killed study may have left a training process running: the next study waits for it.
    """
    with locked(
        workdir / "lock", lambda: log(f"{workdir} is in use by another process; waiting until it ends.")
    ) as lock:
        yield lock


def _run(command: Sequence[str], **options: Any) -> int:
    """Runs a training process and returns its status. If the study is stopped, so is the process, which saves first."""
    with subprocess.Popen(command, **options) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _saved_steps(workdir: Path) -> list[int]:
    return saved_steps(absolute(workdir / "checkpoints"))


def _begin_from_another(run: PlannedRun, others: Sequence[PlannedRun], log: Log) -> None:
    """Copies the checkpoint at the end of the longest shared sequence of phases, if there is one."""
    best: tuple[int, PlannedRun, dict[str, Any]] | None = None
    for other in others:
        for step in _phase_ends(run.config).intersection(_saved_steps(other.workdir)):
            saved_config = _saved_config(other.workdir, step)
            better = saved_config and (best is None or step > best[0]) and _same_until(saved_config, run.config, step)
            if better and not damage(absolute(other.workdir / "checkpoints"), step):
                best = step, other, saved_config  # type: ignore[assignment]
    if best is None:
        return
    step, other, saved = best
    # Figures that the other run measured are kept only if this run would have measured the same.
    marks = MARKED[OnResume.MEASURED] + MARKED[OnResume.THINKING]
    differ = any(line.startswith(marks) for line in differences(saved, to_mapping(run.config)))
    same = not differ and _evaluated_length(saved) == run.config.evaluation_thought_length
    records = [
        record
        for record in read_metrics(other.workdir / "metrics.jsonl")
        if record["step"] <= step and (same or record["kind"] != "evaluation")
    ]
    write_metrics(run.workdir / "metrics.jsonl", records)
    write_json(run.workdir / "begun_from.json", {"run": f"{other.variant}/seed_{other.seed}", "step": step})
    partial = run.workdir / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(other.workdir / "checkpoints" / str(step), partial)
    (run.workdir / "checkpoints").mkdir(exist_ok=True)
    os.rename(partial, run.workdir / "checkpoints" / str(step))  # last: only now has the run begun
    log(f"{run.variant}, seed {run.seed} starts from step {step} of {other.variant}")


def _phase_ends(config: Config) -> set[int]:
    return {span.end for span in config.phase_spans()}


def _saved_config(workdir: Path, step: int) -> dict[str, Any] | None:
    """The configuration that a checkpoint was written with; None if it cannot be read."""
    try:
        record = json.loads((workdir / "checkpoints" / str(step) / "config" / "metadata").read_text("utf-8"))
        config: dict[str, Any] = record["config"]  # as written: settings that it lacks indicate an earlier version
        from_mapping(Config, config)
    except (OSError, ValueError, KeyError, ConfigError):
        return None
    return config


def _same_until(saved: Mapping[str, Any], config: Config, step: int) -> bool:
    """Whether the saved run did exactly the phases of the wanted run up to this step, at which a phase of both ends."""
    if step not in _phase_ends(from_mapping(Config, saved)):
        return False
    return not incompatible_changes(saved, to_mapping(config), step)


def _evaluated_length(saved: Mapping[str, Any]) -> int:
    return from_mapping(Config, saved).evaluation_thought_length
