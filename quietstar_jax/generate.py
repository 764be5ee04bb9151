"""Command line: `python -m quietstar_jax.generate --checkpoint runs/mine --prompt "2 + 2 ="`; and `Generator`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from quietstar_jax.command_line import BATCH_SIZE, CommandParser, add_checkpoint_flags, add_flags, prompts_of
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.methods.thinking import choose_policy

if TYPE_CHECKING:
    from quietstar_jax.inference.batch import Generation as Generation
    from quietstar_jax.inference.batch import GenerationConfig
    from quietstar_jax.inference.batch import Token as Token
    from quietstar_jax.inference.generator import Generator as Generator

THOUGHTS = {"auto": None, "on": True, "off": False}


def __getattr__(name: str) -> Any:
    """The Python API, which this module has beside the command: `Generator`, `Generation` and `Token`."""
    if name in ("Generator", "Generation", "Token"):
        from quietstar_jax.inference import batch, generator

        return getattr(generator if name == "Generator" else batch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(arguments: list[str]) -> None:
    """Generates to the terminal, or from file to file."""
    with make_parser().parsed(arguments) as args:
        if (args.data is None) != (args.output is None):
            raise ConfigError("--data and --output must be given together: the prompts, and the file for their texts.")
        if (args.data is None) == (not args.prompt):
            raise ConfigError("Give --prompt, or --data and --output.")
        if args.thoughts not in THOUGHTS:
            hint = " To print thoughts, add --show-thoughts." if args.thoughts == "show" else ""
            raise ConfigError(f"--thoughts is {args.thoughts!r}; allowed: {', '.join(THOUGHTS)}.{hint}")
        choose_policy(THOUGHTS[args.thoughts], args.think)  # before anything is loaded
        from quietstar_jax.inference.batch_files import generate_file
        from quietstar_jax.inference.generator import TOKENS_PER_CALL, Generator

        generator = Generator.open(
            args.checkpoint, step=args.step, revision=args.revision, dtype=args.dtype,
            batch_size=args.batch_size or (1 if args.prompt else BATCH_SIZE), max_length=args.max_length,
        )  # fmt: skip
        job = generator.job(
            1 if args.prompt else TOKENS_PER_CALL, args.max_tokens, THOUGHTS[args.thoughts], args.thought_length,
            args.temperature, args.top_p, args.thought_temperature,
            [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in args.stop], args.think,
            args.reach or None,
        )  # fmt: skip
        if args.data is None:
            _to_terminal(generator, prompts_of(args), job, args.seed, args.show_thoughts)
            return
        rows = generate_file(
            generator, args.data, args.output, job, seed=args.seed, show_thoughts=args.show_thoughts,
            quiet=args.quiet,
        )  # fmt: skip
    print(f"{rows} texts are in {args.output}.")


def _to_terminal(generator: Generator, prompts: list[str], job: GenerationConfig, seed: int, show: bool) -> None:
    from quietstar_jax.inference.terminal import print_tokens

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for prompt, request in zip(prompts, generator.requests(prompts, job, seed), strict=True):
        print(prompt, end="", flush=True)
        tokens = (token for _, token in generator.run([request], job))
        try:
            print_tokens(tokens, sys.stdout, show_thoughts=show, colour=colour)
        finally:  # also after Ctrl-C, which ends the output early
            print()


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "generate",
        "--checkpoint runs/mine --prompt '2 + 2 =' --show-thoughts",
    )  # fmt: skip
    add = parser.add_argument
    add_checkpoint_flags(parser)
    add_flags(parser, "--prompt", "--data", "--output", "--thoughts", "--think")
    add(
        "--show-thoughts",
        action="store_true",
        help="print or write the thought before each token, with its mixing weight",
    )
    add_flags(parser, "--thought-length", "--reach")
    add_flags(parser, "--max-tokens", default=128)
    add_flags(parser, "--max-length")
    add_flags(parser, "--temperature", default=0.0)
    add(
        "--top-p", type=float, default=1.0, metavar="X",
        help="sample from the most likely tokens whose probabilities sum to this (default: %(default)s)",
    )  # fmt: skip
    add(
        "--thought-temperature", type=float, default=0.0, metavar="X",
        help="sampling temperature of the thoughts (default: %(default)s)",
    )  # fmt: skip
    add(
        "--stop", action="append", default=[], metavar="TEXT",
        help=r"text that ends the output, with \n for a line break; may be repeated",
    )  # fmt: skip
    add_flags(parser, "--seed", "--batch-size", "--quiet")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
