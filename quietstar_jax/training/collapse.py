"""Detects that sampled thoughts have become almost constant, so that REINFORCE has nothing left to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quietstar_jax.config import Config
from quietstar_jax.thought_config import Phase

STEPS = 3  # consecutive steps
METRICS = ("entropy", "frac_reward_zero_std")  # that show a collapse


class Seen(NamedTuple):
    """What the steps before a resumption have shown.

    Attributes:
      streak: number of consecutive steps with collapsed thoughts, up to the latest step.
      warned_at: step at which the run warned; 0 = it did not.
      warning: the text of the warning.
    """

    streak: int = 0
    warned_at: int = 0
    warning: str = ""


class CollapseCheck:
    """Follows the metrics of consecutive steps.

    Attributes:
      warned_at: step at which the run warned of collapsed thoughts; 0 = it did not.
      warning: a description of the latest collapse, and what to try.
    """

    def __init__(self, config: Config, seen: Seen = Seen()):  # noqa: B008
        self._config = config
        self._streak, self.warned_at, self.warning = seen

    @property
    def collapsed(self) -> bool:
        """Whether thoughts are collapsed after the latest step, and `warning` describes it."""
        return self._streak >= STEPS and bool(self.warning)

    def follow(self, step: int, phase: Phase, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the metrics of the next step; returns the record of the warning if the run must warn (once), else {}."""
        self._streak = self._streak + 1 if is_collapsed(self._config, phase, values) else 0
        if self._streak < STEPS:
            return {}
        if self._streak == STEPS or not self.warning:
            self.warning = describe(self._config, phase, step, values)
        if self.warned_at:
            return {}
        self.warned_at = step
        return {"warning": self.warning, **{name: values[name] for name in METRICS}}


def is_collapsed(config: Config, phase: Phase, values: Mapping[str, Any]) -> bool:
    """Whether a phase trains thoughts, and the metrics of a step show that they are almost all equal."""
    limits = config.logging
    return (
        config.reinforces(phase)
        and values.get("entropy", float("inf")) < limits.collapse_entropy
        and values.get("frac_reward_zero_std", 0.0) > limits.collapse_zero_std
    )


def seen_before(config: Config, records: Sequence[Mapping[str, Any]], step: int) -> Seen:
    """Returns what the records of `metrics.jsonl` up to `step`, where a run resumes, show about its thoughts.

    If `logging.every_steps` is above 1, some steps have no record, and the returned streak can be too short.
    """
    phases = {phase.name: phase for phase in config.phases}
    train = {record["step"]: record for record in records if record["kind"] == "train"}
    warnings = [record for record in records if record["kind"] == "warning"]

    def collapsed(record: Mapping[str, Any]) -> bool:
        return record["phase"] in phases and is_collapsed(config, phases[record["phase"]], record)

    streak = 0
    while step - streak in train and collapsed(train[step - streak]):
        streak += 1
    if not warnings:
        return Seen(streak)
    last = warnings[-1]
    # A run that stopped because of the collapse is saved at most one step after the warning.
    if step - last["step"] <= 1 and collapsed(last):
        streak = max(streak, STEPS)
    return Seen(streak, last["step"], str(last.get("warning", "")))


def describe(config: Config, phase: Phase, step: int, values: Mapping[str, Any]) -> str:
    """Returns the text of the warning: what the metrics of a step show, and what to try."""
    limits = config.logging
    return (
        f"Thoughts have collapsed at step {step} (phase {phase.name!r}). For {STEPS} steps, their entropy was below "
        f"config.logging.collapse_entropy = {limits.collapse_entropy:g} nats per token (now {values['entropy']:.3g}), "
        "and the share of positions at which all thoughts have the same reward was above "
        f"config.logging.collapse_zero_std = {limits.collapse_zero_std:g} (now {values['frac_reward_zero_std']:.3g}). "
        "Equal thoughts give REINFORCE nothing to compare.\n"  # a command shortens long lines of an error
        "Try a higher config.thought.sampling_temperature, entropy_bonus, entropy_target or kl_weight, more "
        "num_thoughts, or a lower policy_weight or learning_rate of the phase."
    )
