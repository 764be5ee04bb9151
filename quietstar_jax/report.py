"""Command line: `python -m quietstar_jax.report --checkpoint DIR --data FILE --output page.html`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from quietstar_jax.command_line import CommandParser, add_checkpoint_flags, add_flags, integer_from, path
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.reports.drawings import write_drawings
from quietstar_jax.reports.make import MOST_TOKENS, TextOptions, report_checkpoint, report_study
from quietstar_jax.reports.page import write_page


def main(arguments: list[str]) -> None:
    """Writes one page, then prints where it is."""
    with make_parser().parsed(arguments) as args:
        html = report_study(args.workdir) if args.workdir else _of_checkpoint(args)
    write_page(args.output, html)
    for figure in write_drawings(args.figures, html) if args.figures else ():
        print(figure)
    print(f"{args.output} ({len(html.encode()) / 2**20:.1f} MB)")


def _of_checkpoint(args: argparse.Namespace) -> str:
    if not args.data:
        raise ConfigError("--checkpoint needs --data: the text of the page, for example --data my_text.jsonl.")
    names = ("limit", "page_tokens", "sequence_length", "think", "thought_length", "tokens_ahead", "samples", "seed",
             "text_key", "text_documents")  # fmt: skip
    options = TextOptions(
        data=tuple(args.data), data_dir=str(args.data_dir or ""), **{name: getattr(args, name) for name in names}
    )
    return report_checkpoint(args.checkpoint, options, args.step, revision=args.revision, dtype=args.dtype)


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "report", "Writes one HTML page: of a checkpoint and its thoughts in a text, or of a study.",
        "--checkpoint runs/mine --data my_text.jsonl --output page.html",
    )  # fmt: skip
    subject = parser.add_mutually_exclusive_group(required=True)
    add_flags(subject, "--workdir")
    add_flags(parser, "--output", required=True)
    parser.add_argument(
        "--figures", type=path, metavar="FOLDER", help="folder for the charts of the page, as SVG files"
    )
    text = parser.add_argument_group("with --checkpoint")
    add_checkpoint_flags(text, subject)
    add_flags(text, "--data", nargs="+", action="extend", default=[])
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
    add_flags(text, "--samples", default=TextOptions.samples)
    add_flags(text, "--seed")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
