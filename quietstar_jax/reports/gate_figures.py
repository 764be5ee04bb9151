"""The calibration of the thinking gate, as a chart and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quietstar_jax.reports.page import figure, table
from quietstar_jax.reports.svg import Chart


def gate_figures(calibration: Mapping[str, Any]) -> str:
    """A reliability diagram, and precision and recall; `calibration` as `gate` from `measure_selective`."""
    return _reliability(calibration) + _precision_and_recall(calibration)


def _reliability(calibration: Mapping[str, Any]) -> str:
    rows = calibration["reliability"]
    chart = Chart("Reliability of the thinking gate", (0, 100), (0, 100)).y_axis("thoughts that pay, %")
    chart.line([(0, 0), (100, 100)], "reference", "a calibrated gate")
    chart.line([(100 * row["predicted"], 100 * row["observed"]) for row in rows], "line-b")
    for row in rows:
        x, y = 100 * row["predicted"], 100 * row["observed"]
        chart.dot(x, y, "mean", f"predicted {x:.1f} %, observed {y:.1f} %, of {row['count']:,}", radius=3)
    ahead = calibration["tokens_ahead"]
    tokens = "token" if ahead == 1 else f"{ahead} tokens"
    prices = ", ".join(f"{row['price']:g}" for row in calibration["prices"])
    return figure(
        "Does the gate predict where a thought pays?", chart.x_axis("predicted by the gate, %").svg(),
        f"The gate predicts the probability that thoughts make the true next {tokens} likelier by more than a price. "
        "It is trained on the mean of sampled thoughts. Points are means over one greedy thought at every position and "
        f"the prices {prices} nats, by tenth of the predicted probability; on the dashed line, the prediction is right "
        "for these thoughts. The mean distance from this line is "
        f"{100 * calibration['calibration_error']:.1f} percentage points.",
    )  # fmt: skip


def _precision_and_recall(calibration: Mapping[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    policies = ("gate", "entropy", "random")
    head = ["price, nats", "thoughts that pay", "gate thinks at"]
    head += [f"{what}: {policy}" for what in ("precision", "recall") for policy in policies]
    rows = [
        [f"{row['price']:g}", percent(row["pays"]), percent(row["thinking_rate"])]
        + [percent(row[policy][what]) for what in ("precision", "recall") for policy in policies]
        for row in calibration["prices"]
    ]
    return figure(
        "The gate against other policies that think as often", table(head, rows),
        "Precision: of the positions that think, the share at which the thought pays. Recall: of the positions at "
        "which a thought pays, the share that thinks. The entropy policy thinks at as many positions, those with the "
        "highest entropy; figures of random positions are expected values.",
    )  # fmt: skip
