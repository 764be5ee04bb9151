"""Where to think: a thinking gate on the embedded corpus, compared with bands of entropy, margin and random positions.

`python -m quietstar_jax.study --study configs/studies/selective.py --workdir runs/selective`
"""

from quietstar_jax.studies.study import Study

THINKING = (1, 2)  # indices of phases
POLICIES = ("gate", "entropy_band", "entropy", "margin", "random")


def get_study() -> Study:
    """Returns the study; each run compares all policies at every threshold, from one pass over its questions."""
    # The gate is trained for as few steps as the thoughts but starts from zeros: it needs a higher learning rate.
    # Thoughts gain about two nats at answers, and nothing elsewhere: the prices lie between these gains.
    gate = {"thought.gate": True, "thought.gate_prices": (0.5, 1.0)}
    gate |= {f"phases[{phase}].rates.gate": 30.0 for phase in THINKING}
    return Study(
        base="configs/embedded_corpus.py",
        baseline="gate",
        variants={
            "gate": gate,
            "gate_low_prices": gate | {"thought.gate_prices": (0.05, 0.1, 0.2, 0.5)},  # the default
            "gate_two_tokens": gate | {"thought.gate_tokens_ahead": 2},  # as many tokens as a reward counts
        },
        metrics=(
            *(f"answers_kept_{policy}" for policy in POLICIES),
            *(f"thinking_rate_{policy}" for policy in POLICIES),
            "answer_accuracy_with_thoughts", "answer_accuracy_without_thoughts",
        ),
    )  # fmt: skip
