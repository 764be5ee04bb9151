"""Command line: `python -m quietstar_jax.export --checkpoint runs/mine --output exported --format quietstar`."""

from __future__ import annotations

import sys

from quietstar_jax.command_line import CommandParser, add_checkpoint_flags, add_flags, path
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.export_hf.options import FORMATS, ExportOptions
from quietstar_jax.export_hf.push import hub_token, push, repository_id
from quietstar_jax.io import place


def main(arguments: list[str]) -> None:
    """Exports a run, sends it to the hub if requested, and prints where it is."""
    with make_parser().parsed(arguments) as args:
        options = ExportOptions(args.format, args.dtype, args.max_shard_size, args.think, args.picture, args.reach)
        if args.public and not args.push:
            raise ConfigError("--public needs --push OWNER/NAME, the repository that becomes public.")
        token = hub_token() if args.push else ""  # before the work that would be in vain
        import jax

        from quietstar_jax.export_hf.export_run import export

        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators to other processes
        run = export(place(args.checkpoint, "--checkpoint"), args.output, options, args.step)
        print(f"Step {run.step} of {run.workdir} is in {args.output} ({args.format}, {args.dtype}).", flush=True)
        if args.push:
            address = push(args.output, args.push, token, public=args.public)
            print(f"It is at {address} ({'public' if args.public else 'private'}).")


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "export",
        "--checkpoint runs/mine --output exported --format quietstar --dtype bfloat16",
    )  # fmt: skip
    add_checkpoint_flags(parser, hub=False)
    add_flags(parser, "--output", required=True)
    parser.add_argument(
        "--format", choices=FORMATS, required=True, metavar="FORMAT",
        help="quietstar (with thoughts), base (the decoder alone), or adapter (for peft, if adapters were trained)",
    )  # fmt: skip
    add_flags(parser, "--think", default="")
    add_flags(parser, "--reach")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="size of one file of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--card-picture", type=path, dest="picture", metavar="FILE",
        help="SVG or PNG for the model card, as from report --picture",
    )  # fmt: skip
    parser.add_argument(
        "--push", type=repository_id, metavar="OWNER/NAME",
        help="then send the folder to this repository of the hub; private if it is new. The same command resumes",
    )  # fmt: skip
    parser.add_argument("--public", action="store_true", help="make the repository of --push public")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
