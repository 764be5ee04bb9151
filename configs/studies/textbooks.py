"""Thoughts against plain training on the same number of tokens of real text.

`python -m quietstar_jax.study --study configs/studies/textbooks.py --workdir runs/textbooks_study`
"""

from quietstar_jax.studies.study import Study


def get_study() -> Study:
    """Returns the study: plain training, thoughts, and thoughts that are not trained."""
    return Study(
        base="configs/textbooks.py",
        baseline="thoughts",
        seeds=(1, 2),  # not the base's own: it has seen the text in that order
        variants={
            "thoughts": {},
            "plain_equal_tokens": {
                "phases[0].thought_length": 0, "phases[0].rates.decoder": 1.0, "phases[0].learning_rate": 1e-4,
                "phases[1].thought_length": 0,
            },
            "frozen_thoughts": {"phases[1].policy_weight": 0.0},
        },
        metrics=("loss_without_thoughts", "loss_with_thoughts"),
    )  # fmt: skip
