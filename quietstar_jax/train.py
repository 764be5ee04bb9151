"""Command line: `python -m quietstar_jax.train --config configs/quickstart.py [--config.seed=1 ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import logging

from quietstar_jax.command_line import CommandParser, parse_with_config
from quietstar_jax.errors import run_command
from quietstar_jax.parallel.processes import is_primary, stop_together
from quietstar_jax.training.loop import train
from quietstar_jax.training.summary import format_summary


def main(arguments: Sequence[str]) -> None:
    """Trains, then prints the summary."""
    parser = CommandParser(prog="python -m quietstar_jax.train", description=__doc__)
    _, config = parse_with_config(parser, arguments)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # orbax reports every file that it writes
    with stop_together():
        summary = train(config)
    if is_primary():
        print(format_summary(summary))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
