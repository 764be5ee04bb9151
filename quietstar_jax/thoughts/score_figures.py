"""Figures of held-out text from the scores of its tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from quietstar_jax.thoughts.ending import thought_lengths
from quietstar_jax.thoughts.token_scores import TokenScores

DECILES = 10


def summarize(scores: TokenScores) -> dict[str, Any]:
    """Returns means over all real tokens: losses in nats per token, rewards in nats, and rates.

    `deciles` has one row per tenth of the tokens, from the lowest to the highest entropy of the prediction without
    thoughts. Sorting by the loss without thoughts instead would select tokens by the quantity that is compared: any
    change that only makes predictions less certain, such as a higher temperature, would seem to help the hard tokens.

    Losses and accuracies are means over all tokens; `mixing_weight`, `reward`, `thought_entropy`, `thought_length` (in
    tokens), `empty_thought_rate` and `unique_thought_rate` over the thoughts that the policy of thinking makes, 0 if it
    makes none.

    Args:
      scores: numpy arrays, as from `first_thought`.
    """
    real = scores.real
    scores = jax.tree.map(lambda x: x[real], scores)
    if not len(scores.real):
        return {"tokens": 0}
    base, talk, made = scores.base, scores.talk, scores.made_thoughts
    thoughts, lengths = scores.thoughts[made], np.asarray(thought_lengths(scores.thoughts))

    def mean(values: np.ndarray, part: Any = slice(None)) -> float:
        """The mean over the thoughts that are made."""
        return float(values[part][made[part]].mean()) if made[part].any() else 0.0

    rate = {} if scores.made is None else {"thinking_rate": float(scores.made.mean())}
    order = np.argsort(scores.base_entropy, kind="stable")
    rows = [
        {
            "entropy_without_thoughts": float(scores.base_entropy[part].mean()),
            "loss_without_thoughts": float(base.nll[part].mean()),
            "loss_with_thoughts": float(talk.nll[part].mean()),
            "mixing_weight": mean(scores.weight, part),
        }
        for part in np.array_split(order, DECILES)
        if part.size
    ]
    return {
        "tokens": len(scores.real),
        "loss_without_thoughts": float(base.nll.mean(dtype=np.float64)),
        "loss_with_thoughts": float(talk.nll.mean(dtype=np.float64)),
        "accuracy_without_thoughts": float(base.correct.mean()),
        "accuracy_with_thoughts": float(talk.correct.mean()),
        "mixing_weight": mean(scores.weight),
        "reward": mean(scores.reward),
        "thought_entropy": mean(scores.thought_entropy),
        "thought_length": mean(lengths),
        "empty_thought_rate": mean(lengths == 0) if scores.thoughts.shape[-1] else 0.0,
        "unique_thought_rate": len(np.unique(thoughts, axis=0)) / len(thoughts) if thoughts.size else 0.0,
        **rate,
        "deciles": rows,
    }
