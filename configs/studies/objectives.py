"""The family of objectives on one corpus: presets, advantages, and terms that keep thoughts diverse.

`python -m quietstar_jax.study --study configs/studies/objectives.py --workdir runs/objectives`
"""

from typing import Any

from quietstar_jax.config import default_config
from quietstar_jax.configs.objectives import jepo, latro, rlp
from quietstar_jax.studies.study import Study, steps_of_equal_flops

BASE = "configs/embedded_corpus_small.py"


def preset(module: Any, **phase: Any) -> dict[str, Any]:
    """The settings that a preset changes, in a run whose second phase trains the mixing head."""
    plain, changed = default_config(), module.objective(default_config())
    found = {f"thought.{name}": value for name, value in changed.thought.items() if value != plain.thought[name]}
    # Without a mixing head, the second phase has no steps, and REINFORCE has more.
    return found | {"phases[1].steps": 0} | {f"phases[2].{key}": value for key, value in phase.items()}


def advantage(name: str, weight: float, **thought: Any) -> dict[str, Any]:
    """Quiet-STaR with another advantage, at a policy weight that suits its scale."""
    changes = {"advantage": name, "positive_only": False, **thought}
    return {"phases[2].policy_weight": weight} | {f"thought.{key}": value for key, value in changes.items()}


def get_study() -> Study:
    """Returns the study: the same pre-training, then each member of the family for equally many FLOPs."""
    variants = {
        "quiet_star": {},
        "untrained": {"phases[2].policy_weight": 0.0},
        "rlp": preset(rlp, policy_weight=1.0, tokens_ahead=1),
        "jepo": preset(jepo, policy_weight=1.0),
        "latro": preset(latro, policy_weight=1.0),
        "mean": advantage("mean", 100.0),
        "leave_one_out": advantage("leave_one_out", 100.0),
        "group_std": advantage("group_std", 1.0),
        "batch_std": advantage("batch_std", 10.0),
        "log_mean_exp": advantage("log_mean_exp", 100.0),
        "posterior": advantage("posterior", 10.0),
        "posterior_centered": advantage("posterior_centered", 10.0),
        "leave_one_out_temperature_1": advantage("leave_one_out", 10.0, score_temperature=1.0),
        "mean_probability": advantage("leave_one_out", 100.0, reward="mean_probability"),
        "entropy_target": advantage("leave_one_out", 100.0, entropy_target=1.0, entropy_bonus_step=0.01),
        "kl_to_initial": advantage("leave_one_out", 100.0, kl_weight=0.1),
    }
    return Study(
        base=BASE,
        baseline="quiet_star",
        variants={
            name: changes | {"phases[2].steps": steps_of_equal_flops(BASE, changes, phase=2)} if changes else changes
            for name, changes in variants.items()
        },
        metrics=(
            "answer_accuracy_with_thoughts", "useful_sampled_thought_rate", "loss_without_thoughts",
            "loss_with_thoughts", "thought_entropy",
        ),
        fronts=(("loss_with_thoughts", "useful_sampled_thought_rate"),),
    )  # fmt: skip
