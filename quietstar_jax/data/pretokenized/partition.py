"""Partitions sources into parts for the workers of a preparation; each part is read sequentially and independently.

Nothing is indexed or counted in advance, so a corpus of any size is partitioned immediately.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from quietstar_jax.data.pretokenized.read import is_prepared
from quietstar_jax.data.sources import SYNTHETIC, is_hub, open_source
from quietstar_jax.data.sources.common import Label, Piece, RandomAccessSource, Record
from quietstar_jax.data.sources.files import COMPRESSIONS, File, find_files, kind_of
from quietstar_jax.data.sources.formats import ParquetRows, TextFiles, is_text_file, lines_between, records_of
from quietstar_jax.data.sources.hub import stream, stream_parts
from quietstar_jax.data.sources.texts import TextOf
from quietstar_jax.data.sources.tfds import TFDS, TfdsExamples
from quietstar_jax.data.sources.unpack import is_lines
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

INFLATION = 3  # approximate bytes of text per compressed byte
STREAMED_BYTES = 1 << 28  # assumed size of a hub dataset's file, which is not known in advance
DOCUMENT_BYTES = 1 << 8  # assumed size of a document of the embedded corpus


class Part(Protocol):
    """Some documents of a source, in order. Picklable."""

    @property
    def name(self) -> str:
        """Identifies the documents."""
        ...

    @property
    def size(self) -> int:
        """Approximate bytes of text."""
        ...

    def documents(self, text: TextOf) -> Iterator[str]:
        """Yields the documents, "" for an empty one. Raises DataError for a broken one."""
        ...


@dataclass(frozen=True)
class Lines:
    """The lines of a JSON lines file that begin within a range of bytes."""

    file: File
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.file.name}, bytes {self.start} .. {self.end}"

    @property
    def size(self) -> int:
        return self.end - self.start

    def documents(self, text: TextOf) -> Iterator[str]:
        return lines_between(self.file, self.start, self.end, text)


@dataclass(frozen=True)
class Records:
    """Records that are read on demand."""

    name: str
    size: int
    read: Callable[[], Iterable[Record]]

    def documents(self, text: TextOf) -> Iterator[str]:
        return (text(record) for record in self.read())


@dataclass(frozen=True)
class Input:
    """A source before it is partitioned."""

    spec: str
    pieces: list[Piece]  # the files and other pieces that it is read from
    size: int  # approximate bytes of text
    cut: Callable[[int], list[Part]]  # partitions it into parts of about the given number of bytes, if possible


def read_input(spec: str, config: DataConfig) -> Input:
    """Opens a source for partitioning.

    Raises:
      DataError: the source is missing, empty, of an unknown kind, or already prepared.
    """
    if is_prepared(spec):
        raise DataError(f"{spec} is already prepared. Train on it directly.")
    if is_hub(spec):
        count = stream_parts(spec, config.text_key)
        streamed: list[Part] = [
            Records(
                f"{spec}, part {i} of {count}", STREAMED_BYTES,
                functools.partial(stream, spec, config.text_key, i, count),
            )
            for i in range(count)
        ]  # fmt: skip
        return Input(spec, [Label(spec, f"{count} parts")], count * STREAMED_BYTES, lambda _: streamed)
    if spec == SYNTHETIC or spec.startswith(TFDS):
        source = TfdsExamples(spec, config) if spec.startswith(TFDS) else _synthetic(config)
        pieces = source.pieces()
        size = sum(piece.size for piece in pieces) or len(source) * DOCUMENT_BYTES
        read = functools.partial(_numbered, spec, config)
        return Input(spec, pieces, size, functools.partial(_ranges, spec, size, read, len(source)))
    files = find_files(spec)
    return Input(spec, list(files), sum(map(_text_bytes, files)), functools.partial(_cut_files, files, config))


def _synthetic(config: DataConfig) -> RandomAccessSource:
    return open_source(SYNTHETIC, config, split="train", seed=0)


def _numbered(spec: str, config: DataConfig, start: int, stop: int) -> Iterator[Record]:
    """Returns records `start` .. `stop` - 1 of a source with random access."""
    if spec == SYNTHETIC:
        texts = _synthetic(config)
        return (Record(f"{spec}, document {i}", {config.text_key: texts[i]}) for i in range(start, stop))
    examples = TfdsExamples(spec, config)
    return (examples[i] for i in range(start, stop))


def _row_groups(file: File, key: str, start: int, stop: int) -> Iterator[Record]:
    return ParquetRows(file, key).between(start, stop)


def _text_bytes(file: File) -> int:
    return file.size * (INFLATION if file.suffix in COMPRESSIONS else 1)


def _cut_files(files: list[File], config: DataConfig, target: int) -> list[Part]:
    parts: list[Part] = []
    for whole, group in itertools.groupby(files, lambda file: is_text_file(file, config)):
        if whole:
            parts += _text_groups(list(group), config.text_key, target)
            continue
        for file in group:
            if kind_of(file.name) == "parquet":
                read = functools.partial(_row_groups, file, config.text_key)
                count = ParquetRows(file, config.text_key).groups()
                parts += _ranges(file.name, file.size, read, count, target, "row groups")
            elif is_lines(file):
                pieces = -(-file.size // target)
                bounds = [file.size * i // pieces for i in range(pieces + 1)]
                parts += [Lines(file, start, end) for start, end in itertools.pairwise(bounds)]
            else:
                parts.append(Records(file.name, _text_bytes(file), functools.partial(records_of, file, config)))
    return parts


def _text_groups(files: list[File], key: str, target: int) -> list[Part]:
    """Groups consecutive text files into parts of up to `target` bytes."""
    groups: list[list[File]] = [[]]
    for file in files:
        if groups[-1] and sum(item.size for item in groups[-1]) + file.size > target:
            groups.append([])
        groups[-1].append(file)
    return [
        Records(
            f"{group[0].name} .. {group[-1].name}", sum(file.size for file in group),
            functools.partial(TextFiles, group, key),
        )
        for group in groups
    ]  # fmt: skip


def _ranges(
    name: str, size: int, read: Callable[[int, int], Iterable[Record]], count: int, target: int,
    what: str = "documents",
) -> list[Part]:  # fmt: skip
    pieces = max(1, min(size // target, count))
    bounds = [count * i // pieces for i in range(pieces + 1)]
    return [
        Records(f"{name}, {what} {start} .. {stop}", size // pieces, functools.partial(read, start, stop))
        for start, stop in itertools.pairwise(bounds)
    ]
