"""Calibration of the thinking gate: its probabilities against the outcomes, and its choices against other policies.

A thought pays at a position and a price if it makes the true next tokens likelier by more than the price, in nats: as
many tokens as the gate is trained to predict. The gate is trained on the mean of several sampled thoughts, so a
calibrated gate may differ from what a single thought gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quietstar_jax.methods.thinking import THINKING

BINS = 10  # of probability, equally wide
RIVALS = ("gate", "entropy")  # policies that are compared at the thinking rate of the gate


def reliability(probability: np.ndarray, pays: np.ndarray) -> list[dict[str, Any]]:
    """Returns the reliability diagram (Murphy and Winkler 1977): a row for each of `BINS` that is not empty.

    Args:
      probability: [N] predicted, 0 .. 1; pays: [N] bool.

    Returns:
      `count`, and the means `predicted` and `observed`.
    """
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return [
        {
            "count": int((bins == i).sum()),
            "predicted": float(probability[bins == i].mean()),
            "observed": float(pays[bins == i].mean()),
        }
        for i in np.unique(bins)
    ]


def precision_and_recall(order: np.ndarray, pays: np.ndarray, count: int) -> dict[str, float | None]:
    """Returns both for thinking at the first `count` positions of `order` [N]; None where they would divide by 0."""
    found = pays[order[:count]].sum()
    return {
        "precision": float(found / count) if count else None,
        "recall": float(found / pays.sum()) if pays.any() else None,
    }


def calibrate(
    gain: np.ndarray, rankings: Mapping[str, np.ndarray], prices: Sequence[float], slope: float
) -> dict[str, Any]:
    """Returns the calibration of a gate.

    Args:
      gain: [N] nats, of one thought at each position; rankings: [N] each, of `RIVALS`.
      prices: nats per thought; slope: a of the gate, see `thoughts/gate.py`.

    Returns:
      `reliability`: the diagram over all positions and prices; `calibration_error`: the mean distance of its rows from
      the diagonal, weighted by their counts; `prices`: for each price, `price`, `pays` (the share of positions at which
      a thought pays), `thinking_rate` of the gate, and `precision` and `recall` of each policy at this rate, by name;
      those of `random` are expected values.
    """
    predicted = np.asarray(rankings["gate"], np.float64)
    pays = gain > np.array(prices)[:, None]  # [prices, N]
    probability = 1 / (1 + np.exp(-np.clip(slope * (predicted - np.array(prices)[:, None]), -500, 500)))
    rows = reliability(probability.ravel(), pays.ravel())
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in rows) / pays.size

    orders = {name: THINKING[name].traits["ranking"].order(rankings[name]) for name in RIVALS}
    compared = []
    for price, of_price in zip(prices, pays, strict=True):
        count = int((predicted > price).sum())
        policies = {name: precision_and_recall(order, of_price, count) for name, order in orders.items()}
        rate = count / len(gain)
        chance = {
            "precision": float(of_price.mean()) if count else None,
            "recall": rate if of_price.any() else None,
        }
        compared.append(
            {
                "price": price,
                "pays": float(of_price.mean()),
                "thinking_rate": rate,
                **policies,
                "random": chance,
            }
        )
    return {"reliability": rows, "calibration_error": float(error), "prices": compared}
