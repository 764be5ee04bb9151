"""The HTML page of a study: every variant with every seed, and the significance of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from quietstar_jax.reports.figures import padded
from quietstar_jax.reports.page import figure, render, table
from quietstar_jax.reports.svg import Chart, number

ROW = 30  # pixels per variant


def study_page(results: Mapping[str, Any], where: str) -> str:
    """Returns the page as HTML, from the result of `studies.results.collect`."""
    study, runs, rows = results["study"], results["runs"], results["rows"]
    baseline = study["baseline"]
    variants = [name for name in study["variants"] if any(run["variant"] == name for run in runs)]
    variants.sort(key=lambda name: name != baseline)
    body = [
        "<h1>A study, side by side</h1>",
        f'<p class="where">{escape(where)}</p>',
        _introduction(study, variants, runs, results.get("missing", [])),
    ]
    for metric in study["metrics"]:
        own = {row["variant"]: row for row in rows if row["metric"] == metric}
        if own:
            body.append(f"<h2>{escape(metric.replace('_', ' '))}</h2>")
            body.append(f'<div class="charts">{_values(metric, variants, runs, own, baseline)}')
            body.append(f"{_differences(metric, variants, runs, own, baseline)}</div>")
    body += [_front(x, y, variants, rows) for x, y in study.get("fronts", ())]
    body += ["<h2>All figures</h2>", _table(variants, rows, study["metrics"]), _settings(study, runs)]
    return render("A study, side by side", "\n".join(body))


def _introduction(
    study: Mapping[str, Any], variants: Sequence[str], runs: Sequence[Any], missing: Sequence[Any]
) -> str:
    text = (
        f"<p>{len(variants)} variants of the same training, {len(runs)} runs of {escape(study['base'])}. Everything "
        f"is compared with <b>{escape(study['baseline'])}</b>. A run depends on chance (its seed); so every variant "
        "was repeated with several seeds, and each dot is one run. The ring is the mean of a variant, the line "
        "through it ± one standard error.</p><p>On the right, runs with the same seed are subtracted from each "
        f"other: the dots are these differences from {escape(study['baseline'])}, the line is the 95 % confidence "
        "interval of their mean. p is the probability of a difference at least as large if there were none in truth "
        "(paired two-sided t-test); n is the number of pairs; ⟷ means that the interval is wider than the chart. With "
        "few seeds the intervals are wide, and among many "
        "comparisons some p are small by chance: they are not corrected for that.</p>"
    )
    if missing:
        names = ", ".join(f"{run['variant']} (seed {run['seed']})" for run in missing)
        text += f'<p class="soft">Not finished: {escape(names)}.</p>'
    return text


def _of(metric: str, variant: str, runs: Sequence[Any]) -> dict[int, float]:
    """Seed -> value."""
    return {
        run["seed"]: run["figures"][metric] for run in runs if run["variant"] == variant and metric in run["figures"]
    }


def _values(metric: str, variants: Sequence[str], runs: Sequence[Any], own: Mapping[str, Any], baseline: str) -> str:
    values = {variant: _of(metric, variant, runs) for variant in variants if variant in own}
    chart = _rows_chart(metric, list(values), [x for found in values.values() for x in found.values()])
    if baseline in own:
        chart.line([(own[baseline]["mean"], 0), (own[baseline]["mean"], len(values))], "reference")
    for place, variant in enumerate(values):
        y, row = len(values) - place - 0.5, own[variant]
        for seed, value in values[variant].items():
            chart.dot(value, y, "seed", f"{variant}, seed {seed}: {value:.4g}")
        _mean(
            chart, y, row["mean"], row["standard_error"], f"{variant}: mean {row['mean']:.4g} over {row['runs']} seeds"
        )
    drawn = chart.x_axis(metric.replace("_", " ")).svg()
    return figure("Every run", drawn, "")


def _differences(
    metric: str, variants: Sequence[str], runs: Sequence[Any], own: Mapping[str, Any], baseline: str
) -> str:
    others = [variant for variant in variants if variant in own and own[variant]["pairs"]]
    if not others:
        return figure(
            "Differences", '<p class="soft">No seed was run with both a variant and the baseline yet.</p>', ""
        )
    base = _of(metric, baseline, runs)
    pairs = {
        variant: {seed: x - base[seed] for seed, x in _of(metric, variant, runs).items() if seed in base}
        for variant in others
    }
    shown = [0.0, *(x for found in pairs.values() for x in found.values())]
    wide = [own[variant] for variant in others if own[variant]["low"] is not None and own[variant]["pairs"] > 2]
    shown += [row[end] for row in wide for end in ("low", "high")]  # intervals of two pairs would hide all else
    chart = _rows_chart(f"{metric}, differences", others, shown, right=140)
    chart.line([(0, 0), (0, len(others))], "reference")
    for place, variant in enumerate(others):
        y, row = len(others) - place - 0.5, own[variant]
        for seed, value in pairs[variant].items():
            chart.dot(value, y, "seed", f"{variant}, seed {seed}: {value:+.4g}")
        half = None if row["low"] is None else row["difference"] - row["low"]
        _mean(chart, y, row["difference"], half, f"{variant}: mean difference {row['difference']:+.4g}")
        said = f"n {row['pairs']}" if row["p_value"] is None else f"p {row['p_value']:.2g}, n {row['pairs']}"
        if half is not None and not (chart.x[0] <= row["low"] and row["high"] <= chart.x[1]):
            said += ", ⟷"
        chart.beside(y, said)
    return figure(f"Differences from {baseline}", chart.x_axis(f"difference in {metric.replace('_', ' ')}").svg(), "")


def _front(x_metric: str, y_metric: str, variants: Sequence[str], rows: Sequence[Any]) -> str:
    """Draws the means of two metrics against each other; names are beside the plot, in the order of the marks."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    points = {
        v: (cells[v, x_metric], cells[v, y_metric]) for v in variants if {(v, x_metric), (v, y_metric)} <= {*cells}
    }
    means = np.array([[row["mean"] for row in pair] for pair in points.values()]).reshape(-1, 2)
    near = _near(means[:, 0]) & _near(means[:, 1])
    if not near.any():
        return ""
    drawn = sorted(np.array([*points])[near], key=lambda variant: -points[variant][1]["mean"])
    x_name, y_name = (metric.replace("_", " ") for metric in (x_metric, y_metric))
    x_span, y_span = (padded(low, high) for low, high in zip(means[near].min(0), means[near].max(0), strict=True))
    size = dict(width=760, height=max(320, 22 * len(drawn) + 58), right=90 + 8 * max(map(len, drawn)))
    chart = Chart(f"{y_name} against {x_name}", x_span, y_span, **size).x_grid().y_axis(y_name)
    for place, variant in enumerate(drawn):
        (x, dx), (y, dy) = ((row["mean"], row["standard_error"] or 0.0) for row in points[variant])
        level = y_span[1] - (place + 0.5) / len(drawn) * (y_span[1] - y_span[0])
        chart.line([(x, y), (x_span[1], level)], "leader").beside(level, variant)
        chart.line([(x - dx, y), (x + dx, y)], "whisker").line([(x, y - dy), (x, y + dy)], "whisker")
        chart.dot(x, y, "mean", f"{variant}: {x_name} {x:.4g}, {y_name} {y:.4g}", radius=5)
    caption = "Each ring is the mean of a variant over its seeds; the lines through it are ± one standard error."
    if far := [f"{v} ({x:.4g}, {y:.4g})" for v, (x, y), shown in zip(points, means, near, strict=True) if not shown]:
        caption += f" Too far from the others to be drawn: {', '.join(far)}."
    return figure(f"{y_name.capitalize()} against {x_name}", chart.x_axis(x_name).svg(), caption)


