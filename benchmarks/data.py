"""Tokens per second of each way to produce training data: `python -m benchmarks.data --data 'c4/*.jsonl'`.

A step of B sequences of L tokens needs B · L tokens, whatever it computes with them. With `--json`, prints one JSON
object on the last line. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from quietstar_jax.data import documents
from quietstar_jax.data.pipeline import training_sequences
from quietstar_jax.data.pretokenized.write import prepare
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.data_config import PACKINGS, DataConfig


def rate(config: DataConfig, tokenizer: Tokenizer, batch: int, seconds: float) -> dict[str, float]:
    """Measures the tokens returned per second, without padding, after a first batch that starts the pipeline."""
    sequences = training_sequences(config, tokenizer, seed=0)
    began = time.perf_counter()
    sequences.next_batch(batch)
    start, tokens, batches = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        tokens += int(sequences.next_batch(batch)["mask"].sum())
        batches += 1
    elapsed = time.perf_counter() - start
    sequences.close()
    return {
        "tokens_per_second": tokens / elapsed,
        "milliseconds_per_batch": 1000 * elapsed / batches,
        "first_batch_seconds": start - began,
    }


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares the text, then measures every way to read it."""
    tokenizer = load_tokenizer(given.tokenizer)
    documents.KEPT_TOKENS = 0  # the tokens of a large corpus are not kept in memory
    plain = DataConfig(
        train=tuple(given.data),
        text_key=given.text_key,
        sequence_length=given.length,
        cache_dir=str(folder / "cache"),
    )
    start = time.perf_counter()
    manifest = prepare(given.data, tokenizer, "", folder / "tokens", plain, shards=given.shards, workers=given.prepare)
    elapsed = time.perf_counter() - start
    result: dict[str, Any] = {
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
        "prepare_tokens_per_second": manifest["tokens"] / elapsed,
        "prepare_seconds": elapsed,
    }
    prepared = dataclasses.replace(plain, train=(str(folder / "tokens"),))
    for packing in given.packing:
        for name, config, workers in [
            ("inline", plain, 0),
            *((f"workers_{count}", plain, count) for count in given.workers),
            ("prepared", prepared, 0),
        ]:
            chosen = dataclasses.replace(config, packing=packing, workers=workers)
            result[f"{packing}/{name}"] = rate(chosen, tokenizer, given.batch, given.seconds)
    return result


def main() -> None:
    """Parses the flags, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="text, as in data.train")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--length", type=int, default=256, help="L, tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="B, sequences of a batch")
    parser.add_argument("--packing", nargs="+", choices=PACKINGS, default=list(PACKINGS))
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2], help="worker processes to try")
    parser.add_argument("--prepare", type=int, default=1, help="worker processes of the preparation")
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="each way is read for")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder)) | {"load_before": load, "cores": os.cpu_count()}
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        said = "  ".join(f"{k} {v:,.4g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.6g}"
        print(f"{name:<28}{said}")


if __name__ == "__main__":
    main()
