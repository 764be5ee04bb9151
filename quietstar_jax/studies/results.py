"""Collects the results of a study from its folders, and writes them for programs and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quietstar_jax.errors import DataError
from quietstar_jax.io import write_json
from quietstar_jax.studies.runner import PlannedRun
from quietstar_jax.studies.study import Study
from quietstar_jax.studies.table import compare, format_table

RESULTS, TABLE = "study.json", "table.md"


def collect(study: Study, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Returns all finished runs and their comparison, as JSON values.

    Keys: `study` (its fields), `runs` (one entry per finished run: `variant`, `seed`, `workdir`, `config_hash` of the
    configuration that the figures come from, `begun_from` the run whose first phases it reused or None, `figures` all
    numbers of its summary), `missing` (`variant`, `seed` of the others) and `rows` (see `table.compare`).
    """
    finished, missing = [], []
    results: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in study.variants}
    for run in runs:
        summary = run.summary
        if summary is None:
            missing.append({"variant": run.variant, "seed": run.seed})
            continue
        figures = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        results[run.variant][run.seed] = figures
        begun = run.workdir / "begun_from.json"
        finished.append(
            {
                "variant": run.variant,
                "seed": run.seed,
                "workdir": str(run.workdir),
                "config_hash": summary["config_hash"],
                "begun_from": json.loads(begun.read_text("utf-8")) if begun.exists() else None,
                "figures": figures,
            }
        )
    rows = compare(results, study.baseline, study.metrics)
    return {"study": dataclasses.asdict(study), "runs": finished, "missing": missing, "rows": rows}


def write_results(root: Path, results: dict[str, Any]) -> str:
    """Writes `study.json` and `table.md`; returns the table."""
    study = results["study"]
    table = format_table(results["rows"], study["metrics"], study["baseline"])
    write_json(root / RESULTS, results)
    hashes = (f"{run['variant']}/seed_{run['seed']} {run['config_hash'][:12]}" for run in results["runs"])
    table += "\n\nConfigurations (config_hash): " + (", ".join(hashes) or "none yet") + "."
    (root / TABLE).write_text(table + "\n", encoding="utf-8")
    return table


def read_results(root: Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
      DataError: the file is missing, or does not contain the results of a study.
    """
    try:
        results: dict[str, Any] = json.loads((root / RESULTS).read_text("utf-8"))
        if not {"study", "runs", "rows"} <= results.keys():
            raise ValueError("it has no runs")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{root / RESULTS} does not contain the results of a study: {error}. Give the work directory of `python -m "
            "quietstar_jax.study`; running that command again writes this file."
        ) from error
    return results
