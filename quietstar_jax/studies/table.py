"""Mean, standard error and a paired test for every variant of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # variant -> seed -> summary


def compare(results: Results, baseline: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row per variant and metric.

    Keys: `variant`, `metric`, `runs`, `mean`, `standard_error`, `difference` from the baseline (mean over the seeds
    that both have) and `p_value` of a paired two-sided t-test of it; None where there are too few runs.
    """
    rows = []
    for variant, runs in results.items():
        for metric in metrics:
            values = {seed: float(run[metric]) for seed, run in runs.items() if metric in run}
            if not values:
                continue
            sample = np.array(list(values.values()))
            own = {seed: float(run[metric]) for seed, run in results[baseline].items() if metric in run}
            pairs = np.array([(values[seed], own[seed]) for seed in values if seed in own]).reshape(-1, 2)
            compared = variant != baseline and len(pairs) > 0
            rows.append(
                {
                    "variant": variant,
                    "metric": metric,
                    "runs": len(sample),
                    "mean": float(sample.mean()),
                    "standard_error": float(stats.sem(sample)) if len(sample) > 1 else None,
                    "difference": float((pairs[:, 0] - pairs[:, 1]).mean()) if compared else None,
                    "p_value": _paired_p_value(pairs) if compared else None,
                }
            )
    return rows


def _paired_p_value(pairs: np.ndarray) -> float | None:
    difference = pairs[:, 0] - pairs[:, 1]
    if len(difference) < 2:
        return None
    if not difference.any():
        return 1.0
    p = float(stats.ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue)
    return p if math.isfinite(p) else None


def format_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Markdown: variants down, metrics across; `mean ± standard error (p)` against the baseline."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["| variant | runs | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for variant in variants:
        own = [cells.get((variant, metric)) for metric in metrics]
        runs = max(row["runs"] for row in own if row)
        lines.append(f"| {variant} | {runs} | " + " | ".join(map(_cell, own)) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['mean']:.4f}"
    if row["standard_error"] is not None:
        text += f" ± {row['standard_error']:.4f}"
    if row["p_value"] is not None:
        text += f" (p {row['p_value']:.2g})"
    return text
