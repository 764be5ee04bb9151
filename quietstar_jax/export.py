"""Command line: `python -m quietstar_jax.export --checkpoint runs/mine --output exported --format quietstar`."""

from __future__ import annotations

import sys

import jax

from quietstar_jax.command_line import CommandParser, add_checkpoint_flags, add_flags
from quietstar_jax.errors import run_command
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import FORMATS, ExportOptions
from quietstar_jax.io import place


def main(arguments: list[str]) -> None:
    """Exports a run, then prints where it is."""
    with make_parser().parsed(arguments) as args:
        options = ExportOptions(args.format, args.dtype, args.max_shard_size, args.think)
        run = export(place(args.checkpoint, "--checkpoint"), args.output, options, args.step)
    print(f"Step {run.step} of {run.workdir} is in {args.output} ({args.format}, {args.dtype}).")


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "export", "Writes a checkpoint of a run as a Hugging Face folder, which transformers loads by itself.",
        "--checkpoint runs/mine --output exported --format quietstar --dtype bfloat16",
    )  # fmt: skip
    add_checkpoint_flags(parser, hub=False)
    add_flags(parser, "--output", required=True)
    parser.add_argument(
        "--format", choices=FORMATS, required=True, metavar="FORMAT",
        help="quietstar (with thoughts), base (the decoder alone), or adapter (for peft, if adapters were trained)",
    )  # fmt: skip
    add_flags(parser, "--think", default="")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of one file of weights (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators to other processes
    run_command(lambda: main(sys.argv[1:]))
