"""The charts of a checkpoint's page: where thoughts helped, rewards, mixing weights, training curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from quietstar_jax.reports.page import figure, table
from quietstar_jax.reports.svg import Chart, Range, number
from quietstar_jax.thoughts.token_scores import DECILES

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
    span = _padded(min(0.0, *bottoms), max(0.0, *tops))
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


CHANGES = {
    "delete": "deleted, random places",
    "replace": "replaced at random",
    "truncate": "cut off at the end",
    "shuffle": "shuffled, random places",
}


def perturbation_curves(perturbed: Mapping[str, Sequence[Mapping[str, Any]]], without: float, tokens: int) -> str:
    """Small charts of loss against the share of each greedy thought's tokens that were changed.

    Args:
      perturbed: rows of each kind, as from `thought_use.summarize_use`; without: loss without thoughts, nats per token;
      tokens: number of predicted tokens.
    """
    values = [without]
    for rows in perturbed.values():
        for row in rows:
            values += [row["nats_per_token"], *_whisker(row, rows[0])]
    span = _padded(min(values), max(values))
    charts = [_perturbation_curve(kind, rows, without, span) for kind, rows in perturbed.items()]
    return figure(
        "Loss with changed thoughts", f'<div class="small">{"".join(charts)}</div>',
        f"A share of the tokens of every greedy thought was changed before the next token was predicted, on {tokens:,} "
        "tokens of the text. The dashed line is the loss without thoughts. A curve that rises to it: the prediction "
        "needs the changed tokens. A flat curve: it does not depend on them. Where nothing is left of a thought "
        "(100 % deleted), a remaining gain comes from the computation at the start and end tokens, not from the "
        "thought. The thin lines are 95 % intervals of the change from the unchanged thoughts, over pieces of text.",
    )  # fmt: skip


def _perturbation_curve(kind: str, rows: Sequence[Mapping[str, Any]], without: float, span: Range) -> str:
    title = CHANGES[kind]
    chart = Chart(f"Loss with thoughts {title}", (0, 100), span, width=300, height=190, left=52).y_axis()
    chart.line([(0, without), (100, without)], "reference", f"without thoughts: {without:.4f} nats per token")
    chart.line([(row["percent"], row["nats_per_token"]) for row in rows], "line-b")
    for row in rows:
        x, low_high = row["percent"], _whisker(row, rows[0])
        if x and low_high:
            chart.line([(x, y) for y in low_high], "whisker")
        tip = f"{x} % ({row['changed_tokens']} tokens): {row['nats_per_token']:.4f} nats per token"
        chart.dot(x, row["nats_per_token"], "mean", f"{tip}, change {row['change']['difference']:+.4f}", radius=3)
    drawing = chart.x_axis("share of the tokens, %", [(percent, str(percent)) for percent in range(0, 101, 20)]).svg()
    return f'<div class="curve">{escape(f"loss, nats per token: {title}")}{drawing}</div>'


def _whisker(row: Mapping[str, Any], first: Mapping[str, Any]) -> tuple[float, ...]:
    """The ends of the interval of the change, at the loss of the unchanged thoughts; empty if there is none."""
    interval = row["change"]["interval"]
    return () if interval is None else tuple(first["nats_per_token"] + end for end in interval)


def thought_only_bars(use: Mapping[str, Any]) -> str:
    """Losses without and with greedy thoughts, and of the thought alone; `use` as from `make.measure_use`."""
    alone = use["thought_only"]
    bars = [
        ("no thought", use["without_thoughts"], "plain", "text without thoughts"),
        ("thought", use["with_thoughts"], "up", "text and thought, mixed"),
        ("thought only", alone["nats_per_token"], "up", "thought without the text"),
        ("empty only", alone["empty_thought"]["nats_per_token"], "plain", "empty thought without the text"),
    ]
    top = max(value for _, value, _, _ in bars)
    chart = Chart("Loss of the thought alone", (0, len(bars)), (0, 1.12 * top)).y_axis("loss, nats per token")
    for i, (_, value, kind, what) in enumerate(bars):
        chart.bar(i + 0.15, i + 0.85, value, kind, f"{what}: {value:.4f} nats per token")
        chart.text(i + 0.5, value, number(value, 3), "strong", dy=-5)
    gain = alone["gain_over_empty_thought"]
    drawing = chart.x_axis("what the prediction can read", [(i + 0.5, bars[i][0]) for i in range(len(bars))]).svg()
    return figure(
        "What the thought says by itself", drawing,
        "“Thought only”: the thought was written with the text in view, then read again with the text hidden from "
        "it, and the next token predicted from that alone, without mixing. “Empty only” is the same with a thought of "
        "no tokens: it knows nothing about the place in the text. The tokens of the thought gain "
        f"{_with_interval(gain)}. Above zero, they say something about the next token that the model can read by "
        "itself. At or below zero, they do not, or they mislead without the text: the model was not trained to predict "
        "without it.",
    )  # fmt: skip


def ensemble_curve(ensembles: Sequence[Mapping[str, Any]]) -> str:
    """Loss of the mean prediction of 1 .. R sampled thoughts; `ensembles` as from `thought_use.ensembles`."""
    last = ensembles[-1]
    without = ensembles[0]["nats_per_token"] + ensembles[0]["gain_over_no_thoughts"]["difference"]
    points = [(float(row["samples"]), row["nats_per_token"]) for row in ensembles]
    span = _padded(min(without, *(y for _, y in points)), max(without, *(y for _, y in points)))
    chart = Chart("Loss of several thoughts together", (1, len(points)), span).y_axis("loss, nats per token")
    chart.line([(1, without), (len(points), without)], "reference", f"without thoughts: {without:.4f} nats per token")
    chart.line(points, "line-b")
    for x, y in points:
        chart.dot(x, y, "mean", f"{x:.0f} thoughts: {y:.4f} nats per token")
    drawing = chart.x_axis("sampled thoughts whose predictions are averaged", [(x, f"{x:.0f}") for x, _ in points])
    return figure(
        "Several thoughts together", drawing.svg(),
        f"The predicted probabilities of several sampled thoughts are averaged. All {last['samples']} together gain "
        f"{_with_interval(last['gain_over_one_thought'])} over one of them, and "
        f"{_with_interval(last['gain_over_no_thoughts'])} over no thoughts (the dashed line). If the thoughts of one "
        "place agree, there is nothing to gain.",
    )  # fmt: skip


def _with_interval(found: Mapping[str, Any]) -> str:
    """A difference in nats per token, as from `compare_paired`."""
    text = f"{number(found['difference'], 4)} nats per token"
    if found["interval"] is None:
        return text
    low, high = (number(end, 4) for end in found["interval"])
    return f"{text} (95 % interval {low} to {high})"


CURVES: dict[str, tuple[tuple[str, str], ...]] = {
    "loss, nats per token": (("base_loss", "a"), ("talk_loss_1", "b")),
    "reward, nats": (("reward", "b"),),
    "mixing weight": (("mixing_weight", "b"),),
    "thought entropy, nats per token": (("thought_entropy", "b"),),
}


def training_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Small charts, one row per phase, and the held-out figures at the end of each."""
    train = [record for record in records if record["kind"] == "train"]
    parts = []
    for phase in dict.fromkeys(record["phase"] for record in train):
        own = [record for record in train if record["phase"] == phase]
        charts = [_curve(own, phase, title, series) for title, series in CURVES.items() if series[-1][0] in own[0]]
        charts = charts or [_curve(own, phase, "loss, nats per token", (("base_loss", "a"),))]
        parts.append(
            figure(
                f"Phase “{phase}”, up to step {own[-1]['step']:,}", f'<div class="small">{"".join(charts)}</div>', ""
            )
        )
    return "".join(parts) + _held_out([record for record in records if record["kind"] == "evaluation"])


