"""Mean, standard error and a paired test for every variant of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # variant -> seed -> summary


def compare(results: Results, baseline: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row per variant and metric.

    Keys: `variant`, `metric`, `runs`, `mean`, `standard_error`; and against the baseline, over the `pairs` of runs with
    the same seed: `difference` (mean), `low` and `high` (its 95 % confidence interval by Student's t), and `p_value` of
    a paired two-sided t-test. They are None if there are too few runs; the last three also if all pairs differ by the
    same amount, which leaves no variance to test against (without any difference, p is 1).
    """
    rows = []
    for variant, runs in results.items():
        for metric in metrics:
            values = {seed: float(run[metric]) for seed, run in runs.items() if metric in run}
            if not values:
                continue
            sample = np.array(list(values.values()))
            baseline_values = {seed: float(run[metric]) for seed, run in results[baseline].items() if metric in run}
            differences = np.array(
                [
                    values[seed] - baseline_values[seed]
                    for seed in values
                    if seed in baseline_values and variant != baseline
                ]
            )
            rows.append(
                {
                    "variant": variant,
                    "metric": metric,
                    "runs": len(sample),
                    "mean": float(sample.mean()),
                    "standard_error": float(stats.sem(sample)) if len(sample) > 1 else None,
                    **paired_test(differences),
                }
            )
    return rows


def paired_test(differences: np.ndarray) -> dict[str, Any]:
    """Returns the fields of `compare` that describe pairs, from one difference per pair."""
    pairs = len(differences)
    result: dict[str, Any] = {"pairs": pairs, "difference": float(differences.mean()) if pairs else None}
    result |= dict.fromkeys(("low", "high", "p_value"))
    if pairs < 2:
        return result
    if not differences.any():
        return result | {"p_value": 1.0}
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return result
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return result | {"low": float(low), "high": float(high), "p_value": float(test.pvalue)}


def format_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], baseline: str) -> str:
    """Formats a Markdown table: one row per variant, one column per metric, `mean ± standard error (p)` of each."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = ["| variant | n | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for variant in variants:
        line = [cells.get((variant, metric)) for metric in metrics]
        runs = max(row["runs"] for row in line if row)
        lines.append(f"| {variant} | {runs} | " + " | ".join(map(_cell, line)) + " |")
    lines += [
        "",
        f"Mean ± standard error over n seeds. p: paired two-sided t-test against `{baseline}` over the seeds that both "
        "have (their number is given where it is not n), not corrected for the number of comparisons.",
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['mean']:.4f}"
    if row["standard_error"] is not None:
        text += f" ± {row['standard_error']:.4f}"
    if row["p_value"] is not None:
        over = f", {row['pairs']} pairs" if row["pairs"] != row["runs"] else ""
        text += f" (p {row['p_value']:.2g}{over})"
    return text
