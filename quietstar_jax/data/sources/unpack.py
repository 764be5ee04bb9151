"""Converts files of all supported formats, encodings and compressions to JSON lines with one object each.

Files that are already JSON lines in UTF-8 are read directly. Others are read as a stream, in bounded memory; for random
access, they are written to the cache once as JSON lines.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from quietstar_jax.data.cache import cache_folder
from quietstar_jax.data.sources.common import RECODE, optional_module
from quietstar_jax.data.sources.files import COMPRESSIONS, File, bare_name, kind_of
from quietstar_jax.data.sources.texts import DOCUMENT_BYTES, TOO_LONG
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError
from quietstar_jax.io import replacing

HEAD_BYTES = 1 << 12  # bytes inspected to detect the format and encoding of a file
CHUNK = 1 << 16  # characters of a JSON array read at a time
WINDOW = 1 << 31  # limit of the zstd window, the largest that its command line writes; and of the memory of xz
UNPACKED_BYTES = 1 << 36  # maximum size of one file in the cache
FREE_BYTES = 1 << 30  # minimum free space on the disk of the cache
CHECKED_BYTES = 1 << 26  # bytes written between two checks of the free space

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BLANK = re.compile(r"[\s,]*")
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
          (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def open_unpacked(file: File) -> IO[bytes]:
    """Opens a file, decompressing it as it is read; several members or frames are concatenated."""
    stream = file.open()
    if file.suffix not in COMPRESSIONS:
        return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))
    if file.suffix == ".bz2":
        return io.BufferedReader(bz2.BZ2File(stream))
    if file.suffix == ".xz":
        make: Callable[[], Any] = lambda: lzma.LZMADecompressor(memlimit=WINDOW)  # noqa: E731
    else:
        zstandard = optional_module("zstandard", file.name)
        make = lambda: zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()  # noqa: E731
    return io.BufferedReader(_Members(stream, make), CHUNK)


class _Members(io.RawIOBase):
    """Decompressed and concatenated members.

    Unlike stream readers, raises EOFError if the file ends within a member.
    """

    def __init__(self, stream: IO[bytes], make: Callable[[], Any]):
        self._stream = stream
        self._chunks = self._unpack(make)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._left):
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _unpack(self, make: Callable[[], Any]) -> Iterator[bytes]:
        piece = 1 << 10  # small, because four bytes may decompress to a block of 128 KiB
        data = self._stream.read(piece)
        while data:
            member = make()
            while not member.eof:
                if not data:
                    raise EOFError("the file ends in the middle of a frame")
                yield member.decompress(data)
                data = b"" if member.eof else self._stream.read(piece)
            data = member.unused_data or self._stream.read(piece)


def is_lines(file: File) -> bool:
    """Whether a file already is JSON lines in UTF-8, so that reading can start at any line."""
    return kind_of(file.name) == "json" and file.suffix not in COMPRESSIONS and _way(file.read(0, HEAD_BYTES)) is None


def place_word(file: File) -> str:
    """Returns the word for a record of a file in messages."""
    kind = kind_of(file.name)
    if kind == "json":
        with contextlib.suppress(Exception), open_unpacked(file) as stream:  # reading the file reports the error
            return "element" if _way(stream.peek(HEAD_BYTES)) == "array" else "line"  # type: ignore[attr-defined]
    return {"table": "row", "text": "document"}.get(str(kind), "line")


def lines_of(file: File, config: DataConfig) -> Iterator[bytes]:
    """Yields a file as JSON lines in UTF-8, including blank ones; line n is line, row or document n of the file.

    Raises:
      DataError: the file is broken, or a line is too long.
    """
    kind = kind_of(file.name)
    try:
        with open_unpacked(file) as stream:
            head = stream.peek(HEAD_BYTES)  # type: ignore[attr-defined]
            if not head and file.suffix in COMPRESSIONS:
                raise DataError(f"{file.name} is empty after decompression. Remove it, or write it again.")
            way = _way(head)
            if kind == "json" and way is None:
                yield from _raw_lines(file, stream)
                return
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8-sig")
            keep_ends = kind in ("table", "text")
            text = io.TextIOWrapper(stream, encoding, newline="" if keep_ends else None)
            if kind == "table":
                values: Iterator[Any] = _rows(file, text)
            elif kind == "text":
                values = ({config.text_key: one} for one in _documents(file, text, config.text_documents))
            elif way == "array":
                values = _elements(file, text)
            else:
                yield from (line.encode() for line in _text_lines(file, text))
                return
            for value in values:
                yield json.dumps(value).encode() + b"\n"
    except UnicodeError as error:
        raise DataError(f"{file.name}: not {getattr(error, 'encoding', 'UTF-8')}: {error}. {RECODE}") from error
    except _BROKEN as error:
        raise _unreadable(file, error) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise _unreadable(file, error) from error
        raise


def unpacked(file: File, config: DataConfig) -> File:
    """Returns the file in the cache with the JSON lines of a file; writes it if it does not exist.

    Raises:
      DataError: as in `lines_of`; or the cache cannot be written or has too little space.
    """
    what = (file.name, file.size, file.stamp(), config.text_documents, config.text_key)
    name = hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()
    path = cache_folder(config.cache_dir) / "unpacked" / f"{name}.jsonl"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                _write(file, config, temporary)
        except OSError as error:
            raise DataError(
                f"{file.name} cannot be unpacked to {path.parent}: {error}. Set `data.cache_dir`, or the environment "
                "variable XDG_CACHE_HOME, to a folder with free space; or prepare the text in advance, which needs "
                "none."
            ) from error
    return File(str(path), path.stat().st_size)


def _write(file: File, config: DataConfig, path: Path) -> None:
    written = checked = 0
    with path.open("wb") as stream:
        for line in lines_of(file, config):
            written += stream.write(line)
            if written > UNPACKED_BYTES:
                raise DataError(
                    f"{file.name} unpacks to more than {UNPACKED_BYTES >> 30} GiB, the limit for one file. Prepare it "
                    "with `python -m quietstar_jax.data.prepare`, which reads it as a stream."
                )
            if written - checked > CHECKED_BYTES:
                checked = written
                if shutil.disk_usage(path.parent).free < FREE_BYTES:
                    raise OSError(f"less than {FREE_BYTES >> 30} GiB is left on the disk")


def bounded_lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """Yields the lines of a stream; raises DataError for a line longer than the maximum size of a document."""
    for number in range(1, 1 << 62):
        line = stream.readline(DOCUMENT_BYTES + 1)
        if not line:
            return
        if len(line) > DOCUMENT_BYTES:
            raise DataError(f"{name}, line {number} {TOO_LONG}")
        yield line


def _raw_lines(file: File, stream: IO[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(bounded_lines(stream, file.name)):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _way(head: bytes) -> str | None:
    """Returns how JSON is written, according to the first bytes of a file.

    None for lines in UTF-8, `array` for one array, `wide` for UTF-16 and UTF-32, `returns` for lines that end in
    carriage returns alone.
    """
    if any(head.startswith(mark) for mark, _ in _MARKS):
        try:
            text = head[: len(head) // 4 * 4].decode("utf-16" if head[:4] not in dict(_MARKS) else "utf-32", "ignore")
        except UnicodeError:
            text = ""
        return "array" if text.lstrip("\ufeff \t\r\n").startswith("[") else "wide"
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return "array"
    return "returns" if b"\r" in head and b"\n" not in head else None


def _text_lines(file: File, text: IO[str]) -> Iterator[str]:
    for number in range(1, 1 << 62):
        line = text.readline(DOCUMENT_BYTES + 1)
        if not line:
            return
        if len(line) > DOCUMENT_BYTES:
            raise DataError(f"{file.name}, line {number} {TOO_LONG}")
        yield line


def _elements(file: File, text: IO[str]) -> Iterator[Any]:
    """Yields the elements of a JSON array, with one in memory at a time."""
    decoder, buffer, at, number = json.JSONDecoder(), text.read(CHUNK).lstrip("\ufeff \t\r\n"), 1, 1
    while True:
        at = _BLANK.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + text.read(CHUNK)).strip():
                raise DataError(f"{file.name}: text follows the JSON array. Write one object to a line.")
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = text.read(max(CHUNK, len(buffer) - at))
            if not more:
                raise DataError(f"{file.name}, element {number} of the array: broken JSON ({error}).") from error
            if len(buffer) - at > DOCUMENT_BYTES:
                raise DataError(f"{file.name}, element {number} {TOO_LONG}") from error
            buffer, at = buffer[at:] + more, 0
            continue
        if not isinstance(value, dict):
            raise DataError(
                f"{file.name}, element {number} of the array: a JSON {type(value).__name__}, not an object. Write "
                "{...}, with a key for the text."
            )
        yield value
        at, number = end, number + 1


def _rows(file: File, text: IO[str]) -> Iterator[dict[str, str]]:
    """Yields the rows of a table; its first row contains the column names."""
    csv.field_size_limit(DOCUMENT_BYTES)
    delimiter = "\t" if ".tsv" in bare_name(file.name).lower() else ","
    reader = csv.reader(_text_lines(file, text), delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{file.name}: two columns have the same name ({', '.join(header)}). Rename one.")
        for number, row in enumerate((row for row in reader if row), start=1):
            if len(row) != len(header):
                raise DataError(
                    f"{file.name}, row {number} (line {reader.line_num}): {len(row)} fields, but the first line names "
                    f"{len(header)}: {', '.join(header)}. Quote fields that contain a delimiter."
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{file.name}, line {reader.line_num}: broken table ({error}). Write it again.") from error


def _documents(file: File, text: IO[str], documents: str) -> Iterator[str]:
    """Yields the documents of a text file, cut according to `data.text_documents`."""
    if documents == "file":
        whole = text.read(DOCUMENT_BYTES + 1)
        if len(whole) > DOCUMENT_BYTES:
            raise DataError(f"{file.name} {TOO_LONG}")
        yield whole
        return
    paragraph: list[str] = []
    size = 0
    for line in _text_lines(file, text):
        bare = line.rstrip("\r\n")
        if documents == "line" or not bare.strip():
            if paragraph:
                yield "\n".join(paragraph)
            paragraph, size = ([bare] if documents == "line" else []), 0
            continue
        paragraph.append(bare)
        size += len(bare)
        if size > DOCUMENT_BYTES:
            raise DataError(f"{file.name}: a paragraph {TOO_LONG}")
    if paragraph:
        yield "\n".join(paragraph)


def _unreadable(file: File, error: Exception) -> DataError:
    if file.suffix in COMPRESSIONS:
        return DataError(f"{file.name} cannot be decompressed: {error}. Compress or copy it again.")
    return DataError(f"{file.name} cannot be read: {error}.")
