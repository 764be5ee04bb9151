"""Thoughts whose end is sampled, on the embedded corpus: when do they collapse to length 0?

`python -m quietstar_jax.study --study configs/studies/sampled_end.py --workdir runs/sampled_end`
"""

from quietstar_jax.studies.study import Study

THOUGHTS = 2  # index of a phase


def get_study() -> Study:
    """Returns the study: thoughts of a fixed length, and thoughts of up to that length with three penalties."""
    # Like the gate, the head starts from a constant and has few steps: it needs a higher learning rate. All tokens have
    # the same weight in thoughts of any length; for a fixed length, this is the mean over the tokens.
    common = {"thought.policy_reduction": "sum_over_max"}
    sampled = common | {"thought.end": "sampled", f"phases[{THOUGHTS}].rates.end_head": 10.0}
    return Study(
        base="configs/embedded_corpus.py",
        baseline="fixed",
        variants={
            "fixed": common,
            "sampled": sampled,
            **{f"penalty_{nats:g}": sampled | {"thought.length_penalty": nats} for nats in (0.01, 0.1)},
        },
        metrics=(
            "thought_length", "empty_thought_rate", "answer_thought_length", "answer_sampled_thought_length",
            "answer_accuracy_with_thoughts", "answer_accuracy_without_thoughts", "loss_with_thoughts",
            "loss_without_thoughts",
        ),
    )  # fmt: skip
