"""Reads records and documents from local files, URLs, tensorflow-datasets, the hub, and the embedded corpus.

Only this package turns bytes into records. Training and language modelling read the text of records by number
(`open_source`); questions, prompts and builders read fields of records in order (`read_records`, `read_all`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Literal

from absl import logging

from quietstar_jax.data.sources import hub
from quietstar_jax.data.sources.common import Numbered, Piece, RandomAccessSource, Record, concatenated
from quietstar_jax.data.sources.files import File, find_files, kind_of
from quietstar_jax.data.sources.formats import JsonLines, ParquetRows, TextFiles, is_text_file, records_of
from quietstar_jax.data.sources.texts import Render, TextOf, Texts
from quietstar_jax.data.sources.tfds import TFDS, TfdsExamples
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

SYNTHETIC = "synthetic"
LOOKED_THROUGH = 1 << 20  # largest tfds split whose empty examples are found in advance; in larger ones, when read
FIELD_BYTES = 1 << 30  # limit for all records that `read_all` loads into memory

Split = Literal["train", "validation"]


def open_source(
    spec: str, config: DataConfig, *, split: Split, seed: int, render: Render | None = None
) -> RandomAccessSource:
    """Opens a source of documents; empty documents are skipped and not numbered.

    Args:
      spec: a file, a folder or a glob of JSON lines or arrays, tables, text or parquet, compressed or not, local or at
        a URL; `tfds:NAME[/CONFIG[:VERSION]]:SPLIT` or `tfds:FOLDER:SPLIT` for a prepared dataset;
        `hf:NAME[/CONFIG]:SPLIT` for the Hugging Face hub; `synthetic` for the embedded corpus.
      config: `text_key` is the field with the text, `text_documents` says how to cut text files into documents, and
        `data_dir` is the folder of tfds datasets.
      split, seed: select the documents of the embedded corpus; other sources ignore them.
      render: converts conversations to text; without it, conversations raise an error.

    Raises:
      DataError: the source is missing, broken, of an unknown kind, or all of its documents are empty.
    """
    if spec == SYNTHETIC:
        from quietstar_jax.data.synthetic import SyntheticSource

        return SyntheticSource(config.synthetic, split=split, seed=seed)
    text = TextOf(config.text_key, render)
    if spec.startswith(TFDS):
        examples = TfdsExamples(spec, config)
        parts = [Texts(examples, text, config.cache_dir, len(examples) <= LOOKED_THROUGH)]
    elif is_hub(spec):
        parts = [Texts(hub.HubRows(spec, config.text_key), text, config.cache_dir)]
    else:
        parts = [Texts(records, text, config.cache_dir) for records in _of_files(find_files(spec), config)]
    empty = sum(texts.empty for texts in parts)
    if not sum(map(len, parts)):
        what = f"no text: all of its {empty} documents are empty" if empty else "no records"
        raise DataError(f"{spec} contains {what}. Check `data.text_key` and the files.")
    if empty:
        logging.warning("%s: %d empty documents are omitted.", spec, empty)
    return concatenated(parts)


def _of_files(files: list[File], config: DataConfig) -> Iterator[Numbered[Record]]:
    for whole, group in itertools.groupby(files, lambda file: is_text_file(file, config)):
        if whole:
            yield TextFiles(list(group), config.text_key)
        else:
            for file in group:
                is_table = kind_of(file.name) == "parquet"
                yield ParquetRows(file, config.text_key) if is_table else JsonLines(file, config)


def read_records(spec: str, config: DataConfig) -> Iterator[Record]:
    """Yields the records of a source (see `open_source`), in order and in bounded memory.

    Raises:
      DataError: the source is missing or broken; the message names the line.
    """
    if spec == SYNTHETIC:
        source = open_source(spec, config, split="validation", seed=0)
        yield from (Record(f"{spec}, document {i}", {config.text_key: source[i]}) for i in range(len(source)))
    elif spec.startswith(TFDS):
        yield from TfdsExamples(spec, config)
    elif is_hub(spec):
        yield from hub.rows(spec)
    else:
        for file in find_files(spec):
            yield from records_of(file, config)


def read_all(spec: str, kind: str) -> list[Record]:
    """Returns all records of a source, with text decoded and all fields JSON-serializable.

    Args:
      kind: name of the records in messages, e.g. `prompts`.

    Raises:
      DataError: as in `read_records`; or there are no records, or they exceed the memory limit.
    """
    records, size = [], 0
    for record in read_records(spec, DataConfig()):
        try:
            text = json.dumps(record.fields, ensure_ascii=False, default=_as_text)
            size += len(text.encode())
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            raise DataError(
                f"{record.where}: a text contains \\u{half:04x}, half of a surrogate pair, which cannot be encoded. "
                "Remove it or complete the pair."
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{record.where}: a field cannot be written as JSON: {error}. Remove it.") from error
        if size > FIELD_BYTES:
            raise DataError(
                f"{spec} contains more than {FIELD_BYTES >> 30} GiB of {kind}. Split it into several files."
            )
        records.append(record._replace(fields=json.loads(text)))
    if not records:
        raise DataError(f"{spec} contains no {kind}.")
    return records


def content_hash(spec: str, config: DataConfig) -> str:
    """Returns a hash of the content of a source: of all bytes for a single local file, of samples for other files.

    For the hub, of all rows.
    """
    pieces: list[Piece] = []
    if spec.startswith(TFDS):
        pieces = TfdsExamples(spec, config).pieces()
    elif is_hub(spec):
        return hashlib.sha256(json.dumps([r.fields for r in hub.rows(spec)], default=str).encode()).hexdigest()
    elif spec != SYNTHETIC:
        pieces = list(find_files(spec))
    if len(pieces) == 1 and isinstance(pieces[0], File) and pieces[0].is_local:
        with pieces[0].open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    return hashlib.sha256(b"".join(hashlib.sha256(piece.identity(16)).digest() for piece in pieces)).hexdigest()


def _as_text(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return str(value)


def is_hub(spec: str) -> bool:
    """Whether a source names a dataset of the hub, not the URL of a file on the hub (`hf://`)."""
    return spec.startswith(hub.HUB) and not spec.startswith(hub.HUB + "//")
