"""Command line: `python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import app, flags

from quietstar_jax.errors import UserError, run_command
from quietstar_jax.studies.results import collect, write_results
from quietstar_jax.studies.runner import plan, run_study
from quietstar_jax.studies.study import load_study

_STUDY = flags.DEFINE_string("study", None, "A Python file with a function get_study().", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where its runs and its table go.", required=True)
_SEEDS = flags.DEFINE_list("seeds", None, "Run only these seeds; others than the study's join it.")
_VARIANTS = flags.DEFINE_list("variants", None, "Run only these variants.")


def main(argv: list[str]) -> int:
    """Runs what is missing; after each run `study.json` and `table.md` hold all that has finished. Prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}.")
    study = load_study(_STUDY.value)
    seeds = _seeds(_SEEDS.value) if _SEEDS.value else study.seeds
    variants = _VARIANTS.value or list(study.variants)
    unknown = sorted(set(variants) - set(study.variants))
    if unknown:
        raise UserError(f"--variants names unknown variants {unknown}; there are {', '.join(study.variants)}.")
    study = dataclasses.replace(study, seeds=tuple(dict.fromkeys((*study.seeds, *seeds))))
    root = Path(_WORKDIR.value).expanduser()
    runs = plan(study, root)
    wanted = [run for run in runs if run.variant in variants and run.seed in seeds]
    for _ in run_study(runs, wanted.__contains__, lambda line: print(line, flush=True)):
        write_results(root, collect(study, runs))
    root.mkdir(parents=True, exist_ok=True)
    print(write_results(root, collect(study, runs)))
    return 0 if all(run.summary is not None for run in wanted) else 1


def _seeds(words: list[str]) -> tuple[int, ...]:
    if not all(word.isdigit() for word in words):
        raise UserError(f"--seeds takes whole numbers of 0 or more, for example --seeds=0,1; got {','.join(words)}.")
    return tuple(int(word) for word in words)


if __name__ == "__main__":
    run_command(lambda: app.run(main))
