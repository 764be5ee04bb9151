"""Shared by all sources: concatenation, decoding of text, a memory cache, and imports of optional packages."""

from __future__ import annotations

import bisect
import importlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from quietstar_jax.errors import DataError

RECODE = "Convert it to UTF-8, for example with `iconv -t UTF-8`."
SET_KEY = "Set `data.text_key` to the field that contains the text or the conversation."
KEPT_BYTES = 1 << 31  # decompressed files and parquet row groups cached by one process

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Piece(Protocol):
    """A part of a source whose content can be identified cheaply, usually a file."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def size(self) -> int:
        """Size in bytes; 0 if it has no size."""
        ...

    def identity(self, samples: int) -> bytes:
        """Returns bytes that very likely differ if the content differs; reads at most `samples` samples."""
        ...


class Numbered(Protocol[T_co]):
    """A sequence with random access. Thread-safe to read, and picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...

    def pieces(self) -> list[Piece]:
        """Returns the pieces that it is read from, in order."""
        ...


RandomAccessSource = Numbered[str]  # documents by number


class Record(NamedTuple):
    """One record of a source: a line, a row, an example, a text file."""

    where: str  # its location, for messages
    fields: Mapping[str, Any]


class Label:
    """A piece that is not a file; a description identifies its content."""

    size = 0

    def __init__(self, name: str, content: str):
        self.name = name
        self._content = content

    def identity(self, samples: int) -> bytes:
        return self._content.encode()


class Concatenated(Generic[T]):
    """The concatenation of several sequences."""

    def __init__(self, sources: Sequence[Numbered[T]]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> T:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number][index - (self._ends[number - 1] if number else 0)]

    def pieces(self) -> list[Piece]:
        return [piece for source in self._sources for piece in source.pieces()]


def concatenated(sources: Sequence[Numbered[T]]) -> Numbered[T]:
    """Returns the concatenation of sequences; a single one is returned as it is."""
    return sources[0] if len(sources) == 1 else Concatenated(sources)


class Memory:
    """A cache of objects that are costly to load; evicts the least recently used ones beyond `room`. Thread-safe."""

    def __init__(self, room: int):
        self.room = room  # bytes
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Any, load: Callable[[], tuple[T, int]]) -> T:
        """Returns the cached object for `key`, or else loads it; `load` returns the object and its size in bytes."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        thing, size = load()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = (thing, size)
                self._used += size
            while self._used > self.room and len(self._kept) > 1:
                self._used -= self._kept.popitem(last=False)[1][1]
        return thing


MEMORY = Memory(KEPT_BYTES)  # shared by all sources in this process


def decoded(raw: bytes, where: str, start: int = 0) -> str:
    """Decodes UTF-8 text; `start` is the offset of the bytes in the file, for messages."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {start + error.start}. {RECODE}") from error


def names(items: Iterable[Any]) -> str:
    """Returns a list for messages."""
    return ", ".join(map(str, items)) or "nothing"


def optional_module(name: str, needed_by: str) -> Any:
    """Imports an optional package.

    Raises:
      DataError: the package is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise DataError(f"Reading {needed_by} needs {package}: `pip install {package}`. ({error})") from error
