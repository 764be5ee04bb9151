"""Results that survive a killed run: an append-only JSON Lines file; each line is on disk before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.io import lock_file
from quietstar_jax.settings import differences


class Records:
    """Opens or creates the file; a context manager, for one process at a time.

    The first line describes the measurement; a file of another measurement is rejected. An incomplete last line of a
    killed run is cut off.
    """

    def __init__(self, path: Path, measurement: Mapping[str, Any]):
        """Reads the existing records.

        Args:
          measurement: all that the records depend on, as JSON.

        Raises:
          ConfigError: the file belongs to another measurement, or another process is writing it.
          DataError: the file cannot be written, or is not a file of records.
        """
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise DataError(
                f"The file of records {path} cannot be written: {error}. Set `records` to another file."
            ) from error
        try:
            self.measurement = json.loads(json.dumps(measurement))
            self.found = self._begin(self.measurement)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, measurement: dict[str, Any]) -> list[dict[str, Any]]:
        lock_file(self._file, self.path)
        self._file.seek(0)
        records, whole = _complete_lines(self._file, self.path)
        self._file.truncate(whole)
        if not records:
            self.append({"measurement": measurement})
            _sync_folder(self.path.absolute().parent)
            return []
        theirs = records[0].get("measurement") if isinstance(records[0], dict) else None
        if theirs != measurement:
            lines = (
                differences(theirs, measurement, "measurement") if isinstance(theirs, dict) else ["it has no records"]
            )
            raise ConfigError(
                f"{self.path} contains another measurement:\n" + "\n".join(f"  - {line}" for line in lines)
                + "\nSet `records` to another file, or remove this one."
            )  # fmt: skip
        return records[1:]

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends a record; returns once it is on disk."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_records_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the measurement and the complete records of a file that `Records` wrote.

    Raises:
      DataError: the file cannot be read, or is not a file of records.
    """
    try:
        with path.open("rb") as file:
            records, _ = _complete_lines(file, path)
    except OSError as error:
        raise DataError(f"The file of records {path} cannot be read: {error}. Check the path.") from error
    if not records or not isinstance(records[0], dict) or not isinstance(records[0].get("measurement"), dict):
        raise DataError(f"{path} is not a file of records. Choose one that a measurement wrote.")
    return records[0]["measurement"], records[1:]


def _complete_lines(file: IO[bytes], path: Path) -> tuple[list[Any], int]:
    """Returns the values of all lines but an incomplete last one, and the number of bytes of these lines."""
    records: list[Any] = []
    whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}, line {len(records) + 1}, is not JSON ({error}). It is not a file of records, or another "
                "program wrote to it: choose another file."
            ) from error
        whole += len(line)
    return records, whole


def _sync_folder(folder: Path) -> None:
    """Writes the entries of a folder, such as the name of a new file, to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
