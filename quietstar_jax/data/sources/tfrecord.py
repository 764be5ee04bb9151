"""Random access to the records of tfrecord files, without TensorFlow.

A record consists of its length (8 bytes, little endian), a checksum of the length, the data, and a checksum of the
data; the checksums are masked CRC-32C. The offsets of the records are known only after reading all lengths in the file.
This is done once, at the first access to a record of the file, and the offsets are cached on disk.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.sources.common import Piece
from quietstar_jax.data.sources.files import File
from quietstar_jax.errors import DataError

HEADER, FOOTER = 12, 4  # bytes before and after the data of a record
COPY = "Copy the file again, or prepare the dataset again."


class Stretch(NamedTuple):
    """Records `skip` .. `skip + take` - 1 of a file with `records` records."""

    file: File
    skip: int
    take: int
    records: int


class TfRecords:
    """The concatenated records of stretches of files."""

    def __init__(self, stretches: Sequence[Stretch], cache_dir: str):
        self._stretches = stretches
        self._cache_dir = cache_dir
        self._ends = list(itertools.accumulate(stretch.take for stretch in stretches))
        self._starts: dict[int, np.ndarray] = {}  # offsets of the records of each file, and of its end

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises:
          DataError: the file is truncated, has another number of records, or a checksum is wrong.
        """
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        stretch = self._stretches[number]
        record = stretch.skip + index - (self._ends[number - 1] if number else 0)
        starts = self._starts.get(number)
        if starts is None:
            starts = self._starts[number] = self._index(stretch)
        raw = stretch.file.read(int(starts[record]), int(starts[record + 1]))
        data = raw[HEADER:-FOOTER]
        if len(raw) != starts[record + 1] - starts[record] or raw[-FOOTER:] != struct.pack("<I", masked_crc(data)):
            raise DataError(f"{stretch.file.name}, record {record}: the checksum is wrong. {COPY}")
        return data

    def pieces(self) -> list[Piece]:
        return [stretch.file for stretch in self._stretches]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_starts": {}}

    def _index(self, stretch: Stretch) -> np.ndarray:
        file = stretch.file
        key = hashlib.sha256(f"{file.name} {file.size} {file.stamp()}".encode()).hexdigest()
        starts = cached_array(self._cache_dir, f"tfrecord-{key}", lambda: _record_starts(file))
        if len(starts) - 1 != stretch.records:
            raise DataError(
                f"{file.name} contains {len(starts) - 1} records, but {stretch.records} according to the dataset's "
                f"info. {COPY}"
            )
        return starts


def masked_crc(data: bytes) -> int:
    """Returns the CRC-32C, rotated and offset as in tfrecord files."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _record_starts(file: File) -> np.ndarray:
    """Returns the byte offsets of the records of a file, and of its end: int64 [records + 1]."""
    starts, position = [0], 0
    with file.open() as stream:
        while position < file.size:
            header = stream.read(HEADER)
            if len(header) == HEADER and header[8:] != struct.pack("<I", masked_crc(header[:8])):
                raise DataError(f"{file.name}, record {len(starts) - 1}: the checksum of its length is wrong. {COPY}")
            position += HEADER + int.from_bytes(header[:8], "little") + FOOTER
            if len(header) < HEADER or position > file.size:
                raise DataError(f"{file.name} ends in the middle of record {len(starts) - 1}. {COPY}")
            stream.seek(position)
            starts.append(position)
    return np.asarray(starts, np.int64)
