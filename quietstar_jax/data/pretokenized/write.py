"""Writes text as array_record shards of token ids: planned first, written by worker processes, and resumable.

A shard depends only on the plan, is written under a temporary name, and is renamed when it is complete. So an
interrupted preparation loses at most the shards that were being written, and the resumed one writes the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from quietstar_jax.data.begin_of_text import begins_with
from quietstar_jax.data.cache import write_array
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.pretokenized.partition import Input, Part, read_input
from quietstar_jax.data.pretokenized.read import (
    BEGUN,
    COUNTS,
    FORMAT,
    MANIFEST,
    PLAN,
    describe_tokenizer,
    read_manifest,
)
from quietstar_jax.data.sources.texts import TextOf
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.data.unknown import SAMPLED_DOCUMENTS, check_known, sampled, total, unknown_in_text
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError
from quietstar_jax.io import TEMPORARY, locked, replacing, write_json
from quietstar_jax.settings import differences

SHARD_BYTES = 1 << 28  # bytes of text per shard if the number of shards is not given
SAMPLED_PARTS = 16  # parts sampled first, to check that the tokenizer knows the text
BATCH = 256  # documents tokenized in one call
WRITER = "group_size:1,uncompressed"  # one document per group; token ids hardly compress

RESULTS = ("documents", "tokens", "empty_documents", "begin", "shards")  # fields of a manifest that a plan lacks

_LOCK = ".lock"


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    folder: Path
    name: str  # without suffix
    parts: tuple[Part, ...]
    tokenizer: str
    revision: str
    dtype: str
    text_key: str

    @property
    def done(self) -> Path:
        """File that describes the content of the shard; exists once the shard is complete."""
        return self.folder / f"{self.name}.json"

    @property
    def counts(self) -> Path:
        """File with token counts, and whether a document itself begins with the begin token: int32 [2, documents]."""
        return self.folder / f"{self.name}.npy"


def prepare(
    sources: Sequence[str], tokenizer: Tokenizer, revision: str, output: Path, config: DataConfig, *, shards: int,
    workers: int,
) -> dict[str, Any]:  # fmt: skip
    """Tokenizes sources into a folder that training reads, or resumes an earlier call.

    Args:
      sources: as in `DataConfig.train`.
      revision: revision of the tokenizer if it is a hub id.
      config: `text_key`, `text_documents`, `data_dir`, `cache_dir` and `max_unknown_fraction` are used.
      shards: number of files; fewer if the sources cannot be split into so many; 0 = one per 256 MB of text.
      workers: processes; 1 = this process, with as many threads as there are cores.

    Returns:
      The manifest.

    Raises:
      DataError: a source is missing or broken, the tokenizer does not know the text, or the folder contains other data.
    """
    inputs = [read_input(spec, config) for spec in sources]
    parts = _cut(inputs, shards)
    groups = _assign(parts, shards)
    plan = _plan(inputs, parts, len(groups), tokenizer, config)
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output)
        _require_same(output, {name: value for name, value in manifest.items() if name not in RESULTS}, plan)
        _clean(output)
        return manifest
    _check_known(sources, parts, tokenizer, config)
    with _locked(output):
        _begin(output, plan)
        planned = [
            Shard(
                output,
                f"tokens-{i:05}-of-{len(groups):05}",
                tuple(group),
                tokenizer.name,
                revision,
                plan["dtype"],
                config.text_key,
            )
            for i, group in enumerate(groups)
        ]
        missing = [shard for shard in planned if not shard.done.is_file()]
        with tqdm(total=len(planned), initial=len(planned) - len(missing), desc="shards", disable=None) as bar:
            for _ in _write_all(missing, tokenizer, workers):
                bar.update()
        return _finish(output, plan, planned, tokenizer)


def _check_known(sources: Sequence[str], parts: Sequence[Part], tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raises DataError if the tokenizer does not know the text, judging by the first documents of some parts."""
    text = TextOf(config.text_key, tokenizer.render_conversation)
    looked_at = [parts[number] for number in sampled(len(parts))][:: max(1, len(parts) // SAMPLED_PARTS)]
    texts = itertools.chain.from_iterable(
        itertools.islice(part.documents(text), SAMPLED_DOCUMENTS // min(len(looked_at), SAMPLED_PARTS))
        for part in looked_at
    )
    unknown = total(unknown_in_text(tokenizer, one) for one in texts)
    setting = "`data.max_unknown_fraction`"
    check_known([(", ".join(sources), unknown)], config.max_unknown_fraction, tokenizer, setting)


def _cut(inputs: Sequence[Input], shards: int) -> list[Part]:
    target = max(1, sum(item.size for item in inputs) // shards) if shards else SHARD_BYTES
    return [part for item in inputs for part in item.cut(target)]


def _assign(parts: Sequence[Part], shards: int) -> list[list[Part]]:
    """Groups consecutive parts into shards of about the same size; every shard has at least one part."""
    total = sum(part.size for part in parts)
    shards = min(shards or max(1, round(total / SHARD_BYTES)), len(parts))
    groups: dict[int, list[Part]] = {}
    before = 0
    for part in parts:
        middle = before + part.size / 2
        groups.setdefault(int(middle * shards / max(total, 1)), []).append(part)
        before += part.size
    return list(groups.values())


def _plan(
    inputs: Sequence[Input], parts: Sequence[Part], shards: int, tokenizer: Tokenizer, config: DataConfig
) -> dict[str, Any]:
    """Returns everything that determines the bytes of the result, JSON-serializable."""
    names = "\n".join(part.name for part in parts)
    return {
        "format": FORMAT,
        "tokenizer": describe_tokenizer(tokenizer),
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "text_key": config.text_key,
        **({} if config.text_documents == "file" else {"text_documents": config.text_documents}),
        "sources": [fingerprint(item.spec, item.pieces) for item in inputs],
        "parts": {"count": len(parts), "digest": hashlib.sha256(names.encode()).hexdigest()},
        "shard_count": shards,
        "versions": {
            name: importlib.metadata.version(name) for name in ("quietstar_jax", "tokenizers", "array_record")
        },
    }


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Creates the folder if necessary, and locks it for one preparation; the lock is released if the process dies."""

    def busy() -> None:
        raise DataError(f"{output} is being prepared by another process. Wait for it, or stop it.")

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / _LOCK).touch()
    except OSError as error:
        raise DataError(f"The folder {output} cannot be written: {error}. Choose another one.") from error
    with locked(output / _LOCK, busy):
        yield


def _begin(output: Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or checks that the existing plan is the same."""
    path = output / PLAN
    if path.is_file():
        try:
            saved = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Remove the folder to start again.") from error
        _require_same(output, saved, plan)
        return
    names = (item.name for item in output.iterdir() if item.name != _LOCK)
    there = sorted(name for name in names if not (name.startswith(".") and name.endswith(TEMPORARY)))
    if there:
        (output / _LOCK).unlink()
        raise DataError(f"{output} is not empty (it has {', '.join(there[:5])}). Choose a new folder.")
    write_json(path, plan)


def _require_same(output: Path, saved: dict[str, Any], plan: dict[str, Any]) -> None:
    changed = differences(saved, plan, "preparation")
    if changed:
        raise DataError(
            f"{output} was prepared, or is being prepared, with other settings (saved -> now):\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nRestore these settings to resume, remove the folder to start again, or choose another one."
        )


def _write_all(shards: Sequence[Shard], tokenizer: Tokenizer, workers: int) -> Iterator[None]:
    """Writes shards, and yields after each."""
    if workers <= 1 or len(shards) <= 1:
        for shard in shards:
            write_shard(shard, tokenizer)
            yield
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(shards)), context, initializer=_start_worker)
    try:
        for future in concurrent.futures.as_completed([pool.submit(_work, shard) for shard in shards]):
            yield future.result()
    except BaseException:  # do not wait minutes for shards in progress: they are written again
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Limits a worker to one core, and ends it when its parent process ends, even if the parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(shard: Shard) -> None:
    write_shard(shard, load_tokenizer(shard.tokenizer, shard.revision))


def write_shard(shard: Shard, tokenizer: Tokenizer) -> None:
    """Tokenizes the documents of a shard. Documents without text or tokens are skipped and counted."""
    final = shard.folder / f"{shard.name}.array_record"
    text = TextOf(shard.text_key, tokenizer.render_conversation)
    counts: list[tuple[int, bool]] = []
    empty, begin = 0, tokenizer.usual_begin
    with replacing(final) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER)
        for texts in _batched(itertools.chain.from_iterable(part.documents(text) for part in shard.parts)):
            for ids in tokenizer.encode_many(texts):
                if ids:
                    writer.write(np.asarray(ids, shard.dtype).tobytes())
                    counts.append((len(ids), begins_with(ids, begin)))
                else:
                    empty += 1
        writer.close()
        record = {
            "file": final.name,
            "documents": len(counts),
            "tokens": sum(count for count, _ in counts),
            "empty_documents": empty,
            "bytes": temporary.stat().st_size,
            "sha256": _sha256(temporary),
        }
    write_array(shard.counts, np.asarray(counts, np.int32).reshape(-1, 2).T)
    write_json(shard.done, record)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def _finish(output: Path, plan: dict[str, Any], shards: Sequence[Shard], tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes the token counts of all shards to one file, then the manifest; then removes temporary files."""
    records = [json.loads(shard.done.read_text("utf-8")) for shard in shards]
    totals = {name: sum(record[name] for record in records) for name in ("documents", "tokens", "empty_documents")}
    if not totals["documents"]:
        raise DataError(
            f"The sources {[item['source'] for item in plan['sources']]} contain no token. Check `data.text_key`."
        )
    counts, begun = np.concatenate([np.load(shard.counts) for shard in shards], axis=1)
    write_array(output / COUNTS, counts)
    write_array(output / BEGUN, begun.astype(np.bool_))
    manifest = {**plan, **totals, "begin": list(tokenizer.usual_begin), "shards": records}
    write_json(output / MANIFEST, manifest)
    _clean(output)
    return manifest


def _clean(output: Path) -> None:
    """Removes the files that only an unfinished preparation needs."""
    for pattern in (
        "tokens-*.json",
        "tokens-*.npy",
        f".*{TEMPORARY}",
        PLAN,
        _LOCK,
    ):
        for item in output.glob(pattern):
            item.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
