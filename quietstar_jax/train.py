"""Command line: `python -m quietstar_jax.train --config configs/quickstart.py [--config.seed=1 ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quietstar_jax.command_line import CommandParser, add_config_flags, parse_with_config
from quietstar_jax.errors import run_command


def main(arguments: Sequence[str]) -> None:
    """Trains, then prints the summary and the commands that use the model."""
    _, config = parse_with_config(make_parser(), arguments)
    from absl import logging

    from quietstar_jax.parallel.processes import is_primary, stop_together
    from quietstar_jax.training.loop import train
    from quietstar_jax.training.messages import next_lines
    from quietstar_jax.training.summary import format_summary

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # orbax reports every file that it writes
    with stop_together():
        summary = train(config)
    if is_primary():
        print(format_summary(summary), *next_lines(config, summary), sep="\n")


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "train",
        "--config configs/quickstart.py --config.workdir=runs/mine --config.seed=1",
    )  # fmt: skip
    add_config_flags(parser)
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
