"""Documents of files: JSON lines, text, parquet.

Every source keeps only an index of its file in memory. Decompressed JSON lines and parquet row groups are kept as long
as there is room (`common.MEMORY`): larger corpora in these formats are best prepared ahead.
"""

from __future__ import annotations

import bisect
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from quietstar_jax.data.sources.common import MEMORY, RECODE, SET_KEY, Piece, decoded, names, optional_module, text_of
from quietstar_jax.data.sources.files import COMPRESSIONS, File, kind_of
from quietstar_jax.errors import DataError

SCAN_BYTES = 1 << 24  # read at a time while lines are being found


class TextFiles:
    """Each file is one document."""

    def __init__(self, files: Sequence[File]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        file = self._files[index]
        return decoded(file.read(0, file.size), file.name).removeprefix("\ufeff")

    def pieces(self) -> list[Piece]:
        return list(self._files)


class JsonLines:
    """Each line is a JSON object with the document under one key. Lines are found by byte offset."""

    def __init__(self, file: File, text_key: str):
        self._file = file
        self._text_key = text_key
        with self._open() as stream:
            self._ends = _line_ends(stream)
        if not len(self._ends):
            raise DataError(f"{file.name} decompresses to nothing. Remove it, or write it anew.")
        # Blank lines are found at the door: no object is shorter than `{}`. Broken ones cost a parse of the whole file.
        lengths = np.diff(self._ends, prepend=0)
        short = np.flatnonzero(lengths <= 2)
        self[int(short[0]) if len(short) else 0]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        packed = self._file.suffix in COMPRESSIONS
        raw = self._content()[start:end] if packed else self._file.read(start, end)
        return parse_line(raw, self._text_key, f"{self._file.name}, line {index + 1}", start)

    def pieces(self) -> list[Piece]:
        return [self._file]

    def _open(self) -> IO[bytes]:
        return io.BytesIO(self._content()) if self._file.suffix in COMPRESSIONS else self._file.open()

    def _content(self) -> bytes:
        def load() -> tuple[bytes, int]:
            content = _decompressed(self._file)
            return content, len(content)

        return MEMORY.get(self._file, load)


def lines_between(file: File, start: int, end: int, text_key: str) -> Iterator[str]:
    """Documents of the lines of an uncompressed file that begin at bytes `start` .. `end` - 1, without an index.

    A line may begin at byte 0 and behind every newline, so neighbouring ranges have every line once.
    """
    with file.open() as stream:
        position = start
        if start:
            stream.seek(start - 1)
            position += len(stream.readline()) - 1  # the rest of a line begun earlier, or nothing
        while position < end and (raw := stream.readline()):
            try:
                text = parse_line(raw, text_key, file.name, position)
            except DataError:
                text = parse_line(raw, text_key, f"{file.name}, line {_newlines(file, position) + 1}", position)
            yield text
            position += len(raw)


def _newlines(file: File, end: int) -> int:
    """Newlines before byte `end`."""
    found, position = 0, 0
    with file.open() as stream:
        while position < end and (chunk := stream.read(min(SCAN_BYTES, end - position))):
            found += chunk.count(b"\n")
            position += len(chunk)
    return found


def records_of(file: File) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each record of a file of JSON lines or parquet is, and the record.

    Raises:
      DataError: it is broken, or of another kind.
    """
    if kind_of(file.name) == "parquet":
        table = open_parquet(file)
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        yield from ((f"{file.name}, row {number}", row) for number, row in enumerate(rows, start=1))
    elif kind_of(file.name) == "json":
        position = 0
        with io.BytesIO(_decompressed(file)) if file.suffix in COMPRESSIONS else file.open() as stream:
            for number, raw in enumerate(stream, start=1):
                where = f"{file.name}, line {number}"
                yield where, parse_record(raw, where, position)
                position += len(raw)
    else:
        raise DataError(f"{file.name} has no records. Give JSON lines or parquet.")


def parse_line(raw: bytes, text_key: str, where: str, start: int) -> str:
    """The document of one line; `start` is the byte where it begins."""
    return text_of(parse_record(raw, where, start), text_key, where)


def parse_record(raw: bytes, where: str, start: int) -> dict[str, Any]:
    """The JSON object of one line; `start` is the byte where it begins."""
    try:
        record = json.loads(decoded(raw, where, start))
    except (ValueError, RecursionError) as error:
        if not raw.strip():
            raise DataError(f"{where}: the line is blank. Remove it; every line holds one JSON object.") from error
        raise DataError(
            f"{where}: broken JSON ({error}). Every line holds one JSON object; one large JSON array has to be "
            "written out as lines."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, not an object. Write {{...}}, with a key for the text."
        )
    return record


class ParquetRows:
    """Each row is a document. Row groups are read when one of their rows is.

    Shuffled reading costs a row group for almost every document once there are more of them than are kept: prepare a
    large corpus ahead.
    """

    def __init__(self, file: File, text_key: str):
        self._file = file
        self._text_key = text_key
        pyarrow = optional_module("pyarrow", file.name)
        table = open_parquet(file)
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise DataError(f"{file.name}: no column {text_key!r}; it has {names(schema.names)}. {SET_KEY}")
        kind = schema.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise DataError(f"{file.name}: column {text_key!r} holds {kind}, not text. {SET_KEY}")
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        if not len(self):
            raise DataError(f"{file.name} has no rows. Remove it, or write it anew.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        group = MEMORY.get((self._file, self._text_key, number), lambda: self._load(number))
        where = f"{self._file.name}, row {index + 1}"
        try:
            value = group[index - (self._ends[number - 1] if number else 0)].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start} of the text. {RECODE}") from error
        return text_of({self._text_key: value}, self._text_key, where)

    def pieces(self) -> list[Piece]:
        return [self._file]

    def _load(self, number: int) -> tuple[Any, int]:
        try:
            column = open_parquet(self._file).read_row_group(number, columns=[self._text_key]).column(0)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise _broken_parquet(self._file, error) from error
        return column, column.nbytes


def open_parquet(file: File) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
      DataError: it is none.
    """
    parquet = optional_module("pyarrow.parquet", file.name)
    try:
        return parquet.ParquetFile(file.name if file.is_local else file.open())
    except (ValueError, OSError) as error:
        raise _broken_parquet(file, error) from error


def _broken_parquet(file: File, error: Exception) -> DataError:
    return DataError(f"{file.name} cannot be read as parquet: {error} Write or copy it anew.")


def _line_ends(stream: IO[bytes]) -> np.ndarray:
    """Byte offsets one past the end of every line, the newline included: int64 [lines]."""
    found, position = [], 0
    while chunk := stream.read(SCAN_BYTES):
        found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1)
        position += len(chunk)
    ends = np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.int64)
    unterminated = position and (not len(ends) or ends[-1] != position)
    return np.append(ends, position) if unterminated else ends


def _decompressed(file: File) -> bytes:
    raw = file.read(0, file.size)
    try:
        if file.suffix == ".gz":
            return gzip.decompress(raw)
        zstandard = optional_module("zstandard", file.name)
        parts = []
        while raw:  # a file may be several frames; a stream reader would take a cut-off one for the end
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(raw))
            if not frame.eof:
                raise EOFError("the file ends in the middle of a frame")
            raw = frame.unused_data
        return b"".join(parts)
    except Exception as error:
        if isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError":
            raise DataError(f"{file.name} cannot be decompressed: {error}. Compress or copy it anew.") from error
        raise
