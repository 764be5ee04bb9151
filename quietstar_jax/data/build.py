"""Command line: `python -m quietstar_jax.data.build gsm8k --data-dir DIR [--split train=FILE ...]`."""

from __future__ import annotations

import sys

from quietstar_jax.command_line import CommandParser, path
from quietstar_jax.data.builders.commonsense_qa import CommonsenseQa
from quietstar_jax.data.builders.gsm8k import Gsm8k
from quietstar_jax.data.builders.open_web_math import OpenWebMath
from quietstar_jax.errors import DataError, run_command

BUILDERS = {"gsm8k": Gsm8k, "commonsense_qa": CommonsenseQa, "open_web_math": OpenWebMath}


def main(arguments: list[str]) -> None:
    """Builds a dataset in array_record format, then prints how to read it."""
    parser = CommandParser(prog="python -m quietstar_jax.data.build", description=__doc__)
    parser.add_argument("dataset", choices=BUILDERS)
    parser.add_argument("--data-dir", type=path, required=True, help="as data.data_dir of the run that reads it")
    parser.add_argument(
        "--split", action="append", default=[], metavar="NAME=FILES", help="file, folder, glob, URL or hf:NAME:SPLIT, "
        "of JSON lines or parquet; unless given, all splits come from the Hugging Face hub",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    pairs = [text.partition("=") for text in given.split]
    for text, (name, _, files) in zip(given.split, pairs, strict=True):
        if not name.isidentifier() or not files:
            raise DataError(f"--split {text} is not NAME=FILES. An example: --split train=gsm8k/train.jsonl")
    builder = BUILDERS[given.dataset](
        sources={name: files for name, _, files in pairs}, data_dir=str(given.data_dir.expanduser())
    )
    builder.download_and_prepare()
    for name, split in builder.info.splits.items():
        print(f"{split.num_examples:,} examples: data.data_dir={given.data_dir}, source tfds:{given.dataset}:{name}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
