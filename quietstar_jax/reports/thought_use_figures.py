"""Charts of whether thoughts are used: perturbed, read without the text, several together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quietstar_jax.reports.figures import padded
from quietstar_jax.reports.page import figure
from quietstar_jax.reports.svg import Chart, Range, number

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
    span = padded(min(values), max(values))
    charts = [_perturbation_curve(kind, rows, without, span) for kind, rows in perturbed.items()]
    return figure(
        "Loss with changed thoughts", f'<div class="small">{"".join(charts)}</div>',
        f"A share of the tokens of every greedy thought was changed before the next token was predicted, on {tokens:,} "
        "tokens of the text. The dashed line is the loss without thoughts. If a curve rises to this line, the "
        "predictions need the changed tokens. If it is flat, they do not depend on them. Where no token of a thought "
        "is left (100 % deleted), a remaining gain comes from the computation at the start and end tokens, not from "
        "the thought. Thin lines are 95 % intervals of the change from the unchanged thoughts, over pieces of text.",
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
    drawing = chart.x_axis("input of the prediction", [(i + 0.5, bars[i][0]) for i in range(len(bars))]).svg()
    return figure(
        "The thought without the text", drawing,
        "“Thought only”: the thought is generated with the text, and the next token is then predicted from the thought "
        "alone, with the text hidden and without mixing. “Empty only” is the same with a thought of no tokens, which "
        "has no information about the text. The gain from the tokens of the thought is "
        f"{_with_interval(gain)}. A gain above zero means that they contain information about the next token that the "
        "model can use without the text. A gain of zero or below means that they do not, or that they mislead the "
        "model, which is not trained to predict without the text.",
    )  # fmt: skip


def ensemble_curve(ensembles: Sequence[Mapping[str, Any]]) -> str:
    """Loss of the mean prediction of 1 .. R sampled thoughts; `ensembles` as from `thought_use.ensembles`."""
    last = ensembles[-1]
    without = ensembles[0]["nats_per_token"] + ensembles[0]["gain_over_no_thoughts"]["difference"]
    points = [(float(row["samples"]), row["nats_per_token"]) for row in ensembles]
    span = padded(min(without, *(y for _, y in points)), max(without, *(y for _, y in points)))
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
        f"{_with_interval(last['gain_over_no_thoughts'])} over no thoughts (the dashed line). If the thoughts of a "
        "position lead to the same prediction, the gain over one is zero.",
    )  # fmt: skip


def _with_interval(found: Mapping[str, Any]) -> str:
    """A difference in nats per token, as from `compare_paired`."""
    text = f"{number(found['difference'], 4)} nats per token"
    if found["interval"] is None:
        return text
    low, high = (number(end, 4) for end in found["interval"])
    return f"{text} (95 % interval {low} to {high})"
