"""What all sources share: being one after another, checking text, kept memory, and missing packages."""

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
SET_KEY = "Set data.text_key (--text-key) to the field that holds the text or the conversation."
KEPT_BYTES = 1 << 31  # decompressed files and parquet row groups kept by one process

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Piece(Protocol):
    """A part of a source whose content can be told from another's cheaply: a file, mostly."""

    @property
    def name(self) -> str:
        """As messages call it."""
        ...

    @property
    def size(self) -> int:
        """Bytes, 0 where there is no such thing."""
        ...

    def identity(self, samples: int) -> bytes:
        """What differs, in all likelihood, where the content does; at most `samples` places are read."""
        ...


class Numbered(Protocol[T_co]):
    """Things by number. Thread-safe to read, picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T_co: ...

    def pieces(self) -> list[Piece]:
        """What it is read from, in order."""
        ...


RandomAccessSource = Numbered[str]  # documents by number


class Record(NamedTuple):
    """One record of a source: a line, a row, an example, a text file."""

    where: str  # as messages call its place
    fields: Mapping[str, Any]


class Label:
    """A piece that is no file: its content is as good as what is said of it."""

    size = 0

    def __init__(self, name: str, content: str):
        self.name = name
        self._content = content

    def identity(self, samples: int) -> bytes:
        return self._content.encode()


class Concatenated(Generic[T]):
    """One after another, as one."""

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
    """One after another; a single one is itself."""
    return sources[0] if len(sources) == 1 else Concatenated(sources)


class Memory:
    """What was costly to load, until there is no more room: then what was longest unused goes first. Thread-safe."""

    def __init__(self, room: int):
        self.room = room  # bytes
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Any, load: Callable[[], tuple[T, int]]) -> T:
        """What is kept under `key`, or else what `load` returns: a thing and its bytes."""
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


MEMORY = Memory(KEPT_BYTES)  # of this process


def decoded(raw: bytes, where: str, start: int = 0) -> str:
    """UTF-8 text; `start` is where in the file the bytes begin."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {start + error.start}. {RECODE}") from error


def names(found: Iterable[Any]) -> str:
    """A list for people."""
    return ", ".join(map(str, found)) or "nothing"


def optional_module(name: str, needed_by: str) -> Any:
    """Imports a package that not everybody needs.

    Raises:
      DataError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise DataError(f"Reading {needed_by} needs {package}: `pip install {package}`. ({error})") from error
