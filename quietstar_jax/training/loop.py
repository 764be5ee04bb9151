"""The training loop: phases, steps, evaluations, checkpoints. Reads the metrics of step n - 1 while step n runs."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.data.pipeline import SequenceIterator, training_sequences, validation_batches
from quietstar_jax.data.unknown import SETTING, WARNED, check_known
from quietstar_jax.errors import EXIT_RETRY, STOPPED, CollapsedError, DataError, DivergedError, PreemptedError
from quietstar_jax.idle_settings import idle_settings
from quietstar_jax.io import folder_to_write, place, write_json
from quietstar_jax.parallel import processes
from quietstar_jax.parallel.preemption import PreemptionNotice
from quietstar_jax.parallel.sharding import ProcessBatchShard, find_process_shard
from quietstar_jax.signals import NAMES
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.score_figures import summarize
from quietstar_jax.thoughts.settings import phase_settings
from quietstar_jax.training.answers import measure_answers
from quietstar_jax.training.base_record import base_notes
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.collapse import CollapseCheck, Seen, seen_before
from quietstar_jax.training.compilation_cache import compilation_cache
from quietstar_jax.training.evaluation import (
    Scorer,
    evaluation_settings,
    make_token_scorer,
    score_batches,
    without_thoughts,
)
from quietstar_jax.training.messages import start_lines
from quietstar_jax.training.metrics import MetricsWriter, read_metrics
from quietstar_jax.training.profile import StepProfile
from quietstar_jax.training.resume import check_position, check_same_run, check_same_sources, saved_record
from quietstar_jax.training.setup import (
    Run,
    abstract_state,
    begin_objective,
    center_mixing_head,
    first_state,
    frozen_weights,
    prepare,
    start_optimizer,
)
from quietstar_jax.training.speed import SpeedMeter
from quietstar_jax.training.step import TrainStep, compile_train_step
from quietstar_jax.training.summary import config_hash, most_helpful_thoughts
from quietstar_jax.training.workdir import Workdir, open_workdir


def train(config: Config) -> dict[str, Any]:
    """Trains through all phases, or resumes the run in the work directory.

    Returns:
      The summary, which is also written to `summary.json`.

    Raises:
      UserError: the run cannot start or continue; the message says what to do. No partially written files are left.
    """
    processes.start(config.distributed)
    run = prepare(config, saved_record(place(config.workdir, "config.workdir")))
    with open_workdir(config) as workdir, compilation_cache(workdir.path), jax.set_mesh(run.mesh):
        return _train(run, workdir)


def _train(run: Run, workdir: Workdir) -> dict[str, Any]:
    config, reader, first = run.config, find_process_shard(run.mesh), processes.is_primary()
    folder = workdir.path
    sequences = training_sequences(
        config.data, run.tokenizer, seed=config.seed, process_index=reader.index, process_count=reader.count
    )
    sources = sequences.unknown()
    log_above = WARNED if first else math.inf
    check_known(sources, config.data.max_unknown_fraction, run.tokenizer, SETTING, log_above=log_above)
    held_out = held_out_batches(run)
    ends = [span.end for span in config.phase_spans()] if config.checkpoint.keep_phase_ends else []
    # From the first step until the last checkpoint is written, signals are handled only between steps.
    with (
        contextlib.ExitStack() as listening,
        Checkpoints(folder / "checkpoints", config.checkpoint, ends) as checkpoints,
    ):
        state = resume_or_start(run, checkpoints, sequences)
        if first:
            if checkpoints.latest_step is None or not (folder / "tokenizer" / "tokenizer.json").exists():
                with folder_to_write(folder / "tokenizer") as local:
                    run.tokenizer.save(local)
            write_json(folder / "config.json", run.record)
        with (
            MetricsWriter(
                folder, config.logging, first_step=int(state.step), total_steps=config.total_steps,
                run_config=run.record["config"], silent=not first,
            ) as metrics,
            StepProfile(folder, config.logging, silent=not first) as profile,
            SpeedMeter(config, run.architecture) as speed,
        ):  # fmt: skip
            notes = (f"Note: {line}." for line in (*base_notes(run.base, config), *idle_settings(config)))
            for line in (*start_lines(run, state, sources, sequences.counted_tokens), *notes):
                metrics.log(line)
            collapse = CollapseCheck(config, _seen_before(config, folder, int(state.step)))
            notice = listening.enter_context(PreemptionNotice())
            trainer = Trainer(
                run, reader, sequences, held_out, checkpoints, metrics, workdir, notice, profile, speed, collapse
            )
            try:
                state = trainer.run_phases(state)
            finally:
                sequences.close()
            summary = trainer.final_summary(state, folder)
    if first:
        workdir.check()
        write_json(folder / "summary.json", summary)
    return summary


def held_out_batches(run: Run) -> list[dict[str, np.ndarray]]:
    """Returns the validation text in batches of evaluation size, complete on every process; empty without such text.

    Raises:
      DataError: there is validation text, but no document has two or more tokens.
    """
    config = run.config
    if not config.data.validation:
        return []
    size, count = config.evaluation.batch_size, config.evaluation.batches
    batches = list(validation_batches(config.data, run.tokenizer, batch_size=size, batches=count))
    if not batches:
        raise DataError(
            f"config.data.validation {list(config.data.validation)} has no document of two tokens or more. "
            "Give other files, or set it to () to train without held-out text."
        )
    return batches


def _seen_before(config: Config, folder: Path, step: int) -> Seen:
    """Returns, on every process, what the metrics on the first process say about the thoughts up to a step."""
    found = processes.from_first(lambda: json.dumps(seen_before(config, read_metrics(folder / "metrics.jsonl"), step)))
    return Seen(*json.loads(found))


def resume_or_start(run: Run, checkpoints: Checkpoints, sequences: SequenceIterator) -> TrainState:
    """Restores the newest checkpoint and the position in the data; returns step 0 if there is no checkpoint."""
    step = checkpoints.newest_whole_step()
    if step is None:
        return first_state(run)
    saved = checkpoints.record(step)
    check_same_run(saved, run.record, step)
    restored = checkpoints.restore(step, abstract_state(run.config, run.architecture, run.mesh, step))
    check_position(saved, restored.data, step, int(restored.state.step), checkpoints.folder(step))
    if "sources" not in restored.data:
        check_same_sources(saved, run.record)
    sequences.set_state(restored.data)
    return restored.state._replace(frozen=frozen_weights(run))


class Trainer:
    """Runs the phases of a training run."""

    def __init__(
        self, run: Run, reader: ProcessBatchShard, sequences: SequenceIterator, held_out: list[Any],
        checkpoints: Checkpoints, metrics: MetricsWriter, workdir: Workdir, notice: PreemptionNotice,
        profile: StepProfile, speed: SpeedMeter, collapse: CollapseCheck,
    ):  # fmt: skip
        self._run, self._reader, self._sequences, self._held_out = run, reader, sequences, held_out
        self._checkpoints, self._metrics, self._workdir, self._notice = checkpoints, metrics, workdir, notice
        self._profile, self._speed, self._collapse = profile, speed, collapse
        settings = evaluation_settings(run.config, run.vocabulary)
        self._scorer = make_token_scorer(run.graphdef, settings, run.config.evaluation.policy)
        plain = without_thoughts(settings)
        self._plain_scorer = None if plain is None else make_token_scorer(run.graphdef, plain)
        self._measured: Any = None  # (step, held-out metrics, whether there were thoughts)
        self._unread: Callable[[], None] = lambda: None  # reads the metrics of the latest step

    def run_phases(self, state: TrainState) -> TrainState:
        """Runs all remaining steps and returns the final state."""
        run = self._run
        self._catch_up(state)
        self._stop_if_collapsed(state)
        for phase, start, end in run.config.phase_spans():
            if int(state.step) >= end:
                continue
            if phase.fresh_optimizer and int(state.step) == start:
                step, kept = state.step, state.objective
                state = start_optimizer(run, state.weights)._replace(step=step, **kept)
            if start == run.config.policy_start and int(state.step) == start:
                state = begin_objective(run, state)
            numbers = self._reader.numbers(phase.batch_size)
            step_fn = compile_train_step(run.config, phase, run.graphdef, run.vocabulary, state, numbers)
            state = self._run_phase(state, phase, step_fn, start, end)
        self._save(state)  # the final checkpoint, also for a run without steps
        return state

    def _run_phase(self, state: TrainState, phase: Phase, step_fn: TrainStep, start: int, end: int) -> TrainState:
        config = self._run.config
        self._speed.begin(phase, phase_settings(config, phase, self._run.vocabulary))
        for done in range(int(state.step) + 1, end + 1):
            if self._profile.starts_at(done):
                self._read_metrics()
                with self._speed.leave_out():
                    self._profile.start(state)
            with self._profile.step(done):
                with self._speed.data_wait():
                    rows = self._sequences.next_batch(phase.batch_size // self._reader.count)
                batch = Batch(**{name: self._reader.place(value, self._run.mesh) for name, value in rows.items()})
                if config.thought.center_mixing_head and done - 1 == config.thinking_start:
                    state = center_mixing_head(self._run, state, batch, phase.microbatches)
                state, values = step_fn(state, batch, self._run.key, jnp.int32(start))
            self._read_metrics()
            self._unread = functools.partial(self._log, values, done, phase)
            if self._profile.stops_at(done):
                self._read_metrics()
                with self._speed.leave_out():
                    self._profile.stop(state)
            # Evaluate before saving: a run that is killed in between repeats the evaluation.
            if self._is_evaluated(done, end):
                self._read_metrics()
                with self._speed.leave_out():
                    self._evaluate(state, phase, done)
            if done % config.checkpoint.every_steps == 0 or (done == end and config.checkpoint.keep_phase_ends):
                self._save(state)
            self._leave_if_told(state)
            self._stop_if_collapsed(state)
        return state

    def _save(self, state: TrainState) -> None:
        self._read_metrics()  # raises if a value is not finite: such a state is never saved
        with self._speed.leave_out():
            self._workdir.check()
            self._checkpoints.save(state, self._sequences.get_state(), self._run.record)

    def _leave_if_told(self, state: TrainState) -> None:
        """Saves a checkpoint and raises PreemptedError if the run received a signal to stop."""
        if number := self._notice.signal_now():
            self._save(state)
            raise PreemptedError(
                f"Stopped by {NAMES[number]} after step {int(state.step)}, which is saved. The same command resumes.",
                STOPPED if number == signal.SIGINT else EXIT_RETRY,
            )

    def _stop_if_collapsed(self, state: TrainState) -> None:
        """Saves a checkpoint and raises CollapsedError if thoughts have collapsed and the run is to stop then."""
        if self._run.config.logging.stop_on_collapse and self._collapse.collapsed:
            self._save(state)
            raise CollapsedError(
                f"{self._collapse.warning}\nTraining stopped because config.logging.stop_on_collapse is True; the "
                f"state after step {int(state.step)} is saved. Start another run with other settings, or set "
                "config.logging.stop_on_collapse=False to continue this one."
            )

    def _is_evaluated(self, step: int, phase_end: int) -> bool:
        every = self._run.config.evaluation.every_steps
        return step == phase_end or bool(every and step % every == 0)

    def _catch_up(self, state: TrainState) -> None:
        """Evaluates the initial state if an evaluation was due at its step but has no record.

        This happens if the run was stopped before that evaluation, or if a study began the run from the weights of
        another run with a different evaluation.
        """
        step = int(state.step)
        for phase, start, end in self._run.config.phase_spans():
            due = start < step <= end and self._is_evaluated(step, end)
            if processes.broadcast_from_primary(due and not self._metrics.has("evaluation", step)):
                self._evaluate(state, phase, step)

    def _read_metrics(self) -> None:
        unread, self._unread = self._unread, lambda: None
        unread()

    def _log(self, values: dict[str, jax.Array], step: int, phase: Phase) -> None:
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        self._check_finite(numbers, step, phase)
        self._speed.step_done()
        if step % self._run.config.logging.every_steps == 0 or step == self._run.config.total_steps:
            self._metrics.write("train", step, phase.name, numbers)
            self._metrics.write("speed", step, phase.name, self._speed.figures())
        if warning := self._collapse.follow(step, phase, numbers):
            self._metrics.log(f"warning: {warning['warning']}")
            self._metrics.write("warning", step, phase.name, warning)
        self._metrics.advance(step, phase.name, numbers, self._speed.pace(step))

    def _check_finite(self, values: Mapping[str, Any], step: int, phase: Phase) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        broken = [f"{name} = {number}" for name, number in numbers.items() if not math.isfinite(number)]
        if broken:
            last = self._checkpoints.latest_step
            raise DivergedError(
                f"Step {step} (phase {phase.name!r}) gave values that are not finite: {', '.join(broken)}. "
                f"Training stopped; the last good checkpoint is {'none' if last is None else f'step {last}'}. "
                "Lower the learning rate or the policy weight, or check the text of that step."
            )

    def _evaluate(self, state: TrainState, phase: Phase, step: int) -> None:
        if not self._held_out:
            return
        values = self._measure(state)
        self._check_finite(values, step, phase)
        self._metrics.write("evaluation", step, phase.name, values)
        line = f"step {step} ({phase.name}): held-out loss {values['loss_without_thoughts']:.4f} nats per token"
        thinks = self._measured[2]
        if thinks:
            line += f", {values['loss_with_thoughts']:.4f} with thoughts"
        if "answer_accuracy_without_thoughts" in values:
            line += f"; answers right {values['answer_accuracy_without_thoughts']:.1%}"
            if thinks:
                line += (
                    f", {values['answer_accuracy_with_thoughts']:.1%} with thoughts, "
                    f"useful thoughts {values['useful_thought_rate']:.1%} "
                    f"({values['useful_sampled_thought_rate']:.1%} of sampled ones)"
                )
        self._metrics.log(f"{line} ({values['tokens']:,} held-out tokens)")

    def _measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the held-out metrics of a state; those of the latest state are cached."""
        step = int(state.step)
        if self._measured is None or self._measured[0] != step:
            between, scorer = functools.partial(self._leave_if_told, state), self._scorer_of(state)
            scores = score_batches(scorer, state.weights, self._held_out, between=between)
            values: dict[str, Any] = summarize(scores)
            values["sample_thoughts"] = most_helpful_thoughts(scores, self._held_out, self._run.tokenizer)
            if self._run.tokenizer.name == "synthetic":
                values |= measure_answers(self._run, scorer, state.weights, between)
            self._measured = (step, values, scores.thinks)
        return self._measured[1]

    def _scorer_of(self, state: TrainState) -> Scorer:
        """Returns the scorer of held-out text: without thoughts while no phase has trained them and they do nothing."""
        spans = self._run.config.phase_spans()
        begun = any(phase.thought_length and start < int(state.step) for phase, start, _ in spans)
        if self._plain_scorer is None or begun or jnp.any(state.weights["mixing_head.out"]):
            return self._scorer
        return self._plain_scorer

    def final_summary(self, state: TrainState, folder: Path) -> dict[str, Any]:
        """Returns the held-out metrics after the last step, sample thoughts, and the paths of the outputs."""
        summary: dict[str, Any] = {"step": int(state.step), "seed": self._run.config.seed}
        if self._held_out:
            summary |= self._measure(state)
        summary["thoughts_collapsed_at_step"] = self._collapse.warned_at or None
        names = {"checkpoints": "checkpoints", "metrics": "metrics.jsonl", "summary": "summary.json"}
        summary["config_hash"] = config_hash(self._run.config)
        summary["paths"] = {name: str(folder / file) for name, file in names.items()}
        summary["parameters"] = int(sum(np.prod(value.shape) for value in state.weights.values()))
        return summary
