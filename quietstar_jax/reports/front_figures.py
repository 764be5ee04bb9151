"""Charts of loss and answers at each thinking rate: what is lost if only some positions think."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quietstar_jax.reports.figures import padded
from quietstar_jax.reports.page import figure
from quietstar_jax.reports.svg import Chart

# Of each policy; others have line-b.
KINDS = {"entropy": "line-c", "entropy_band": "line-e", "margin": "line-d", "random": "line-a"}


def front_charts(front: Mapping[str, Any], position: str, right: str) -> str:
    """Two charts against the share of positions that think: loss, and answers that are right.

    Args:
      front: as from `thoughts.front.summarize_front`.
      position: what a position is, a sentence; right: what `right` counts, a few words.
    """
    counted = f"{front['positions']:,} positions. {position}"
    loss = _chart(front, "nats_per_token", "loss, nats per token", 1.0, legend_at_top=True)
    answers = _chart(front, "right", f"{right}, %", 100.0, legend_at_top=False)
    return figure(
        "Loss if only some positions think", loss,
        f"{counted} From left to right, the threshold of each policy changes until every position thinks. All curves "
        "are from the same predictions. A curve below that of random positions: the policy finds positions at which "
        "thoughts help more than on average. A curve that falls below its own right end: the policy avoids positions "
        "at which thoughts do harm.",
    ) + figure(
        f"{right[0].upper()}{right[1:]} if only some positions think", answers,
        "From the same predictions as the loss. Higher is better.",
    )  # fmt: skip


def _chart(front: Mapping[str, Any], name: str, title: str, scale: float, *, legend_at_top: bool) -> str:
    curves = {
        policy: [(100 * point["thinking_rate"], scale * point[name], point) for point in found["points"]]
        for policy, found in front["policies"].items()
    }
    values = [y for points in curves.values() for _, y, _ in points]
    low, high = padded(min(values), max(values))
    chart = Chart(f"By thinking rate, {title}", (0, 100), (low, high), width=520, height=320).y_axis(title)
    for row, (policy, points) in enumerate(curves.items()):
        kind, label = KINDS.get(policy, "line-b"), policy.replace("_", " ")
        chart.line([(x, y) for x, y, _ in points], kind, label)
        for x, y, point in points[:: max(1, len(points) // 20)]:
            chart.dot(x, y, "hidden", f"{point['think']}: {x:.1f} % think, {y:.4g}")
        place = (row + 1) / 14
        height = high - place * (high - low) if legend_at_top else low + place * (high - low)
        chart.legend(height, kind, label, start=0.74)
    return chart.x_axis("positions that think, %").svg()
