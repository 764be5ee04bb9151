"""Command line: `python -m quietstar_jax.data.prepare --source 'c4/*.json.gz' --tokenizer DIR --output tokens`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from quietstar_jax.command_line import CommandParser, integer
from quietstar_jax.config import TEXT_DOCUMENTS, DataConfig
from quietstar_jax.data.pretokenized.write import prepare
from quietstar_jax.data.sources.files import is_url
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import ConfigError, run_command


def main(arguments: list[str]) -> None:
    """Prepares the sources, then prints the result."""
    parser = CommandParser(prog="python -m quietstar_jax.data.prepare", description=__doc__)
    parser.add_argument("--source", nargs="+", action="extend", required=True, help="as in data.train; one or more")
    parser.add_argument("--tokenizer", required=True, help="folder, hub id, or `synthetic`")
    parser.add_argument("--revision", default="", help="branch, tag or commit of the tokenizer's hub id")
    parser.add_argument("--output", required=True, help="folder to be made, or to go on with")
    parser.add_argument("--text-key", default="text", help="field of a JSON line, a row or an example")
    parser.add_argument(
        "--text-documents", choices=TEXT_DOCUMENTS, default="file", help="what is one document of a text file"
    )
    parser.add_argument("--shards", type=integer, default=0, help="files; unless given, one for each 256 MB of text")
    parser.add_argument(
        "--workers", type=integer, default=os.cpu_count() or 1, help="processes; unless given, all cores"
    )
    parser.add_argument("--data-dir", default="", help="where tensorflow-datasets are")
    parser.add_argument("--cache-dir", default="", help="for indices of tfrecord files")
    parser.add_argument(
        "--max-unknown-fraction", type=float, default=DataConfig.max_unknown_fraction,
        help="refuse text of which the tokenizer does not know more than this",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.shards < 0 or given.workers < 1:
        raise ConfigError(f"--shards is {given.shards}, --workers {given.workers}; they take 0 or more and 1 or more.")
    if not 0 <= given.max_unknown_fraction <= 1:
        raise ConfigError(f"--max-unknown-fraction is {given.max_unknown_fraction}; it takes 0 .. 1.")
    if is_url(given.output):
        raise ConfigError(
            f"--output {given.output} is a URL; shards are written to a disk. Copy the folder afterwards."
        )
    config = DataConfig(
        text_key=given.text_key, text_documents=given.text_documents, data_dir=given.data_dir,
        cache_dir=given.cache_dir,
        max_unknown_fraction=given.max_unknown_fraction,
    )  # fmt: skip
    output = Path(given.output).expanduser()
    tokenizer = load_tokenizer(given.tokenizer, given.revision)
    manifest = prepare(
        given.source, tokenizer, given.revision, output, config, shards=given.shards, workers=given.workers
    )
    count = len(manifest["shards"])
    fewer = f" ({given.shards} were asked for: the sources cannot be cut into more)" if count < given.shards else ""
    empty = f" ({manifest['empty_documents']:,} empty ones left out)" if manifest["empty_documents"] else ""
    print(
        f"{manifest['documents']:,} documents{empty}, {manifest['tokens']:,} tokens in {count} shards{fewer}: "
        f"{output}. Train on it with --config.data.train=\"('{output}',)\"."
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
