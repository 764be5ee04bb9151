"""Command line: `python -m quietstar_jax.train --config configs/quickstart.py [--config.seed=1 ...]`."""

from __future__ import annotations

from absl import app, flags, logging
from ml_collections import config_flags

from quietstar_jax.config import Config, from_config_dict
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.parallel.processes import is_first, stop_together
from quietstar_jax.training.loop import train
from quietstar_jax.training.summary import format_summary

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; any field may be overridden.")


flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Trains, then prints what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}. Settings are given as --config.NAME=VALUE.")
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
    with stop_together():
        summary = train(given_config())
    if is_first():
        print(format_summary(summary))


def given_config() -> Config:
    """The configuration of the command line.

    Raises:
      ConfigError: its file cannot be read, or a setting is impossible.
    """
    try:
        return from_config_dict(_CONFIG.value)
    except OSError as error:  # a file that cannot be loaded shows only when a setting of it is read
        raise ConfigError(f"--config cannot be read: {str(error).splitlines()[-1].strip()}. Check its path.") from error


def parse(arguments: list[str]) -> list[str]:
    """Parses the command line.

    Raises:
      ConfigError: a setting of the command line is unknown or of the wrong type.
    """
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        raise ConfigError(f"The command line cannot be used: {error}") from error
    except (AttributeError, KeyError, IndexError) as error:
        reason: Exception = error
        while reason.args and isinstance(reason.args[0], Exception):
            reason = reason.args[0]
        said = " ".join(str(part) for part in reason.args).replace("\n", " ")
        settings = [argument for argument in arguments if argument.startswith("--config.")]
        if isinstance(reason, IndexError):
            said = "a number in brackets is beyond the end of its list, as phases[1] is where there is one phase"
        raise ConfigError(
            f"A setting does not exist: {said} (given were {' '.join(settings) or 'none on the command line'}). "
            "Settings are given as --config.NAME=VALUE; quietstar_jax/config.py has all names."
        ) from error


if __name__ == "__main__":
    run_command(lambda: app.run(main, flags_parser=parse))
