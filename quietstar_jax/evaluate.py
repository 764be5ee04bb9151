"""Command line: `python -m quietstar_jax.evaluate --checkpoint runs/mine --task gsm8k --data test.jsonl`."""

from __future__ import annotations

import json
import sys

from quietstar_jax.command_line import MOST_AT_ONCE, CommandParser, integer, integer_from, output_file
from quietstar_jax.config import PREFIX_ATTENTION, TEXT_DOCUMENTS
from quietstar_jax.errors import run_command
from quietstar_jax.evals.measure import MODES, Options, measure
from quietstar_jax.evals.questions import ANSWER_KEYS
from quietstar_jax.evals.table import format_result
from quietstar_jax.evals.tasks import TASKS
from quietstar_jax.io import write_json


def main(arguments: list[str]) -> None:
    """Runs the measurement, then prints a table or one line of JSON."""
    given = vars(_parser().parse_args(arguments))
    as_json, output = given.pop("json"), given.pop("output")
    fields = tuple(given.pop("field"))
    result = measure(Options(**given, fields=fields))
    if output is not None:
        write_json(output, result)
    print(json.dumps(result) if as_json else format_result(result))


def _parser() -> CommandParser:
    tasks = "\n".join(f"  {name:<20}{task.summary}" for name, task in TASKS.items())
    parser = CommandParser(
        prog="python -m quietstar_jax.evaluate", description=__doc__, epilog=f"tasks:\n{tasks}",

    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's workdir, a Hugging Face folder or hub id")
    add("--task", required=True, help="one of those below")
    add("--data", required=True, help="questions or text: any source as in data.train")
    add("--thoughts", default="auto", help=f"{', '.join(MODES)}; auto = both where the model can think")
    add("--step", type=integer_from(0), help="of a run's checkpoint; the newest unless told otherwise")
    add("--revision", default="", help="of a hub id")
    add("--dtype", default="float32", help="of the computation: float32, bfloat16")
    add("--prefix-attention", default="auto", help=f"{', '.join(PREFIX_ATTENTION)}: see docs/configuration.md")
    add("--thought-length", type=integer, default=0, help="sampled tokens of a thought; 0 = as trained")
    add(
        "--batch-size",
        type=integer_from(1, MOST_AT_ONCE),
        default=Options.batch_size,
        help="texts at once, over all devices",
    )
    add("--limit", type=integer, default=0, help="questions or texts from the beginning; 0 = all")
    add("--max-length", type=integer, default=0, help="tokens of the longest question; 0 = what the model takes")
    add("--seed", type=integer, default=0, help="of all that is drawn")
    add("--field", action="append", default=[], metavar="FIELD=NAME", help="where question, choices, answer lie")
    add("--answer-key", default="auto", help=f"how answers name a choice: {', '.join(ANSWER_KEYS)}")
    text = parser.add_argument_group("language_modeling")
    text.add_argument("--text-key", default="text", help="field of a record")
    text.add_argument("--text-documents", choices=TEXT_DOCUMENTS, default="file", help="of a text file (%(default)s)")
    text.add_argument(
        "--window", type=integer, default=0, help="tokens read at once; 0 = 1024, or what the model takes"
    )
    text.add_argument("--context", type=integer, default=0, help="of these, before every scored token; 0 = half")
    text.add_argument("--top", type=integer, default=Options.top, help="tokens helped and harmed most that are kept")
    votes = parser.add_argument_group("gsm8k_cot, numeric_cot")
    votes.add_argument("--samples", type=integer, default=Options.samples, help="chains of thought for each question")
    votes.add_argument("--temperature", type=float, default=Options.temperature, help="of their tokens; 0 = greedy")
    votes.add_argument("--max-tokens", type=integer, default=Options.max_tokens, help="of the steps")
    votes.add_argument("--records", default="", help="file from which a killed run goes on; left out = named here")
    add("--json", action="store_true", help="one JSON object on the last line instead of a table")
    add("--output", type=output_file, help="file for the same JSON object")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
