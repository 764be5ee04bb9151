"""Sources cut into parts that are read from start to end, each on its own: what preparation hands to its workers.

Nothing is indexed or counted beforehand, so a corpus of any size is cut at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from quietstar_jax.config import DataConfig
from quietstar_jax.data.prepared import is_prepared
from quietstar_jax.data.sources import SYNTHETIC, is_hub, open_source
from quietstar_jax.data.sources.common import Label, Piece, RandomAccessSource
from quietstar_jax.data.sources.files import COMPRESSIONS, File, find_files, kind_of
from quietstar_jax.data.sources.formats import JsonLines, ParquetRows, TextFiles, lines_between
from quietstar_jax.data.sources.hub import stream, stream_parts
from quietstar_jax.data.sources.tfds import TFDS
from quietstar_jax.errors import DataError

INFLATION = 3  # bytes of text to a compressed byte, roughly
STREAMED_BYTES = 1 << 28  # taken for the size of a hub dataset's file, which is not known beforehand
DOCUMENT_BYTES = 1 << 8  # and of a document of the embedded corpus


class Part(Protocol):
    """Some documents of a source, in order. Picklable."""

    @property
    def name(self) -> str:
        """Says which documents they are."""
        ...

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        ...

    def documents(self) -> Iterator[str]:
        """Reads them. Raises DataError for a broken one."""
        ...


@dataclass(frozen=True)
class Lines:
    """The lines of an uncompressed file that begin within a range of bytes."""

    file: File
    start: int
    end: int
    text_key: str

    @property
    def name(self) -> str:
        return f"{self.file.name}, bytes {self.start} .. {self.end}"

    @property
    def size(self) -> int:
        return self.end - self.start

    def documents(self) -> Iterator[str]:
        return lines_between(self.file, self.start, self.end, self.text_key)


@dataclass(frozen=True)
class Range:
    """Documents `start` .. `stop` - 1 of a source that is opened when it is their turn; all where `stop` is None."""

    name: str
    size: int
    open: Callable[[], RandomAccessSource]
    start: int = 0
    stop: int | None = None

    def documents(self) -> Iterator[str]:
        source = self.open()
        return (source[i] for i in range(self.start, len(source) if self.stop is None else self.stop))


@dataclass(frozen=True)
class Streamed:
    """A part of a hub dataset, fetched as it is read."""

    spec: str
    text_key: str
    part: int
    parts: int
    size: int = STREAMED_BYTES

    @property
    def name(self) -> str:
        return f"{self.spec}, part {self.part} of {self.parts}"

    def documents(self) -> Iterator[str]:
        return stream(self.spec, self.text_key, self.part, self.parts)


@dataclass(frozen=True)
class Input:
    """A source before it is cut."""

    spec: str
    pieces: list[Piece]  # what it is read from
    size: int  # bytes of text, roughly
    cut: Callable[[int], list[Part]]  # into parts of at most about so many bytes, where that can be done


def read_input(spec: str, config: DataConfig) -> Input:
    """Finds what a source is made of.

    Raises:
      DataError: it is missing, empty or of an unknown kind, or prepared already.
    """
    if is_prepared(spec):
        raise DataError(f"{spec} is prepared already: train on it as it is.")
    if is_hub(spec):
        count = stream_parts(spec, config.text_key)
        streamed: list[Part] = [Streamed(spec, config.text_key, i, count) for i in range(count)]
        return Input(spec, [Label(spec, f"{count} parts")], count * STREAMED_BYTES, lambda _: streamed)
    if spec == SYNTHETIC or spec.startswith(TFDS):
        reopen = functools.partial(open_source, spec, config, split="train", seed=0)
        source = reopen()
        pieces = source.pieces()
        size = sum(piece.size for piece in pieces) or len(source) * DOCUMENT_BYTES
        return Input(spec, pieces, size, functools.partial(_ranges, spec, size, reopen, len(source)))
    files = find_files(spec)
    return Input(spec, list(files), sum(map(_text_bytes, files)), functools.partial(_cut_files, files, config.text_key))


def _text_bytes(file: File) -> int:
    return file.size * (INFLATION if file.suffix in COMPRESSIONS else 1)


def _cut_files(files: list[File], text_key: str, target: int) -> list[Part]:
    parts: list[Part] = []
    for kind, group in itertools.groupby(files, lambda file: kind_of(file.name)):
        if kind == "text":
            parts += _text_groups(list(group), target)
            continue
        for file in group:
            pieces = -(-file.size // target)
            if kind == "json" and file.suffix not in COMPRESSIONS:
                bounds = [file.size * i // pieces for i in range(pieces + 1)]
                parts += [Lines(file, start, end, text_key) for start, end in itertools.pairwise(bounds)]
            elif kind == "json":
                parts.append(Range(file.name, _text_bytes(file), functools.partial(JsonLines, file, text_key)))
            else:
                reopen = functools.partial(ParquetRows, file, text_key)
                parts += _ranges(file.name, file.size, reopen, len(reopen()), target)
    return parts


def _text_groups(files: list[File], target: int) -> list[Part]:
    """Neighbouring text files together, until they have enough bytes."""
    groups: list[list[File]] = [[]]
    for file in files:
        if groups[-1] and sum(item.size for item in groups[-1]) + file.size > target:
            groups.append([])
        groups[-1].append(file)
    return [
        Range(f"{group[0].name} .. {group[-1].name}", sum(f.size for f in group), functools.partial(TextFiles, group))
        for group in groups
    ]


def _ranges(name: str, size: int, reopen: Callable[[], RandomAccessSource], count: int, target: int) -> list[Part]:
    pieces = max(1, min(size // target, count))
    bounds = [count * i // pieces for i in range(pieces + 1)]
    return [
        Range(f"{name}, documents {start} .. {stop}", size // pieces, reopen, start, stop)
        for start, stop in itertools.pairwise(bounds)
    ]
