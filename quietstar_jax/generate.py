"""Command line: `python -m quietstar_jax.generate --checkpoint runs/mine --prompt "2 + 2 ="`; and `Generator`."""

from __future__ import annotations

import os
import sys

from quietstar_jax.command_line import MOST_AT_ONCE, CommandParser, integer, integer_from, path
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.inference.batch import Generation, GenerationConfig, Token
from quietstar_jax.inference.batch_files import generate_file
from quietstar_jax.inference.generator import TOKENS_PER_CALL, Generator
from quietstar_jax.inference.terminal import print_tokens

__all__ = ["Generation", "Generator", "Token"]

FILE_BATCH = 8


def main(arguments: list[str]) -> None:
    """Generates to the terminal, or from file to file."""
    given = _parser().parse_args(arguments)
    if (given.input is None) != (given.output is None):
        raise ConfigError("--input and --output go together: a file of prompts, and the file that texts go to.")
    if (given.input is None) == (not given.prompt):
        raise ConfigError("Give --prompt, or --input and --output.")
    generator = Generator.open(
        given.checkpoint, step=given.step, revision=given.revision, dtype=given.dtype,
        batch_size=given.batch_size or (1 if given.prompt else FILE_BATCH), max_length=given.max_length,
    )  # fmt: skip
    job = generator.job(
        1 if given.prompt else TOKENS_PER_CALL, given.max_tokens,
        {"auto": None, "off": False}.get(given.thoughts, True), given.thought_length, given.temperature, given.top_p,
        given.thought_temperature, [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in given.stop],
    )  # fmt: skip
    show = given.thoughts == "show"
    if given.input is not None:
        rows = generate_file(
            generator, given.input, given.output, job, seed=given.seed, show_thoughts=show, quiet=given.quiet
        )
        print(f"{rows} texts are in {given.output}.")
        return
    _to_terminal(generator, given.prompt, job, given.seed, show)


def _to_terminal(generator: Generator, prompts: list[str], job: GenerationConfig, seed: int, show: bool) -> None:
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for prompt, request in zip(prompts, generator.requests(prompts, job, seed), strict=True):
        print(prompt, end="", flush=True)
        tokens = (token for _, token in generator.run([request], job))
        try:
            print_tokens(tokens, sys.stdout, show_thoughts=show, colour=colour)
        finally:  # also after Ctrl-C, which ends the output early
            print()


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m quietstar_jax.generate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's workdir, a Hugging Face folder or hub id")
    add("--prompt", action="append", default=[], help="text to go on from; - reads it from standard input")
    add("--input", help='any source as in data.train, whose records have a "prompt"')
    add("--output", type=path, help="JSON lines to be made, each with a completion")
    add("--thoughts", choices=("auto", "on", "off", "show"), default="auto", help="auto = on where the model can")
    add("--thought-length", type=integer, help="sampled tokens of a thought; as trained unless told otherwise")
    add("--max-tokens", type=integer, default=128, help="generated at most")
    add("--temperature", type=float, default=0.0, help="0 = always the likeliest token")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this probability together")
    add("--thought-temperature", type=float, default=0.0, help="of the tokens of thoughts")
    add("--seed", type=integer, default=0, help="of sampling")
    add("--stop", action="append", default=[], help=r"text that ends the output, with \n for a line break; repeatable")
    add("--batch-size", type=integer_from(1, MOST_AT_ONCE), help=f"prompts at once; 1, or {FILE_BATCH} from a file")
    add("--max-length", type=integer, help="room for prompt and text in tokens; as needed unless told otherwise")
    add("--dtype", default="float32", help="of the computation: float32, bfloat16")
    add("--step", type=integer_from(0), help="of a run's checkpoint; the newest unless told otherwise")
    add("--revision", default="", help="of a hub id")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
