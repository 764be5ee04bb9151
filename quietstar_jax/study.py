"""Command line: `python -m quietstar_jax.study --study configs/studies/controls.py --workdir runs/controls`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from quietstar_jax.command_line import CommandParser, add_flags, integer_from
from quietstar_jax.errors import UserError, run_command


def main(arguments: Sequence[str]) -> int:
    """Executes the missing runs, updates `study.json` and `table.md` after each, and prints the table."""
    args = make_parser().parse_args(arguments)
    from quietstar_jax.studies.results import collect, write_results
    from quietstar_jax.studies.runner import plan, run_study
    from quietstar_jax.studies.study import load_study

    study = load_study(args.study)
    seeds = args.seeds or study.seeds
    variants = args.variants or list(study.variants)
    unknown = sorted(set(variants) - set(study.variants))
    if unknown:
        raise UserError(f"--variants names unknown variants {unknown}; there are {', '.join(study.variants)}.")
    study = dataclasses.replace(study, seeds=tuple(dict.fromkeys((*study.seeds, *seeds))))
    root = args.workdir
    runs = plan(study, root)
    selected = [run for run in runs if run.variant in variants and run.seed in seeds]
    root.mkdir(parents=True, exist_ok=True)
    for _ in run_study(runs, selected.__contains__, lambda line: print(line, flush=True)):
        write_results(root, collect(study, runs))
    print(write_results(root, collect(study, runs)))
    return 0 if all(run.summary is not None for run in selected) else 1


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "study",
        "--study configs/studies/controls.py --workdir runs/controls --seeds 0,1",
    )  # fmt: skip
    add = parser.add_argument
    add("--study", required=True, metavar="FILE", help="Python file with get_study(), or a shipped name: controls ...")
    add_flags(parser, "--workdir", required=True)
    add("--seeds", type=_seeds, metavar="N,N", help="run only these seeds; seeds that the study lacks are added to it")
    add("--variants", type=lambda text: text.split(","), metavar="NAME,NAME", help="run only these variants")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(map(integer_from(0), text.split(",")))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
