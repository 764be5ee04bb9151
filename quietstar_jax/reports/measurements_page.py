"""The HTML page of measurements at several steps of training: each metric as curves, and all figures as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from quietstar_jax.evals.table import MODES
from quietstar_jax.reports.figures import padded
from quietstar_jax.reports.measurements import Measurement, Series, Value
from quietstar_jax.reports.page import figure, render, table
from quietstar_jax.reports.svg import Chart, number

TITLE = "Measurements at several steps"
PLOT, FRAME, LEGEND = 282, 58, 18  # pixels: height of the curves, of the axis, of a row of the legend
MOST_TICKS = 12


def measurements_page(found: Sequence[Series]) -> str:
    """Returns the page as HTML."""
    runs = sorted({one.run for series in found for one in series.measurements})
    colours = {run: f"run{number}" for number, run in enumerate(run for run in runs if run or len(runs) == 1)}
    body = [
        f"<h1>{TITLE}</h1>",
        '<p class="where">Intervals are 95 % intervals over questions, texts or windows, for one trained model; they '
        "do not include the variation between training runs. p is for the difference between with and without thoughts "
        "on the same items.</p>",
    ]
    for series in found:
        metrics = list(dict.fromkeys(name for one in series.measurements for name in one.values))
        body += [
            f"<h2>{escape(series.task)}</h2>",
            f'<p class="where">{escape(series.about)}</p>',
            f'<div class="charts">{"".join(_chart(series, metric, colours) for metric in metrics)}</div>',
            *(_table(series, metric) for metric in metrics),
        ]
    return render(TITLE, "\n".join(body))


def _shown(value: Value | None, metric: str, sign: str = "") -> str:
    """Returns a value with its interval, as texts of a table."""
    if value is None:
        return ""
    scale, digits = _scale(metric)
    mean, *ends = (number(scale * x, digits) for x in (value.value, *(value.interval or ())))
    plus = sign if value.value > 0 else ""
    return f"{plus}{mean}" + (f" ({' .. '.join(ends)})" if ends else "")


def _scale(metric: str) -> tuple[int, int]:
    """Returns the factor and the decimals with which a metric is shown."""
    return (100, 2) if metric.endswith("%") else (1, 4)


def _lines(series: Series, metric: str, runs: Sequence[str]) -> dict[tuple[str, str], list[tuple[Measurement, str]]]:
    """Returns the points (measurement, its mode) of each run and mode, those with a finite value.

    The model from which the runs started is their first point; its values are those without thoughts if it has none.
    """
    finite = [
        (one, modes)
        for one in series.measurements
        if (modes := [mode for mode, value in one.values.get(metric, {}).items() if math.isfinite(value.value)])
    ]
    found = {}
    for run in runs:
        for mode in MODES:
            points = [(one, mode) for one, modes in finite if one.run == run and mode in modes]
            start = [
                (one, known)
                for one, modes in finite
                if run and not one.run and (known := mode if mode in modes else "without_thoughts") in modes
            ]
            if points:
                found[run, mode] = [*(start if points[0][0].step > 0 else ()), *points]
    return found


def _chart(series: Series, metric: str, colours: dict[str, str]) -> str:
    scale, _ = _scale(metric)
    lines = {
        line: [(one.step, scale * one.values[metric][mode].value, one, mode) for one, mode in points]
        for line, points in _lines(series, metric, list(colours)).items()
    }
    if not lines:
        return ""
    steps = sorted({step for points in lines.values() for step, *_ in points})
    values = [y for points in lines.values() for _, y, *_ in points]
    low, high = padded(min(values), max(values))
    legend = LEGEND * len(lines)
    top = high + (high - low) * legend / PLOT
    label = f"{series.task}, {metric.removesuffix(', %')}, by step"
    chart = Chart(label, (steps[0], steps[-1]), (low, top), width=520, height=PLOT + FRAME + legend).y_axis(metric)
    for row, ((run, mode), points) in enumerate(lines.items()):
        kind = f"smooth {'dashed ' if mode == 'without_thoughts' else ''}{colours[run]}"
        name = ", ".join(filter(None, [run, MODES[mode]]))
        chart.line([(step, y) for step, y, *_ in points], kind, name)
        for step, y, one, shown in points:  # a line through one point is invisible
            tip = f"{name}, step {step:,}: {_shown(one.values[metric][shown], metric)}"
            chart.dot(step, y, kind if len(points) == 1 else "hidden", tip)
        height = top - (row + 0.5) * (top - high) / len(lines)
        chart.legend(height, kind, name)
    ticks: list[tuple[float, str]] = []
    for step in steps:
        if not ticks or step - ticks[-1][0] >= (steps[-1] - steps[0]) / MOST_TICKS:
            ticks.append((step, f"{step:,}"))
    return figure(metric, chart.x_axis("step", ticks).svg(), "")


def _table(series: Series, metric: str) -> str:
    rows = []
    for one in series.measurements:
        difference = one.differences.get(metric)
        p_value = None if difference is None else difference.p_value
        rows.append([
            one.name, f"{one.step:,}",
            *(_shown(one.values.get(metric, {}).get(mode), metric) for mode in MODES),
            _shown(difference, metric, "+"), "" if p_value is None else f"{p_value:.2g}",
        ])  # fmt: skip
    return f"<h3>{escape(metric)}</h3>{table(['model', 'step', *MODES.values(), 'difference', 'p'], rows)}"
