"""The paper's ablations on the embedded corpus, one setting changed at a time.

`python -m quietstar_jax.study --study configs/studies/ablations.py --workdir runs/ablations`
"""

from typing import Any

from quietstar_jax.studies.study import Study


def both(name: str, value: Any) -> dict[str, Any]:
    """Returns one setting for both phases with thoughts."""
    return {f"phases[{i}].{name}": value for i in (1, 2)}


def get_study() -> Study:
    """Returns the study; each variant changes one setting."""
    variants: dict[str, dict[str, Any]] = {"baseline": {}}
    variants |= {f"length_{n}": both("thought_length", n) for n in (2, 4, 8, 12)}
    variants["length_0"] = both("thought_length", 0) | {
        "phases[1].rates.decoder": 1.0, "phases[1].learning_rate": 3e-4, "evaluation.thought_length": 6,
    }  # fmt: skip
    variants |= {f"thoughts_{n}": both("num_thoughts", n) for n in (1, 2)}
    variants |= {f"ahead_{n}": both("tokens_ahead", n) for n in (1, 4)}
    variants |= {f"policy_weight_{w:g}": {"phases[2].policy_weight": w} for w in (0.0, 0.1, 1.0, 10.0, 1000.0)}
    variants["negative_rewards_too"] = {"thought.positive_only": False}
    variants["sum_over_thought_tokens"] = {"thought.policy_reduction": "sum"}
    variants["score_temperature_1"] = {"thought.score_temperature": 1.0}
    return Study(
        base="configs/embedded_corpus_small.py",
        baseline="baseline",
        variants=variants,
        metrics=(
            "answer_accuracy_with_thoughts", "useful_thought_rate", "useful_sampled_thought_rate", "loss_with_thoughts",
        ),
    )  # fmt: skip
