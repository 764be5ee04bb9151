"""Command line: `python -m quietstar_jax.report --checkpoint DIR --data FILE --output page.html`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from quietstar_jax.command_line import (
    CommandParser,
    add_checkpoint_flags,
    add_flags,
    integer_from,
    path,
    path_or_url,
    prompts_of,
)
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.reports.options import MOST_TOKENS, TextOptions

if TYPE_CHECKING:
    from quietstar_jax.reports.make import CheckpointReport


def main(arguments: list[str]) -> None:
    """Writes one page, then prints where it is."""
    parser = make_parser()
    with parser.parsed(arguments) as args:
        _check_groups(parser, args)
        from quietstar_jax.reports.drawings import write_drawings
        from quietstar_jax.reports.page import write_page

        observed = None
        if args.follow:
            html = _of_runs(args)
        elif args.workdir:
            from quietstar_jax.reports.make import report_study

            html = report_study(args.workdir)
        elif args.results:
            from quietstar_jax.reports.measurements import read_measurements
            from quietstar_jax.reports.measurements_page import measurements_page

            html = measurements_page(read_measurements(args.results))
        else:
            observed, html = _of_checkpoint(args)
    write_page(args.output, html)
    for figure in write_drawings(args.figures, html) if args.figures else ():
        print(figure)
    if observed and args.picture:
        from quietstar_jax.reports.picture import write_pictures

        print(*write_pictures(args.picture, observed), sep="\n")
    print(f"{args.output} ({len(html.encode()) / 2**20:.1f} MB)")


def _check_groups(parser: CommandParser, args: argparse.Namespace) -> None:
    """Raises ConfigError if a flag of a group "with --FLAG" is given without that flag."""
    for group in parser._action_groups:
        flag = (group.title or "").removeprefix("with ")
        if flag == group.title or getattr(args, flag.removeprefix("--")):
            continue
        for action in group._group_actions:
            if getattr(args, action.dest) != action.default:
                raise ConfigError(f"{action.option_strings[-1]} needs {flag}.")


def _of_runs(args: argparse.Namespace) -> str:
    from quietstar_jax.reports.follow import follow
    from quietstar_jax.reports.page import write_page

    def write(html: str) -> None:
        if next(begins, False):
            print(f"Writing {args.output} every {args.every} s until the runs have ended, or Ctrl-C.", flush=True)
        write_page(args.output, html)

    begins = iter([True])
    return follow(args.follow, write, args.every)


def _of_checkpoint(args: argparse.Namespace) -> CheckpointReport:
    names = ("limit", "page_tokens", "sequence_length", "think", "thought_length", "tokens_ahead", "reach", "samples",
             "seed", "text_key", "text_documents")  # fmt: skip
    from quietstar_jax.reports.make import report_checkpoint

    options = TextOptions(
        data=tuple(args.data), data_dir=str(args.data_dir or ""),
        prompt=tuple(args.prompt if args.data else prompts_of(args)),  # standard input is not read before an error
        **{name: getattr(args, name) for name in names},
    )  # fmt: skip
    return report_checkpoint(
        args.checkpoint, options, args.step, revision=args.revision, dtype=args.dtype, against=args.against,
        against_step=args.against_step,
    )  # fmt: skip


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "report",
        "--checkpoint runs/mine --data my_text.jsonl --output page.html",
    )  # fmt: skip
    subject = parser.add_mutually_exclusive_group(required=True)
    add_flags(subject, "--workdir")
    subject.add_argument(
        "--follow", type=path_or_url, nargs="+", metavar="FOLDER",
        help="work directories of runs: a page of their curves and newest thoughts, written again while they train",
    )  # fmt: skip
    subject.add_argument(
        "--results", type=path, nargs="+", metavar="FILE",
        help="files that evaluate --output wrote at several steps of runs: a page of curves and tables",
    )  # fmt: skip
    add_flags(parser, "--output", required=True)
    add_flags(parser, "--figures")
    text = parser.add_argument_group("with --checkpoint")
    add_checkpoint_flags(text, subject)
    add_flags(text, "--against")
    text.add_argument(
        "--against-step", type=integer_from(0), metavar="N",
        help="step of --against; without --against, another step of the same run",
    )  # fmt: skip
    add_flags(text, "--data", nargs="+", action="extend", default=[])
    add_flags(text, "--prompt")
    add_flags(text, "--text-key", "--text-documents", "--data-dir")
    add_flags(text, "--limit", default=TextOptions.limit)
    number: dict[str, Any] = {"type": integer_from(1), "metavar": "N"}
    text.add_argument(
        "--page-tokens", **number, default=TextOptions.page_tokens,
        help=f"most tokens on the page, up to {MOST_TOKENS} (default: %(default)s)",
    )  # fmt: skip
    text.add_argument(
        "--sequence-length", **number, default=TextOptions.sequence_length,
        help="tokens that the model reads together (default: %(default)s)",
    )  # fmt: skip
    add_flags(text, "--think", "--thought-length")
    text.add_argument(
        "--tokens-ahead", **number, help="tokens over which a reward is computed (default: as in training)"
    )
    add_flags(text, "--reach")
    add_flags(text, "--samples", default=TextOptions.samples)
    add_flags(text, "--seed")
    text.add_argument(
        "--picture", type=path, metavar="NAME.svg",
        help="also draw the thought that helped most: NAME_light.svg and NAME_dark.svg",
    )  # fmt: skip
    followed = parser.add_argument_group("with --follow")
    followed.add_argument(
        "--every", **number, default=10, help="seconds between two pages (default: %(default)s)"
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
