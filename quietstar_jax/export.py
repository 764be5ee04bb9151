"""Command line: `python -m quietstar_jax.export --checkpoint runs/mine --output exported --format quietstar`."""

from __future__ import annotations

import sys

import jax

from quietstar_jax.command_line import CommandParser, integer_from, path, path_or_url
from quietstar_jax.errors import run_command
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import DTYPES, FORMATS, ExportOptions


def main(arguments: list[str]) -> None:
    """Exports a run, then prints where it is."""
    parser = CommandParser(prog="python -m quietstar_jax.export", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=path_or_url, required=True, help="a run's workdir, or its checkpoints folder"
    )
    parser.add_argument("--output", type=path, required=True, help="folder to be made")
    parser.add_argument("--format", choices=FORMATS, required=True, help="with thoughts, or the plain decoder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights")
    parser.add_argument("--step", type=integer_from(0), help="of the checkpoint; the newest unless told otherwise")
    given = parser.parse_args(arguments)
    options = ExportOptions(given.format, given.dtype, given.max_shard_size)
    run = export(given.checkpoint, given.output, options, given.step)
    print(f"Step {run.step} of {run.workdir} is in {given.output} ({given.format}, {given.dtype}).")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave accelerators to other processes
    run_command(lambda: main(sys.argv[1:]))
