"""The HTML page of measurements at several steps of training: each metric as curves, and all figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from quietstar_jax.evals.table import MODES
from quietstar_jax.reports.figures import padded
from quietstar_jax.reports.measurements import Measurement, Series
from quietstar_jax.reports.page import figure, render, table
from quietstar_jax.reports.svg import Chart, number

LEGEND = 18  # pixels of a row
SIZE = {"width": 520, "height": 340}


def measurements_page(found: Sequence[Series]) -> str:
    """Returns the page as HTML."""
    body = [
        "<h1>Measured during training</h1>",
        '<p class="where">Intervals are 95 % intervals over questions or texts, for one training run; they are no '
        "measure of the differences between training runs. Differences with and without thoughts are paired.</p>",
    ]
    for series in found:
        metrics = list(dict.fromkeys(name for one in series.measurements for name in one.values))
        body += [
            f"<h2>{escape(series.task)}</h2>",
            f'<p class="where">{escape(series.about)}</p>',
            f'<div class="charts">{"".join(_chart(series, metric) for metric in metrics)}</div>',
            *(_table(series, metric) for metric in metrics),
        ]
    return render("Measured during training", "\n".join(body))


def _scale(metric: str) -> tuple[int, int]:
    """Returns the factor and the decimals with which a metric is shown."""
    return (100, 2) if metric.endswith("%") else (1, 4)


def _lines(series: Series, metric: str) -> dict[tuple[str, str], list[tuple[int, Measurement, str]]]:
    """Returns the points (step, measurement, its mode) of each run and mode.

    The model from which the runs started is their first point; its values are those without thoughts if it has none.
    """
    found: dict[tuple[str, str], list[tuple[int, Measurement, str]]] = {}
    start = [one for one in series.measurements if not one.run and metric in one.values]
    for run in series.runs or [""]:
        own = [one for one in series.measurements if one.run == run and metric in one.values]
        for mode in MODES:
            points = [(one.step, one, mode) for one in own if mode in one.values[metric]]
            first = [(0, one, mode if mode in one.values[metric] else "without_thoughts") for one in start if run]
            if points:
                found[run, mode] = first * (points[0][0] > 0) + points
    return found


def _chart(series: Series, metric: str) -> str:
    scale, digits = _scale(metric)
    lines = _lines(series, metric)
    steps = [step for points in lines.values() for step, _, _ in points]
    values = [scale * one.values[metric][mode][0] for points in lines.values() for _, one, mode in points]
    low, high = padded(min(values), max(values))
    legend = LEGEND * len(lines) / (SIZE["height"] - 58)
    top = high + (high - low) * legend / (1 - legend)
    label = f"{series.task}, {metric.removesuffix(', %')}, by step"
    chart = Chart(label, (min(steps), max(steps)), (low, top), **SIZE).y_axis(metric)
    left, right = min(steps), max(*steps, min(steps) + 1)
    for row, ((run, mode), points) in enumerate(lines.items()):
        kind = f"smooth {'dashed ' if mode == 'without_thoughts' else ''}run{series.runs.index(run) if run else 0}"
        name = ", ".join(filter(None, [run, MODES[mode]]))
        chart.line([(step, scale * one.values[metric][shown][0]) for step, one, shown in points], kind, name)
        for step, one, shown in points:
            mean, interval = one.values[metric][shown]
            ends = " .. ".join(number(scale * end, digits) for end in interval)
            chart.dot(step, scale * mean, "hidden", f"{name}, step {step}: {number(scale * mean, digits)} ({ends})")
        height = top - (row + 0.5) * (top - high) / len(lines)
        chart.line([(left, height), (left + 0.06 * (right - left), height)], kind)
        chart.text(left + 0.07 * (right - left), height, name, "name", "start", dy=4)
    return figure(metric, chart.x_axis("step", [(step, str(step)) for step in sorted({*steps})]).svg(), "")


def _table(series: Series, metric: str) -> str:
    scale, digits = _scale(metric)
    rows = []
    for one in series.measurements:
        cells = []
        for mode in MODES:
            mean, interval = one.values.get(metric, {}).get(mode, (None, (0.0, 0.0)))
            ends = " .. ".join(number(scale * end, digits) for end in interval)
            cells.append("" if mean is None else f"{number(scale * mean, digits)} ({ends})")
        difference, p_value = one.differences.get(metric, (None, None))
        cells.append("" if difference is None else number(scale * difference, digits))
        cells.append("" if p_value is None else f"{p_value:.2g}")
        rows.append([one.run or "before training", str(one.step), *cells])
    head = ["run", "step", *MODES.values(), "difference", "p"]
    return f"<h3>{escape(metric)}</h3>{table(head, rows)}"
