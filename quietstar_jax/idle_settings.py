"""Settings of the objective and of adapters that have no effect in a run; the run prints them when it starts.

They are accepted, because they can be intended: a control keeps the objective of the run it is compared with, phases
that train thoughts can be added to a run later, and the configuration of a finished run must load.
"""

from __future__ import annotations

from dataclasses import fields

from quietstar_jax.architecture import Adapters
from quietstar_jax.config import Config
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.settings import OnResume, marked, shown
from quietstar_jax.thought_config import ThoughtConfig

METRICS = ("reward", "discount")  # the metric `reward` depends on them, also where thoughts are not trained
TRAINING = tuple(name for name in marked(ThoughtConfig, OnResume.REINFORCE) if name not in METRICS)
OF_ADAPTERS = tuple(field.name for field in fields(Adapters) if field.name != "maps")


def idle_settings(config: Config) -> list[str]:
    """Returns a line for each setting of the objective or of adapters that is not its default but has no effect.

    There is also a line for each `policy_weight` of a phase whose thoughts cannot be trained.
    """
    thought, adapters = config.thought, config.model.adapters
    phases = [(i, phase) for i, phase in enumerate(config.phases) if phase.steps and phase.thought_length]
    trained = [phase for _, phase in phases if config.reinforces(phase)]
    equal = thought.sampling_temperature == thought.score_temperature
    adapted, unadapted = adapters.maps != "none", "`model.adapters.maps` is 'none'"
    instead = "adapters freeze the weights of the decoder; `rates.adapters` is the rate of the adapters"
    rules = [  # (group, its settings, whether they have no effect, why)
        ("thought", METRICS, not phases, "no phase has thoughts"),
        ("thought", ("gate",), not any(phase.rates.gate for _, phase in phases),
         "no phase with thoughts trains the gate"),
        ("thought", ("gate_prices", "gate_tokens_ahead"), not thought.gate, "`thought.gate` is off"),
        ("thought", ("position_weight",), not thought.position_pattern, "`position_pattern` is empty"),
        ("thought", ("center_mixing_head",), not phases, "no phase has thoughts"),
        ("thought", ("center_mixing_head",), not MIXINGS[thought.mixing].traits["head"], "`mixing` has no head"),
        ("thought", TRAINING, not trained, "no phase trains thoughts"),
        ("thought", ("discount",), all(phase.tokens_ahead == 1 for _, phase in phases),
         "the first token ahead has no discount"),
        ("thought", ("advantage",), all(phase.num_thoughts == 1 for phase in trained),
         "the advantage of a single thought is its reward"),
        ("thought", ("entropy_bonus_step", "entropy_bonus_max"), not thought.entropy_target, "`entropy_target` is 0"),
        ("thought", ("clip_epsilon",), equal, "`sampling_temperature` and `score_temperature` are equal"),
        ("thought", ("importance_cap",), equal and thought.importance_cap >= 1,
         "`sampling_temperature` and `score_temperature` are equal, so no ratio exceeds 1"),
        ("model", ("frozen_dtype",), not adapted, unadapted),
        ("model.adapters", OF_ADAPTERS, not adapted, unadapted),
    ]  # fmt: skip
    groups = {"thought": thought, "model": config.model, "model.adapters": adapters}
    for i, phase in enumerate(config.phases):
        groups[path := f"phases[{i}].rates"] = phase.rates
        rules.append((path, ("adapters",), not adapted and bool(phase.steps), unadapted))
        rules.append((path, ("gate",), bool(phase.steps) and not thought.gate, "`thought.gate` is off"))
        rules.append((path, ("gate",), bool(phase.steps) and not phase.thought_length, "the phase has no thoughts"))
        headless = f"`thought.end` is '{thought.end}', which has no head"
        rules.append((path, ("end_head",), bool(phase.steps) and thought.end != "sampled", headless))
        rules.append((path, ("decoder",), adapted and not adapters.norms and bool(phase.steps), instead))
    idle: dict[str, tuple[object, str]] = {}
    for path, names, has_no_effect, reason in rules:
        group = groups[path]
        for name in names if has_no_effect else ():
            if (value := getattr(group, name)) != getattr(type(group)(), name):
                idle.setdefault(f"{path}.{name}", (value, reason))
    for i, phase in phases:
        if phase.policy_weight and phase not in trained:
            frozen = f"{'adapters' if adapted else 'decoder'} and thought embeddings are frozen"
            reason = "the control `pause` has no thoughts to train" if thought.control == "pause" else frozen
            idle[f"phases[{i}].policy_weight"] = phase.policy_weight, reason
    return [f"config.{path} is {shown(value)}, which has no effect: {why}" for path, (value, why) in idle.items()]