def _curve(
    records: Sequence[Mapping[str, Any]], phase: str, title: str, series: Sequence[tuple[str, str]]
) -> str:  # fmt: skip
    lines = []
    for name, kind in series:
        points = [(float(record["step"]), float(record[name])) for record in records if name in record]
        if points:
            lines.append((kind, _thinned(points)))
    smooth = [(kind, _smoothed(points)) for kind, points in lines]
    values = np.array([y for _, points in lines for _, y in points])
    low, high = np.quantile(values, [0.01, 0.99])
    steps = (lines[0][1][0][0], lines[0][1][-1][0])
    label = f"{title}, {phase}"
    chart = Chart(label, steps, _padded(float(low), float(high)), width=300, height=190, left=52).y_axis()
    for kind, points in lines:
        chart.line(points, f"raw-{kind}")
    for kind, points in smooth:
        chart.line(points, f"line-{kind}", title)
    ends = [(steps[0], f"{steps[0]:,.0f}"), (steps[1], f"{steps[1]:,.0f}")] if steps[0] != steps[1] else None
    drawing = chart.x_axis("step", ends).svg()
    return f'<div class="curve">{escape(title)}{drawing}</div>'


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


def _padded(low: float, high: float) -> Range:
    room = 0.06 * (high - low) or 0.5
    return (low if low == 0 else low - room, high if high == 0 else high + room)
