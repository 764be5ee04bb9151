"""Command line: `python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import app, flags

from quietstar_jax.errors import UserError, run_command
from quietstar_jax.studies.study import load_study, run_study
from quietstar_jax.studies.table import compare, format_table
from quietstar_jax.training.metrics import write_json

_STUDY = flags.DEFINE_string("study", None, "A Python file with a function get_study().", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where its runs and its table go.", required=True)
_SEEDS = flags.DEFINE_list("seeds", None, "Other seeds than the study's.")
_ONLY = flags.DEFINE_list("only", None, "Only these variants, and the baseline.")


def main(argv: list[str]) -> int:
    """Runs what is missing, then writes `study.json` and `table.md` and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
    study = load_study(_STUDY.value)
    if _SEEDS.value:
        study = dataclasses.replace(study, seeds=tuple(int(seed) for seed in _SEEDS.value))
    if _ONLY.value:
        unknown = sorted(set(_ONLY.value) - set(study.variants))
        if unknown:
            raise UserError(f"--only names unknown variants {unknown}; there are {', '.join(study.variants)}.")
        kept = {name: changes for name, changes in study.variants.items() if name in (*_ONLY.value, study.baseline)}
        study = dataclasses.replace(study, variants=kept)
    root = Path(_WORKDIR.value).expanduser()
    results = run_study(study, root, lambda line: print(line, flush=True))
    rows = compare(results, study.baseline, study.metrics)
    write_json(root / "study.json", {"study": dataclasses.asdict(study), "rows": rows})
    table = format_table(rows, study.metrics)
    (root / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return 0 if all(len(runs) == len(study.seeds) for runs in results.values()) else 1


if __name__ == "__main__":
    run_command(lambda: app.run(main))
