"""Command line of the evaluation harness, with `--model quietstar`: `python -m quietstar_jax.lm_eval --tasks ...`.

The harness finds the model by itself (`lm_eval --model quietstar`) once it reads the entry points of installed
packages; its releases up to 0.4.13 do not. Until then, this module registers the model and runs the same command line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from quietstar_jax.errors import ConfigError, DataError, run_command


def main(arguments: Sequence[str]) -> None:
    """Registers the model and calls the harness, which parses the arguments."""
    if find_spec("lm_eval") is None:
        raise ConfigError("The evaluation harness is missing: pip install 'quietstar_jax[eval]'.")
    if not {"-h", "--help"} & {*arguments}:  # help is for all models alike, and these take seconds to import
        import quietstar_jax.evals.harness  # noqa: F401  registers ours
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = arguments  # where the harness reads them
    try:
        cli_evaluate()
    except ConnectionError as error:
        raise DataError(
            f"The harness cannot download the data of a task: {error}. Without a network, use tasks whose data are in "
            "the cache of `datasets`, or in files (--include_path)."
        ) from error


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
