"""Controls for the gains from thoughts: the same run with something else in place of the thoughts.

`python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`
"""

from quietstar_jax.studies.study import Study, controls

BASE = "configs/embedded_corpus_small.py"
PLAIN = {  # the phases with thoughts become plain language modelling; evaluation still thinks
    "phases[1].thought_length": 0, "phases[1].rates.decoder": 1.0, "phases[1].learning_rate": 3e-4,
    "phases[2].thought_length": 0, "evaluation.thought_length": 6,
}  # fmt: skip


def get_study() -> Study:
    """Returns the study: the run with thoughts and every control."""
    return Study(
        base=BASE,
        baseline="thoughts",
        variants={
            "thoughts": {},
            **controls(BASE, PLAIN, phase=0),
            "frozen_thoughts": {"phases[2].policy_weight": 0.0},
            "no_mixing_head": {"thought.mixing": "none"},
        },
        metrics=(
            "answer_accuracy_without_thoughts", "answer_accuracy_with_thoughts", "useful_sampled_thought_rate",
            "loss_without_thoughts", "loss_with_thoughts",
        ),
    )  # fmt: skip
