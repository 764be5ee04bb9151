"""Turns records into documents: selects the text field, renders conversations, and skips empty documents.

A document is empty if it is null or has no visible character. Empty documents are not numbered: training, `prepare` and
evaluation count the same documents.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.sources.common import SET_KEY, Numbered, Piece, Record, decoded, names
from quietstar_jax.errors import DataError

Render = Callable[[list[dict[str, Any]]], str]  # converts a conversation to text with a tokenizer's chat template

DOCUMENT_BYTES = 1 << 26  # maximum size of one document; its tokens need about fifty times as much memory
TOO_LONG = (
    f"is longer than {DOCUMENT_BYTES >> 20} MiB, the maximum of one document. Split it into several documents (in a "
    "text file: set `data.text_documents` to paragraph or line)."
)
LISTED = 20  # maximum number of fields in a message

_UNSEEN = ("Cc", "Cf", "Cn", "Zs", "Zl", "Zp", "Mn", "Mc", "Me")  # Unicode categories
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}  # in ShareGPT's format
_GROUP = 512  # records between two stored sums of `Texts`


@dataclass(frozen=True)
class TextOf:
    """A function that returns the text of a record.

    Attributes:
      key: the field with the text; dots select nested fields, unless a field has this exact name.
      render: converts fields with a conversation to text; None = conversations raise DataError.
    """

    key: str
    render: Render | None = None

    def __call__(self, record: Record) -> str:
        """Returns the text, "" for an empty document.

        Raises:
          DataError: there is no text, or no tokenizer can read it.
        """
        value = self._value(record)
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = self._conversation(record, value)
        if value is None or value == []:
            return ""
        if not isinstance(value, str):
            held = "a list" if isinstance(value, list) else type(value).__name__
            raise DataError(f"{record.where}: {self.key!r} contains {held}, not text. {SET_KEY}")
        if len(value) > DOCUMENT_BYTES:
            raise DataError(f"{record.where} {TOO_LONG}")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can contain surrogates, which no tokenizer accepts
                raise DataError(
                    f"{record.where}: character {error.start} is half of a surrogate pair. Correct the text."
                ) from error
        return "" if is_blank(value) else value

    def is_empty(self, record: Record) -> bool:
        """Whether the record is skipped; does not render conversations."""
        value = self._value(record)
        return not value if isinstance(value, list) and self.render is not None else not self(record)

    def _value(self, record: Record) -> Any:
        try:
            value = field_at(record.fields, self.key)
        except KeyError as error:
            raise DataError(
                f"{record.where}: no field {self.key!r}; it has {names(_paths(record.fields))}. {SET_KEY}"
            ) from error
        return decoded(value, record.where) if isinstance(value, bytes) else value

    def _conversation(self, record: Record, messages: list[Any]) -> str:
        if self.render is None:
            raise DataError(f"{record.where}: {self.key!r} contains a conversation, not text. {SET_KEY}")
        try:
            return self.render([_message(message) for message in messages])
        except DataError:
            raise
        except Exception as error:  # templates are programs and can raise anything
            raise DataError(
                f"{record.where}: the chat template of the tokenizer cannot render {self.key!r}: {error}. Correct the "
                "conversation, or use another tokenizer."
            ) from error


def field_at(fields: Any, place: str) -> Any:
    """Returns the value at a dotted path; a key that equals the whole path has precedence. Raises KeyError."""
    if isinstance(fields, Mapping) and place in fields:
        return fields[place]
    head, _, rest = place.partition(".")
    if not rest or not isinstance(fields, Mapping) or head not in fields:
        raise KeyError(place)
    return field_at(fields[head], rest)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: it is empty, or has only spaces, control characters and marks."""
    return all(unicodedata.category(character) in _UNSEEN for character in text)


class Texts:
    """The documents of a source by number, without the empty ones."""

    def __init__(self, records: Numbered[Record], text: TextOf, cache_dir: str, look_through: bool = True):
        """Reads all records once to find the empty ones; caches the result on disk.

        Args:
          look_through: False for sources that are too large for this: an empty record is replaced by the next one.
        """
        self._records = records
        self._text = text
        self._kept: np.ndarray | None = None  # one bit per record, uint8 [records / 8]; None = all records
        if look_through:
            known = [text.key, len(records), *((p.name, p.size, _content(p)) for p in records.pieces())]
            key = hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).hexdigest()
            kept = cached_array(cache_dir, f"documents-{key}", self._look_through)
            if len(kept) and len(kept) != -(-len(records) // 8):
                kept = self._look_through()
            self._kept = np.array(kept) if len(kept) else None
        bits = _GROUP // 8
        packed = np.zeros(0, np.uint8) if self._kept is None else self._kept
        sums = [int(np.bitwise_count(packed[i : i + bits]).sum()) for i in range(0, len(packed), bits)]
        self._sums = np.cumsum([0, *sums])

    def __len__(self) -> int:
        return len(self._records) if self._kept is None else int(self._sums[-1])

    @property
    def empty(self) -> int:
        """The number of skipped records."""
        return len(self._records) - len(self)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        if self._kept is None:
            following = (self._text(self._records[(index + i) % len(self)]) for i in range(len(self)))
            return next((text for text in following if text), "")
        group = int(np.searchsorted(self._sums, index, side="right")) - 1
        bits = np.unpackbits(self._kept[group * _GROUP // 8 : (group + 1) * _GROUP // 8])
        return self._text(self._records[group * _GROUP + int(np.flatnonzero(bits)[index - self._sums[group]])])

    def pieces(self) -> list[Piece]:
        return self._records.pieces()

    def _look_through(self) -> np.ndarray:
        name = ", ".join(piece.name for piece in self._records.pieces()[:1])
        records = iter(tqdm(self._records, f"checking {name}", len(self._records), disable=None, delay=5))
        flags = (not self._text.is_empty(record) for record in records)
        chunks = []
        while chunk := list(itertools.islice(flags, 1 << 16)):
            chunks.append((np.packbits(chunk), all(chunk)))
        full = all(of_chunk for _, of_chunk in chunks)
        return np.concatenate([np.zeros(0, np.uint8), *(() if full else (bits for bits, _ in chunks))])


def _content(piece: Piece) -> str:
    stamp = getattr(piece, "stamp", None)
    return stamp() if stamp is not None else piece.identity(2).hex()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message in the format of chat templates: `role` and `content`."""
    if "from" in message and "value" in message:
        role = str(message["from"])
        return {"role": _ROLES.get(role, role), "content": message["value"]}
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _paths(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the first `LISTED` fields, with dots for nested ones."""

    def walk(fields: Mapping[str, Any], above: str) -> Iterator[str]:
        for name, value in fields.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{above}{name}.")
            else:
                yield f"{above}{name}"

    paths = list(itertools.islice(walk(fields, ""), LISTED + 1))
    return iter([*paths[:LISTED], "..."] if len(paths) > LISTED else paths)
