"""Settings of the objective that have no effect in a run; the run prints them when it starts.

They are accepted, because they can be intended: a control keeps the objective of the run it is compared with, phases
that train thoughts can be added to a run later, and the configuration of a finished run must load.
"""

from __future__ import annotations

from quietstar_jax.config import Config
from quietstar_jax.settings import OnResume, marked, shown
from quietstar_jax.thought_config import ThoughtConfig

METRICS = ("reward", "discount")  # the metric `reward` depends on them, also where thoughts are not trained
TRAINING = tuple(name for name in marked(ThoughtConfig, OnResume.REINFORCE) if name not in METRICS)


def idle_settings(config: Config) -> list[str]:
    """Returns a line for each setting of the objective that is not its default but has no effect in any phase.

    There is also a line for each `policy_weight` of a phase whose thoughts cannot be trained.
    """
    thought, default = config.thought, ThoughtConfig()
    phases = [(i, phase) for i, phase in enumerate(config.phases) if phase.steps and phase.thought_length]
    trained = [phase for _, phase in phases if config.reinforces(phase)]
    equal = thought.sampling_temperature == thought.score_temperature
    rules = [  # (settings, whether they have no effect, why)
        (METRICS, not phases, "no phase has thoughts"),
        (TRAINING, not trained, "no phase trains thoughts"),
        (("discount",), all(phase.tokens_ahead == 1 for _, phase in phases), "the first token ahead has no discount"),
        (("advantage",), all(phase.num_thoughts == 1 for phase in trained), "of a single thought it is the reward"),
        (("entropy_bonus_step", "entropy_bonus_max"), not thought.entropy_target, "`entropy_target` is 0"),
        (("clip_epsilon",), equal, "`sampling_temperature` and `score_temperature` are equal"),
        (("importance_cap",), equal and thought.importance_cap >= 1,
         "`sampling_temperature` and `score_temperature` are equal, so no ratio exceeds 1"),
    ]  # fmt: skip
    idle: dict[str, tuple[object, str]] = {}
    for names, has_no_effect, reason in rules:
        for name in names if has_no_effect else ():
            if (value := getattr(thought, name)) != getattr(default, name):
                idle.setdefault(f"thought.{name}", (value, reason))
    for i, phase in phases:
        if phase.policy_weight and phase not in trained:
            frozen = "decoder and thought embeddings are frozen"
            reason = "the control `pause` has no thoughts to train" if thought.control == "pause" else frozen
            idle[f"phases[{i}].policy_weight"] = phase.policy_weight, reason
    return [f"config.{path} is {shown(value)}, which has no effect: {why}" for path, (value, why) in idle.items()]
