"""Command line: `python -m quietstar_jax.evaluate --checkpoint runs/mine --task gsm8k --data test.jsonl`."""

from __future__ import annotations

import json
import sys
from typing import Any

from quietstar_jax.command_line import (
    BATCH_SIZE,
    CommandParser,
    add_checkpoint_flags,
    add_flags,
    check_writable,
    integer_from,
)
from quietstar_jax.config import PREFIX_ATTENTION
from quietstar_jax.errors import ConfigError, run_command
from quietstar_jax.evals.options import REPLACEMENTS, Options
from quietstar_jax.evals.tasks import ANSWER_KEYS, TASKS
from quietstar_jax.io import write_json
from quietstar_jax.thought_config import PERTURBATIONS


def main(arguments: list[str]) -> None:
    """Runs the measurement, then prints a table or one line of JSON."""
    with make_parser().parsed(arguments) as args:
        from quietstar_jax.evals.measure import measure
        from quietstar_jax.evals.table import format_result, right_name
        from quietstar_jax.reports.drawings import write_drawings
        from quietstar_jax.reports.front_figures import front_charts

        given = vars(args)
        as_json, output, figures = (given.pop(name) for name in ("json", "output", "figures"))
        if output is not None:
            check_writable(output, "--output")
        if figures is not None and not given["think_front"]:
            raise ConfigError("--figures needs --think-front: other measurements have no charts.")
        given["fields"] = tuple(given.pop("field"))
        given |= {name: given[name] or 0 for name in ("thought_length", "max_length")}
        result = measure(Options(**given))
    if output is not None:
        write_json(output, result)
    if figures is not None:
        write_drawings(figures, front_charts(result["front"], "A position predicts one token.", right_name(result)))
    print(json.dumps(result) if as_json else format_result(result))


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    named: dict[str, list[str]] = {}
    for name, task in TASKS.items():
        named.setdefault(task.summary, []).append(name)
    tasks = "\n".join(f"  {', '.join(names):<24}  {summary}" for summary, names in named.items())
    parser = CommandParser(
        "evaluate",
        "--checkpoint runs/mine --task gsm8k --data test.jsonl", tasks,
    )  # fmt: skip
    add = parser.add_argument
    add_checkpoint_flags(parser)
    add("--task", required=True, metavar="TASK", help="one of the tasks at the end of this page")
    add_flags(parser, "--data", required=True)
    add_flags(parser, "--thoughts", "--think", "--thought-length", "--max-length")
    add("--think-front", action="store_true", help="list loss and right answers at every threshold of all policies")
    add_flags(parser, "--figures")
    add_flags(parser, "--limit", default=Options.limit)
    add_flags(parser, "--batch-size", default=BATCH_SIZE)
    add_flags(parser, "--seed", "--output", "--json", "--quiet")
    add(
        "--prefix-attention", default="auto", metavar="NAME",
        help=f"how thoughts attend to the text: {', '.join(PREFIX_ATTENTION)} (default: %(default)s)",
    )  # fmt: skip
    add(
        "--field",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="name of question, choices or answer in a record",
    )
    add(
        "--answer-key", default="auto", metavar="KIND",
        help=f"how answers name a choice: {', '.join(ANSWER_KEYS)} (default: %(default)s)",
    )  # fmt: skip
    add(
        "--control", default="", metavar="KIND",
        help=f"put something else in the place of each thought: {', '.join(REPLACEMENTS)}",
    )  # fmt: skip
    add_flags(parser, "--reach")
    add(
        "--exclude", default="", metavar="PATTERN",
        help="spans: regular expression, such as '<<'; tokens that match are excluded from predictions",
    )  # fmt: skip
    text = parser.add_argument_group("language_modeling")
    add_flags(text, "--text-key", "--text-documents")
    number: dict[str, Any] = {"type": integer_from(0), "metavar": "N", "default": 0}
    text.add_argument(
        "--window", **number, help="tokens of a window; 0 = 1024, or fewer if the model has fewer positions"
    )
    text.add_argument("--context", **number, help="tokens of a window before the first scored one; 0 = half of it")
    text.add_argument(
        "--top", **number | {"default": Options.top}, help="tokens to list that thoughts helped or harmed most"
    )
    text.add_argument(
        "--perturb", default="", metavar="KIND",
        help=f"also measure thoughts that are changed step by step: {', '.join(PERTURBATIONS)}",
    )  # fmt: skip
    votes = parser.add_argument_group("gsm8k_cot, numeric_cot; spans: --records, --against")
    add_flags(votes, "--samples", default=Options.samples)
    add_flags(votes, "--temperature", default=Options.temperature)
    add_flags(votes, "--max-tokens", default=Options.max_tokens)
    votes.add_argument(
        "--records", default="", metavar="FILE",
        help="file from which a killed command resumes (default: named after the measurement)",
    )  # fmt: skip
    add_flags(votes, "--against")
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
