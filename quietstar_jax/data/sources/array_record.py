"""Random access to the records of array_record files."""

from __future__ import annotations

from collections.abc import Sequence

from array_record.python.array_record_data_source import ArrayRecordDataSource

from quietstar_jax.data.sources.common import Piece
from quietstar_jax.data.sources.tfrecord import COPY, Stretch
from quietstar_jax.errors import DataError


class ArrayRecords:
    """The concatenated records of stretches of files. Empty records are an error."""

    def __init__(self, stretches: Sequence[Stretch]):
        self._files = [stretch.file for stretch in stretches]
        for file in self._files:
            if not file.size:
                raise DataError(f"{file.name} is empty. {COPY}")
        # With the range in brackets, the package need not open every file to count its records.
        self._records = ArrayRecordDataSource([f"{s.file.name}[{s.skip}:{s.skip + s.take}]" for s in stretches])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        """Returns the data of a record.

        Raises:
          DataError: the file is damaged.
        """
        index = range(len(self))[index]
        try:
            data: bytes = self._records[index]
        except RuntimeError as error:
            raise DataError(f"Record {index} of {self._range()} cannot be read: {error}. {COPY}") from error
        if not data:  # returned by the package for some truncated files
            raise DataError(f"Record {index} of {self._range()} cannot be read: a file is cut off. {COPY}")
        return data

    def pieces(self) -> list[Piece]:
        return list(self._files)

    def _range(self) -> str:
        first, last = self._files[0].name, self._files[-1].name
        return first if first == last else f"{first} .. {last}"
