"""The charts of a checkpoint's page: where thoughts helped, rewards, mixing weights, training curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.reports.page import figure, table
from quietstar_jax.reports.svg import Chart, Range, number
from quietstar_jax.thoughts.score_figures import DECILES

STILL = 0.02  # nats: smaller changes count as none
BINS = 25
POINTS = 300  # of a training curve; more are averaged


def gain_by_decile(base_entropy: np.ndarray, base_nll: np.ndarray, gain: np.ndarray) -> str:
    """Mean gain per tenth of the tokens, sorted by entropy of the prediction without thoughts; all [tokens], nats."""
    order = np.argsort(base_entropy, kind="stable")
    parts = [part for part in np.array_split(order, DECILES) if part.size]
    means = [float(gain[part].mean()) for part in parts]
    errors = [float(gain[part].std(ddof=1) / np.sqrt(part.size)) if part.size > 1 else 0.0 for part in parts]
    tops = [mean + error for mean, error in zip(means, errors, strict=True)]
    bottoms = [mean - error for mean, error in zip(means, errors, strict=True)]
    span = padded(min(0.0, *bottoms), max(0.0, *tops))
    chart = Chart("Mean gain by tenth of the tokens", (0, len(parts)), span, bottom=62).y_axis("gain, nats")
    for i, part in enumerate(parts):
        loss, uncertainty = float(base_nll[part].mean()), float(base_entropy[part].mean())
        tip = (
            f"tenth {i + 1}: mean entropy {uncertainty:.3f} and mean loss {loss:.3f} nats without thoughts, "
            f"mean gain {means[i]:+.4f} nats"
        )
        chart.bar(i + 0.12, i + 0.88, means[i], "up" if means[i] >= 0 else "down", tip)
        chart.line([(i + 0.5, bottoms[i]), (i + 0.5, tops[i])], "whisker")
        chart.text(i + 0.5, span[0], number(loss, 2), dy=32)
    chart.text(0, span[0], "loss", anchor="end", dy=32)
    ticks = [(i + 0.5, str(i + 1)) for i in range(len(parts))]
    chart.x_axis("tenth of the tokens, from most certain (1) to least certain (10)", ticks)
    return figure(
        "Where thoughts help", chart.svg(),
        "Tokens are sorted by how uncertain the prediction without a thought was (its entropy, which does not depend "
        "on the token that followed) and cut into ten equal groups. A bar "
        "shows how many nats the greedy thought gained on average in a group (below zero: lost); the thin line is ± "
        "one standard "
        "error. The lower row of numbers is the mean loss of the group without thoughts.",
    )  # fmt: skip


def reward_histogram(rewards: np.ndarray, tokens_ahead: int) -> str:
    """Histogram of rewards [thoughts] in nats; rewards near 0 are only in the caption: they would hide the others."""
    still = np.abs(rewards) < STILL
    moved = rewards[~still]
    ahead = "the next token" if tokens_ahead == 1 else f"the next {tokens_ahead} tokens"
    caption = (
        f"The reward of a thought is how many nats it made {ahead} of the text likelier; below zero, it did harm. "
        f"{still.mean():.1%} of the {rewards.size:,} thoughts on this page changed less than {STILL} nats and are not "
        f"shown; {(rewards >= STILL).mean():.1%} helped, {(rewards <= -STILL).mean():.1%} did harm."
    )
    return figure("Rewards of single thoughts", _histogram(moved, "reward, nats", split=0.0), caption)


def weight_histogram(weights: np.ndarray) -> str:
    """Histogram of mixing weights [thoughts]."""
    low, high = (float(x) for x in np.quantile(weights, [0.25, 0.75]))
    caption = (
        "After a thought, the model mixes two predictions: the one it would have made anyway, and the one the "
        "thought suggests. The mixing weight is the share of the second: 0 ignores the thought, 1 follows it alone "
        f"(a little below 0 or above 1 is possible). Half of the weights are between {number(low, 3)} and "
        f"{number(high, 3)}; {(weights > 0.1).mean():.1%} are above 0.1."
    )  # fmt: skip
    return figure("Mixing weights", _histogram(weights, "mixing weight", split=None), caption)


def _histogram(values: np.ndarray, title: str, split: float | None) -> str:
    if not values.size:
        return "<p class='note'>Nothing to show.</p>"
    low, high = (float(x) for x in np.quantile(values, [0.002, 0.998]))
    if split is not None:
        low, high = min(low, split), max(high, split)
    if high - low < 1e-3:
        low, high = low - 5e-4, high + 5e-4
    edges = np.linspace(low, high, BINS + 1)
    if split is not None:  # no bar holds both help and harm
        edges = edges - edges[np.abs(edges - split).argmin()] + split
    shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / values.size
    top = float(shares.max())
    chart = Chart(f"Histogram: {title}", (float(edges[0]), float(edges[-1])), (0, 100 * top * 1.08))
    chart.y_axis("share, %")
    for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
        if share:
            kind = "plain" if split is None else ("up" if left >= split - 1e-9 else "down")
            chart.bar(left, right, 100 * share, kind, f"{left:.3f} to {right:.3f}: {share:.2%}")
    return chart.x_axis(title + "; the outermost bars include all values beyond").svg()


CURVES: dict[str, tuple[tuple[str, str], ...]] = {  # title -> (metric, kind of line); the last is always there
    "loss, nats per token": (("base_loss", "a"), ("talk_loss_1", "b")),
    "reward, nats": (("reward", "b"),),
    "reward spread at a position, nats": (("reward_std", "b"),),
    "positions with equal rewards, share": (("frac_reward_zero_std", "b"),),
    "mixing weight": (("mixing_weight", "b"),),
    "thought entropy, nats per token": (("entropy_p05", "a"), ("entropy_p95", "a"), ("entropy", "b")),
    "thought length, tokens": (("thought_length_p05", "a"), ("thought_length_p95", "a"), ("thought_length", "b")),
    "distinct thoughts, share": (("unique_thought_rate", "b"),),
    "KL to the reference, nats per token": (("kl", "b"),),
    "importance ratio": (("importance_ratio", "b"),),
    "limited importance ratios, share": (("clip_ratio", "b"),),
    "tokens per second": (("tokens_per_second", "b"),),
    "waiting for data, share of the time": (("data_wait_share", "b"),),
}
RENAMED = {"thought_entropy": "entropy", "reward_std_within_position": "reward_std"}  # metrics of old runs


def training_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Small charts, one row per phase, and the held-out figures at the end of each.

    Args:
      records: of `metrics.jsonl`; of the kinds train, speed and evaluation are drawn.
    """
    drawn = measured_steps(records)
    parts = []
    for phase in dict.fromkeys(record["phase"] for record in drawn):
        own = [record for record in drawn if record["phase"] == phase]
        known = {name for record in own for name in record}
        charts = [_curve(own, phase, title, series) for title, series in CURVES.items() if series[-1][0] in known]
        if "base_loss" in known and "talk_loss_1" not in known:
            charts = [_curve(own, phase, "loss, nats per token", (("base_loss", "a"),)), *charts]
        parts.append(
            figure(
                f"Phase “{phase}”, up to step {own[-1]['step']:,}", f'<div class="small">{"".join(charts)}</div>', ""
            )
        )
    return "".join(parts) + _held_out([record for record in records if record["kind"] == "evaluation"])