def _near(values: np.ndarray) -> np.ndarray:
    """Whether each value is not far from most others; all are near if most are equal, which gives no scale."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if values.size else (0.0, 0.0, 0.0)
    room = max(3 * (high - low), 0.25 * abs(middle)) if high > low else np.inf
    return np.asarray((values >= low - room) & (values <= high + room))


def _rows_chart(label: str, names: Sequence[str], values: Sequence[float], right: int = 16) -> Chart:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    left = max(120, 24 + 8 * max(map(len, names)))  # pixels: names are 13 high
    size = dict(width=400 + left, height=ROW * len(names) + 58, left=left, right=right)
    chart = Chart(label, (low - room, high + room), (0, len(names)), **size)
    return chart.y_names([(len(names) - place - 0.5, name) for place, name in enumerate(names)]).x_grid()


def _mean(chart: Chart, y: float, mean: float, half: float | None, tip: str) -> None:
    if half is not None:
        low, high = chart.x  # an interval of two runs may be many times as wide as the chart
        chart.line([(max(mean - half, low), y), (min(mean + half, high), y)], "whisker")
    chart.dot(mean, y, "mean", tip, radius=7)


def _table(variants: Sequence[str], rows: Sequence[Any], metrics: Sequence[str]) -> str:
    cells = {(row["variant"], row["metric"]): row for row in rows}
    lines = []
    for variant in variants:
        own = [cells.get((variant, metric)) for metric in metrics]
        lines.append([variant, str(max(row["runs"] for row in own if row)), *map(_cell, own)])
    return table(["variant", "n", *(metric.replace("_", " ") for metric in metrics)], lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = number(row["mean"], 4)
    text += "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
    return text + ("" if row["p_value"] is None else f" (p {row['p_value']:.2g})")


def _settings(study: Mapping[str, Any], runs: Sequence[Any]) -> str:
    """Table of what each variant changes, and of the run whose first phases it reused."""
    lines = []
    for variant, settings in study["variants"].items():
        changed = ", ".join(f"{name} = {value}" for name, value in settings.items()) or "nothing"
        begun = {run["begun_from"]["run"].split("/")[0] + f" (step {run['begun_from']['step']:,})"
                 for run in runs if run["variant"] == variant and run["begun_from"]}  # fmt: skip
        lines.append([variant, changed, ", ".join(sorted(begun))])
    head = ["variant", "what is changed", "first phases shared with"]
    return "<h2>What the variants are</h2>" + table(head, lines).replace('class="data"', 'class="data words"')
