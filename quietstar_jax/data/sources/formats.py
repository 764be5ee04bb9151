"""Records of files, by number and in order: JSON lines (and files converted to them), text, and parquet.

Every source keeps only an index of its file in memory. Recently read blocks and row groups are cached
(`common.MEMORY`).
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.sources.common import MEMORY, RECODE, SET_KEY, Piece, Record, decoded, names, optional_module
from quietstar_jax.data.sources.files import COMPRESSIONS, File, kind_of
from quietstar_jax.data.sources.texts import DOCUMENT_BYTES, TOO_LONG, TextOf
from quietstar_jax.data.sources.unpack import bounded_lines, is_lines, lines_of, open_unpacked, place_word, unpacked
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

BLOCK_BYTES = 1 << 16  # bytes of JSON lines read together
ROWS = 256  # parquet rows read together
GROUP_BYTES = 1 << 31  # maximum uncompressed size of a parquet row group


def records_of(file: File, config: DataConfig) -> Iterator[Record]:
    """Yields the records of a file, in order and in bounded memory; skips blank lines.

    Raises:
      DataError: the file is broken.
    """
    if kind_of(file.name) == "parquet":
        yield from ParquetRows(file)
        return
    if is_text_file(file, config):
        yield TextFiles([file], config.text_key)[0]
        return
    word, position = place_word(file), 0
    for number, raw in enumerate(lines_of(file, config), start=1):
        if raw.strip():
            yield parse_record(raw, f"{file.name}, {word} {number}", position)
        position += len(raw)


def is_text_file(file: File, config: DataConfig) -> bool:
    """Whether a file is one text document that can be read directly."""
    return kind_of(file.name) == "text" and config.text_documents == "file" and file.suffix not in COMPRESSIONS


class TextFiles:
    """Text files, each of which is one record with the text in the field `key`."""

    def __init__(self, files: Sequence[File], key: str):
        self._files = files
        self._key = key

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[index]
        if file.size > DOCUMENT_BYTES:
            raise DataError(f"{file.name} {TOO_LONG}")
        raw = file.read(0, file.size)
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        if wide:
            try:
                text = raw.decode("utf-32" if raw[2:4] == b"\0\0" or raw[:4] == b"\0\0\xfe\xff" else "utf-16")
            except UnicodeDecodeError as error:
                raise DataError(f"{file.name}: not UTF-16 at byte {error.start}. {RECODE}") from error
        else:
            text = decoded(raw, file.name).removeprefix("\ufeff")
        return Record(file.name, {self._key: text})

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def pieces(self) -> list[Piece]:
        return list(self._files)


class JsonLines:
    """The records of a JSON lines file, or of a file that is converted to one in the cache. Blank lines are skipped.

    The index contains the beginning of every block of lines, so it is small for lines of any length.
    """

    def __init__(self, file: File, config: DataConfig):
        self._file = file
        self._config = config
        self._word = place_word(file)
        self._is_lines = is_lines(file)
        known = (file.name, file.size, file.stamp(), config.text_documents, config.text_key)
        key = hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).hexdigest()
        self._marks = np.array(cached_array(config.cache_dir, f"lines-{key}", self._find_marks))

    def __len__(self) -> int:
        return int(self._marks[-1, 1])

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        block = int(np.searchsorted(self._marks[:, 1], index, side="right")) - 1
        lines = MEMORY.get((self._file, self._config.text_documents, block), lambda: self._load(block))
        place = index - int(self._marks[block, 1])
        if place >= len(lines):
            raise DataError(f"{self._file.name} has changed while it was read. Start again.")
        number, start, raw = lines[place]
        return parse_record(raw, f"{self._file.name}, {self._word} {number}", start)

    def __iter__(self) -> Iterator[Record]:
        for block in range(len(self._marks) - 1):  # not cached, unlike blocks that are read by number
            for number, start, raw in self._load(block)[0]:
                yield parse_record(raw, f"{self._file.name}, {self._word} {number}", start)

    def pieces(self) -> list[Piece]:
        return [self._file]

    def _plain(self) -> File:
        return self._file if self._is_lines else unpacked(self._file, self._config)

    def _load(self, block: int) -> tuple[list[tuple[int, int, bytes]], int]:
        """Returns (line number, first byte, content) of the non-blank lines of a block, and their approximate size."""
        (start, _, number), end = self._marks[block].tolist(), int(self._marks[block + 1, 0])
        lines = []
        for raw in io.BytesIO(self._plain().read(start, end)):
            number += 1
            raw = raw if start else raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                lines.append((number, start, raw))
            start += len(raw)
        return lines, end - start + 200 * len(lines)

    def _find_marks(self) -> np.ndarray:
        """Returns first byte, and records and lines before it, of each block and of the end: int64 [blocks + 1, 3]."""
        marks = [(0, 0, 0)]
        position = records = number = 0
        with open_unpacked(self._plain()) as stream:
            for raw in bounded_lines(stream, self._file.name):
                if position - marks[-1][0] >= BLOCK_BYTES:
                    marks.append((position, records, number))
                position += len(raw)
                number += 1
                records += not raw.isspace()
        return np.asarray([*marks, (position, records, number)], np.int64)


def lines_between(file: File, start: int, end: int, text: TextOf) -> Iterator[str]:
    """Yields the documents of the JSON lines that begin at bytes `start` .. `end` - 1, "" for an empty one.

    Needs no index. A line begins at byte 0 and after every newline, so adjacent ranges contain every line exactly once.
    """
    with file.open() as stream:
        position = start
        if start:
            stream.seek(start - 1)
            position += _skip_line(stream) - 1  # the rest of a line that begins before `start`, or nothing
            stream.seek(position)
        buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
        while position < end and (raw := buffered.readline(DOCUMENT_BYTES + 1)):
            content = raw if position else raw.removeprefix(codecs.BOM_UTF8)
            try:
                if len(raw) > DOCUMENT_BYTES:
                    raise DataError(TOO_LONG)
                document = text(parse_record(content, file.name, position)) if content.strip() else None
            except DataError as error:
                where = f"{file.name}, line {_newlines(file, position) + 1}"
                if len(raw) > DOCUMENT_BYTES:
                    raise DataError(f"{where} {TOO_LONG}") from error
                text(parse_record(content, where, position))
                raise
            if document is not None:
                yield document
            position += len(raw)


def _skip_line(stream: IO[bytes]) -> int:
    """Returns the number of bytes up to and including the next newline, or up to the end."""
    skipped = 0
    while chunk := stream.read(BLOCK_BYTES):
        place = chunk.find(b"\n")
        if place >= 0:
            return skipped + place + 1
        skipped += len(chunk)
    return skipped


def _newlines(file: File, end: int) -> int:
    """Returns the number of newlines before byte `end`."""
    count, position = 0, 0
    with file.open() as stream:
        while position < end and (chunk := stream.read(min(1 << 24, end - position))):
            count += chunk.count(b"\n")
            position += len(chunk)
    return count


def parse_record(raw: bytes, where: str, start: int) -> Record:
    """Parses the JSON object in one line; `start` is the offset of the line in the file."""
    try:
        fields = json.loads(decoded(raw, where, start))
    except (ValueError, RecursionError) as error:
        reason = "it contains NUL bytes; was the machine switched off while the file was written?" if (
            not raw.strip(b"\0 \r\n")
        ) else str(error)  # fmt: skip
        raise DataError(f"{where}: broken JSON ({reason}). Every line must be one JSON object.") from error
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a JSON {type(fields).__name__}, not an object. Write {{...}}, with a key for the text."
        )
    return Record(where, fields)


class ParquetRows:
    """The rows of a parquet file. A row group is read when one of its rows is read.

    If the row groups do not fit in the cache, shuffled reading loads a row group for almost every document: prepare a
    large corpus in advance.
    """

    def __init__(self, file: File, key: str | None = None):
        """Opens the file; reads only the column with the field `key`, or all columns if it is None."""
        self._file = file
        self._columns: list[str] | None = None
        table = open_parquet(file)
        schema = table.schema_arrow
        if key is not None:
            column = key if key in schema.names else key.partition(".")[0]
            if column not in schema.names:
                raise DataError(f"{file.name}: no field {key!r}; it has {names(schema.names)}. {SET_KEY}")
            self._columns = [column]
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        if not len(self):
            raise DataError(f"{file.name} has no rows. Remove it, or write it again.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        group = MEMORY.get((self._file, tuple(self._columns or ()), number), lambda: self._load(number))
        place = index - (self._ends[number - 1] if number else 0)
        return self._record(index, group.slice(place, 1))

    def __iter__(self) -> Iterator[Record]:
        return self.between(0, len(self._ends))

    def between(self, first: int, last: int) -> Iterator[Record]:
        """Yields the rows of row groups `first` .. `last` - 1, in order and in bounded memory."""
        number = self._ends[first - 1] if first else 0
        try:
            for batch in open_parquet(self._file).iter_batches(
                ROWS, row_groups=list(range(first, last)), columns=self._columns
            ):
                for i in range(batch.num_rows):
                    yield self._record(number, batch.slice(i, 1))
                    number += 1
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise _broken_parquet(self._file, error) from error

    def groups(self) -> int:
        """Returns the number of row groups."""
        return len(self._ends)

    def pieces(self) -> list[Piece]:
        return [self._file]

    def _record(self, index: int, row: Any) -> Record:
        where = f"{self._file.name}, row {index + 1}"
        try:
            return Record(where, row.to_pylist()[0])
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start} of the text. {RECODE}") from error

    def _load(self, number: int) -> tuple[Any, int]:
        table = open_parquet(self._file)
        columns = table.metadata.row_group(number)
        size = sum(columns.column(i).total_uncompressed_size for i in range(columns.num_columns))
        if size > GROUP_BYTES:
            raise DataError(
                f"{self._file.name}: row group {number} needs {size >> 20} MiB, more than {GROUP_BYTES >> 20} MiB. "
                "Write it again with smaller row groups, or prepare the text in advance."
            )
        try:
            group = table.read_row_group(number, columns=self._columns)
        except (ValueError, OSError) as error:
            raise _broken_parquet(self._file, error) from error
        return group, group.nbytes


def open_parquet(file: File) -> Any:
    """Opens a file as a `pyarrow.parquet.ParquetFile`.

    Raises:
      DataError: it is not a parquet file, or pyarrow is not installed.
    """
    optional_module("pyarrow", file.name)
    parquet = optional_module("pyarrow.parquet", file.name)
    try:
        return parquet.ParquetFile(file.name if file.is_local else file.open())
    except (ValueError, OSError) as error:
        raise _broken_parquet(file, error) from error


def _broken_parquet(file: File, error: Exception) -> DataError:
    return DataError(f"{file.name} cannot be read as parquet: {error} Write or copy it again.")
