"""Controls for the gains from thoughts: the same run with something else in place of the thoughts.

`python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`
"""

import dataclasses
import math

from configs import small_quickstart
from quietstar_jax.config import from_config_dict
from quietstar_jax.studies.study import Study
from quietstar_jax.thoughts.flops import phase_flops

PLAIN = {  # the phases with thoughts become plain language modelling; evaluation still thinks
    "phases[1].thought_length": 0, "phases[1].rates.decoder": 1.0, "phases[1].learning_rate": 3e-4,
    "phases[2].thought_length": 0, "evaluation.thought_length": 6,
}  # fmt: skip


def plain_steps_of_equal_flops() -> int:
    """Pre-training steps that cost as much as all phases together, less the plain phases of `PLAIN`."""
    config = from_config_dict(small_quickstart.get_config())
    pretrain, *thinking = config.phases
    plain = [dataclasses.replace(phase, thought_length=0) for phase in thinking]
    total, spent, once = (
        sum(phase_flops(config, phase) for phase in phases)
        for phases in (config.phases, plain, [dataclasses.replace(pretrain, steps=1)])
    )
    return math.ceil((total - spent) / once)


def get_study() -> Study:
    """Returns the study: the run with thoughts and every control."""
    return Study(
        base="configs/small_quickstart.py",
        baseline="thoughts",
        variants={
            "thoughts": {},
            "plain_equal_tokens": PLAIN,
            "plain_equal_flops": PLAIN | {"phases[0].steps": plain_steps_of_equal_flops()},
            "pause_tokens": {"thought.control": "pause"},
            "random_thoughts": {"thought.control": "random"},
            "shuffled_thoughts": {"thought.control": "shuffled"},
            "frozen_thoughts": {"phases[2].policy_weight": 0.0},
            "no_mixing_head": {"thought.mixing": "none"},
        },
        metrics=(
            "answer_accuracy_without_thoughts", "answer_accuracy_with_thoughts", "useful_sampled_thought_rate",
            "loss_without_thoughts", "loss_with_thoughts",
        ),
    )  # fmt: skip
