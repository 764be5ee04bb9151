"""Command line: `python -m quietstar_jax.data.build gsm8k --data-dir DIR [--split train=FILE ...]`."""

from __future__ import annotations

import importlib
import sys

from quietstar_jax.command_line import CommandParser, add_flags
from quietstar_jax.errors import DataError, run_command

# The class of the module of this name in `builders/`.
BUILDERS = {
    "gsm8k": "Gsm8k", "gsm8k_text": "Gsm8kText", "commonsense_qa": "CommonsenseQa", "open_web_math": "OpenWebMath",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Builds a dataset in array_record format, then prints how to read it."""
    with make_parser().parsed(arguments) as args:
        data_dir = str(args.data_dir)
        pairs = [text.partition("=") for text in args.split]
        for text, (name, _, files) in zip(args.split, pairs, strict=True):
            if not name.isidentifier() or not files:
                raise DataError(f"--split {text} is not NAME=FILES. An example: --split train=gsm8k/train.jsonl")
        module = importlib.import_module(f"quietstar_jax.data.builders.{args.dataset}")
        builder = getattr(module, BUILDERS[args.dataset])(
            sources={name: files for name, _, files in pairs}, data_dir=data_dir
        )  # fmt: skip
        builder.download_and_prepare()
    for name, split in builder.info.splits.items():
        print(f"{split.num_examples:,} examples: data.data_dir={data_dir}, source tfds:{args.dataset}:{name}")


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "build",
        "gsm8k --data-dir ~/tensorflow_datasets --split train=gsm8k/train.jsonl",
    )  # fmt: skip
    parser.add_argument("dataset", choices=BUILDERS, metavar="DATASET", help=", ".join(BUILDERS))
    add_flags(parser, "--data-dir", required=True)
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=FILES",
        help="file, folder, glob, URL or hf:NAME:SPLIT, of JSON lines or parquet; may be repeated "
        "(default: all splits, from the Hugging Face hub)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
