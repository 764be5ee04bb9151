"""Command line: `python -m quietstar_jax.report --checkpoint DIR --data FILE --output page.html`, or `--study DIR`."""

from __future__ import annotations

import sys

from quietstar_jax.command_line import CommandParser, integer, integer_from, path
from quietstar_jax.config import TEXT_DOCUMENTS
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.reports.drawings import write_drawings
from quietstar_jax.reports.make import MOST_TOKENS, TextOptions, report_checkpoint, report_study
from quietstar_jax.reports.page import write_page


def main(arguments: list[str]) -> None:
    """Writes one page, then prints where it is."""
    parser = CommandParser(prog="python -m quietstar_jax.report", description="One page to look at.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="a run's workdir, a Hugging Face folder or hub id")
    what.add_argument("--study", type=path, help="the workdir of python -m quietstar_jax.study")
    parser.add_argument("--output", type=path, required=True, help="the page to be written")
    parser.add_argument("--figures", type=path, help="a folder for the charts of the page, as SVG files")
    text = parser.add_argument_group("with --checkpoint")
    text.add_argument("--data", nargs="+", default=[], help="any sources as in data.train")
    text.add_argument("--step", type=integer_from(0), help="of the checkpoint; the newest unless told otherwise")
    text.add_argument("--documents", type=integer, default=20, help="how many, from the first (%(default)s)")
    text.add_argument("--max-tokens", type=integer, default=4000, help=f"of all, up to {MOST_TOKENS} (%(default)s)")
    text.add_argument(
        "--sequence-length", type=integer, default=256, help="tokens the model reads at a time (%(default)s)"
    )
    text.add_argument("--thought-length", type=integer, help="tokens of a thought; as trained unless told otherwise")
    text.add_argument(
        "--tokens-ahead", type=integer, help="tokens that a reward is computed over; default: as in training"
    )
    text.add_argument("--samples", type=integer, default=3, help="thoughts drawn beside the greedy one (%(default)s)")
    text.add_argument("--seed", type=integer, default=0, help="of these draws (%(default)s)")
    text.add_argument("--text-key", default="text", help="field of a line or row that holds the text (%(default)s)")
    text.add_argument("--text-documents", choices=TEXT_DOCUMENTS, default="file", help="of a text file (%(default)s)")
    text.add_argument("--data-dir", default="", help="where tensorflow-datasets keeps what it prepared")
    given = parser.parse_args(arguments)
    if given.study:
        html = report_study(given.study)
    elif not given.data:
        raise ConfigError("--checkpoint wants --data: the text to look at, for example --data my_text.jsonl.")
    else:
        names = ("documents", "max_tokens", "sequence_length", "thought_length", "tokens_ahead", "samples", "seed",
                 "text_key", "text_documents", "data_dir")  # fmt: skip
        options = TextOptions(data=tuple(given.data), **{name: getattr(given, name) for name in names})
        html = report_checkpoint(given.checkpoint, options, given.step)
    write_page(given.output, html)
    for figure in write_drawings(given.figures, html) if given.figures else ():
        print(figure)
    print(f"{given.output} ({len(html.encode()) / 2**20:.1f} MB)")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
