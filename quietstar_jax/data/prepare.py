"""Command line: `python -m quietstar_jax.data.prepare --data 'c4/*.json.gz' --tokenizer DIR --output tokens`."""

from __future__ import annotations

import os
import sys

from quietstar_jax.command_line import CommandParser, add_flags, integer_from, path
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import ConfigError, run_command


def main(arguments: list[str]) -> None:
    """Prepares the sources, then prints the result."""
    with make_parser().parsed(arguments) as args:
        if not 0 <= args.max_unknown_fraction <= 1:
            raise ConfigError(f"--max-unknown-fraction is {args.max_unknown_fraction}; it must be within 0 .. 1.")
        config = DataConfig(
            text_key=args.text_key, text_documents=args.text_documents, data_dir=str(args.data_dir or ""),
            cache_dir=str(args.cache_dir or ""), max_unknown_fraction=args.max_unknown_fraction,
        )  # fmt: skip
        from quietstar_jax.data.pretokenized.write import prepare
        from quietstar_jax.data.tokenization import load_tokenizer

        output = args.output
        tokenizer = load_tokenizer(args.tokenizer, args.revision)
        manifest = prepare(
            args.data, tokenizer, args.revision, output, config, shards=args.shards, workers=args.workers
        )
    count = len(manifest["shards"])
    fewer = f" ({args.shards} were requested: the sources cannot be split into more)" if count < args.shards else ""
    empty = f" ({manifest['empty_documents']:,} empty ones omitted)" if manifest["empty_documents"] else ""
    print(
        f"{manifest['documents']:,} documents{empty}, {manifest['tokens']:,} tokens in {count} shards{fewer}: "
        f"{output}. To train on them, set --config.data.train=\"('{output}',)\"."
    )


def make_parser() -> CommandParser:
    """Returns the parser of this command."""
    parser = CommandParser(
        "prepare",
        "--data 'c4/*.json.gz' --tokenizer path/to/hf-folder --output c4-tokens",
    )  # fmt: skip
    add = parser.add_argument
    add_flags(parser, "--data", nargs="+", action="extend", required=True)
    add("--tokenizer", required=True, metavar="PATH", help="folder of a tokenizer, hub id, or `synthetic`")
    add_flags(parser, "--revision")
    add_flags(parser, "--output", required=True)
    add_flags(parser, "--text-key", "--text-documents", "--data-dir")
    add("--cache-dir", type=path, metavar="FOLDER", help="folder of cached indices, as data.cache_dir")
    add(
        "--shards", type=integer_from(0), default=0, metavar="N",
        help="number of files; 0 = one for each 256 MB of text (default: %(default)s)",
    )  # fmt: skip
    add(
        "--workers", type=integer_from(1), default=os.cpu_count() or 1, metavar="N",
        help="number of processes (default: one for each core)",
    )  # fmt: skip
    add(
        "--max-unknown-fraction", type=float, default=DataConfig.max_unknown_fraction, metavar="X",
        help="largest fraction of the text that the tokenizer may lack tokens for (default: %(default)s)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