def measured_steps(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records of kind train and speed, with the present names of metrics."""
    return [
        {RENAMED.get(name, name): value for name, value in record.items()}
        for record in records
        if record["kind"] in ("train", "speed")
    ]


def _curve(
    records: Sequence[Mapping[str, Any]], phase: str, title: str, series: Sequence[tuple[str, str]]
) -> str:  # fmt: skip
    lines = [Line(f"raw-{kind}", f"line-{kind}", title, points_of(records, name)) for name, kind in series]
    drawing = curves(f"{title}, {phase}", [line for line in lines if line.points], width=300, height=190, left=52)
    return f'<div class="curve">{escape(title)}{drawing}</div>'


class Line(NamedTuple):
    """A curve of a metric: classes of its single values (empty = not drawn) and of their running mean, and its name."""

    raw: str
    smooth: str
    name: str
    points: Sequence[tuple[float, float]]  # (step, value), at least one


def points_of(records: Iterable[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Returns the values of a metric by step."""
    return [(float(record["step"]), float(record[metric])) for record in records if metric in record]


def curves(label: str, lines: Sequence[Line], **size: int) -> str:
    """Returns lines over steps as SVG; extreme values are outside."""
    thinned = [_thinned(line.points) for line in lines]
    low, high = np.quantile([y for points in thinned for _, y in points], [0.01, 0.99])
    steps = (min(points[0][0] for points in thinned), max(points[-1][0] for points in thinned))
    chart = Chart(label, steps, padded(float(low), float(high)), **size).y_axis()
    for line, points in zip(lines, thinned, strict=True):
        if line.raw:
            chart.line(points, line.raw)
    for line, points in zip(lines, thinned, strict=True):
        chart.line(_smoothed(points), line.smooth, line.name)
    ends = [(steps[0], f"{steps[0]:,.0f}"), (steps[1], f"{steps[1]:,.0f}")] if steps[0] != steps[1] else None
    return chart.x_axis("step", ends).svg()


def _held_out(records: Sequence[Mapping[str, Any]]) -> str:
    """Table of the last evaluation of every phase."""
    last = {record["phase"]: record for record in records}
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("loss without thoughts", "loss_without_thoughts", lambda x: number(x, 4)),
        ("with", "loss_with_thoughts", lambda x: number(x, 4)),
        ("next token right without", "accuracy_without_thoughts", lambda x: f"{x:.1%}"),
        ("with", "accuracy_with_thoughts", lambda x: f"{x:.1%}"),
        ("reward", "reward", lambda x: number(x, 4)),
        ("mixing weight", "mixing_weight", lambda x: number(x, 4)),
        ("answers right without", "answer_accuracy_without_thoughts", lambda x: f"{x:.1%}"),
        ("with", "answer_accuracy_with_thoughts", lambda x: f"{x:.1%}"),
    ]
    columns = [column for column in columns if any(column[1] in record for record in last.values())]
    if not columns:
        return ""
    rows = [
        [phase, f"{record['step']:,}", *(form(record[name]) if name in record else "" for _, name, form in columns)]
        for phase, record in last.items()
    ]
    drawn = table(["phase", "step", *(head for head, _, _ in columns)], rows)
    return figure(
        "Text the model was not trained on", drawn,
        "Measured at the end of each phase, with greedy thoughts. Losses and rewards are in nats per token.",
    )  # fmt: skip


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points, means of neighbours."""
    parts = np.array_split(np.asarray(points), min(POINTS, len(points)))
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a centred window of a tenth of the curve."""
    half = max(1, len(points) // 20)
    ys = [y for _, y in points]
    return [(x, float(np.mean(ys[max(0, i - half) : i + half + 1]))) for i, (x, _) in enumerate(points)]


def padded(low: float, high: float) -> Range:
    """Returns a span with some room around these values; 0 stays at an edge."""
    if low == high == 0:
        return 0.0, 1.0
    room = 0.06 * (high - low) or 0.5
    return (low if low == 0 else low - room, high if high == 0 else high + room)
