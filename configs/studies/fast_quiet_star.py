"""How much of the gain from thoughts remains without them, after ever shorter thoughts and a phase of distillation.

`python -m quietstar_jax.study --study configs/studies/fast_quiet_star.py --workdir runs/fast_quiet_star_study`
"""

from quietstar_jax.studies.study import Study

BASE = "configs/fast_quiet_star.py"
OPENING, DISTILLATION = 1, 5  # indices of phases


def thought_length(tokens: int) -> dict[str, object]:
    """The same thought length in every phase after pre-training."""
    return {f"phases[{phase}].thought_length": tokens for phase in range(OPENING, DISTILLATION + 1)}


def plain() -> dict[str, object]:
    """The same tokens with plain language modelling in every phase; evaluation still thinks."""
    opening = {f"phases[{OPENING}].rates.decoder": 1.0, f"phases[{OPENING}].learning_rate": 3e-4}
    return thought_length(0) | opening | {f"phases[{DISTILLATION}].distill_weight": 0.0}


def get_study() -> Study:
    """Returns the study; the metric to compare is `answer_accuracy_without_thoughts`."""
    return Study(
        base=BASE,
        baseline="fast_quiet_star",
        variants={
            "fast_quiet_star": {},
            "not_distilled": {f"phases[{DISTILLATION}].steps": 0},
            # One token for each step that an answer of the corpus needs.
            "six_tokens": thought_length(6) | {"evaluation.thought_length": 6},
            "plain_equal_tokens": plain(),
        },
        metrics=(
            "answer_accuracy_without_thoughts", "answer_accuracy_with_thoughts", "loss_without_thoughts",
            "loss_with_thoughts",
        ),
    )  # fmt: skip
