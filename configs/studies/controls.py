"""What the quickstart's gains are worth: the same run with something else in the thoughts' place.

`python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`
"""

from quietstar_jax.studies.study import Study

PLAIN = {  # the thinking phases become plain language modelling; evaluation still thinks
    "phases[1].thought_length": 0, "phases[1].rates.decoder": 1.0, "phases[1].learning_rate": 3e-4,
    "phases[2].thought_length": 0, "evaluation.thought_length": 6,
}  # fmt: skip
FLOPS = 673  # plain steps that cost what the thinking phases do, by thoughts/flops.py


def get_study() -> Study:
    """Every control of the box."""
    return Study(
        base="configs/quickstart.py",
        baseline="thoughts",
        variants={
            "thoughts": {},
            "plain_equal_tokens": PLAIN,
            "plain_equal_flops": PLAIN | {"phases[0].steps": 560 + FLOPS},
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
