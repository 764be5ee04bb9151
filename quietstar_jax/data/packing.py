"""Packs tokenized documents into sequences of L tokens, in one global order that all processes share.

If the token count of every document is known in advance, sequence n is located from the counts alone, and only the
documents in it are read. Otherwise, packing must read all documents up to it.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import grain
import numpy as np

from quietstar_jax.data.documents import Framed
from quietstar_jax.data.workers import ahead
from quietstar_jax.errors import DataError

# tokens: int32 [L]; mask: bool [L], False for padding; for packed documents also starts: int32 [L], for each token the
# index of the first token of its document in the sequence
Row = tuple[np.ndarray, ...]

BLOCK = 1024  # documents between two stored sums of spans
WALK = 32  # documents whose counts are summed at a time when packing


@dataclass(frozen=True)
class Position:
    """A position in the global order of sequences."""

    sequences: int = 0  # number of sequences before it, over all processes
    document: int = 0  # packed only: the document (counted over epochs) in which the next sequence begins ...
    offset: int = 0  # ... and how many of its tokens are already used


class Packing(Protocol):
    """A way to convert documents to sequences."""

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        """Yields this process's sequences from `start` on, each with the position after one sequence per process."""
        ...


class Share(NamedTuple):
    """Which sequences this process reads, and how many worker processes prepare them."""

    process_index: int
    process_count: int
    workers: int


@dataclass(frozen=True)
class Indexed:
    """Sequences with random access by their number in the global order."""

    sequences: grain.MapDataset  # endless; elements are rows
    check: Callable[[], object]  # raises if there is nothing to train on
    share: Share

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        self.check()
        shard = self.sequences[start.sequences + self.share.process_index :: self.share.process_count]
        with ahead(shard, self.share.workers) as rows:
            for taken, row in enumerate(rows, start=1):
                yield row, Position(start.sequences + taken * self.share.process_count)


@dataclass(frozen=True)
class RandomSpan:
    """Returns a random span of L tokens of a document, uniformly distributed; pads shorter documents."""

    length: int
    pad_id: int
    bos: tuple[int, ...]  # begins every span

    def __call__(self, tokens: np.ndarray, generator: np.random.Generator) -> Row:
        room = self.length - len(self.bos)
        start = int(generator.integers(max(len(tokens) - room, 0) + 1))
        return spanned(tokens[start : start + room], self.length, self.pad_id, self.bos)


class ConsecutiveSpans:
    """All documents cut into consecutive spans that contain each token once; the last span of a document is padded.

    Documents without a token to predict are skipped.
    """

    def __init__(self, documents: Framed, length: int, pad_id: int, bos: tuple[int, ...]):
        self._documents = documents
        self._length, self._pad_id, self._bos = length, pad_id, bos
        blocks = range(0, len(self._counts), BLOCK)
        self._sums = np.cumsum([0, *(int(self._spans(start).sum()) for start in blocks)])
        if not len(self):
            raise DataError(
                f"None of the {len(documents)} documents has {2 - len(bos)} tokens or more. "
                "Check `data.text_key` and the files."
            )

    def __len__(self) -> int:
        return int(self._sums[-1])

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        block = int(np.searchsorted(self._sums, index, side="right")) - 1
        ends = self._sums[block] + np.cumsum(self._spans(block * BLOCK))
        within = int(np.searchsorted(ends, index, side="right"))
        tokens = self._documents[block * BLOCK + within]
        number = index - int(ends[within - 1] if within else self._sums[block])
        start, stop = span_bounds(number, len(tokens), self._length - len(self._bos), bool(self._bos))
        return spanned(tokens[start:stop], self._length, self._pad_id, self._bos)

    def __getstate__(self) -> dict[str, object]:
        return without_maps(self.__dict__)

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        return self._documents.counts()

    def _spans(self, start: int) -> np.ndarray:
        """Returns the number of spans of each document in a block: int64 [documents]."""
        tokens = self._counts[start : start + BLOCK].astype(np.int64) + self._documents.added
        room = self._length - len(self._bos)
        return np.where(tokens + len(self._bos) < 2, 0, -(-tokens // room))


def span_bounds(number: int, tokens: int, room: int, begun: bool) -> tuple[int, int]:
    """Returns the first and one past the last token of span `number` of a document cut every `room` tokens.

    Unless spans begin with a begin-of-text token (`begun`), a single last token would predict nothing. In this case,
    the last token of the previous span is moved to the last span.
    """
    start, stop = number * room, min((number + 1) * room, tokens)
    if not begun and tokens > room and tokens % room == 1:
        start -= stop == tokens
        stop -= stop == tokens - 1
    return start, stop


class PackedSequences:
    """Concatenated documents in an endless order, with random access to sequence n by means of token counts."""

    def __init__(self, documents: Framed, order: grain.MapDataset, length: int, start: Position):
        """Prepares access from `start` on; `order` contains the number of the document at each place."""
        self._documents = documents
        self._order = order
        self._length = length
        self._start = start
        # Token sums are counted from the beginning of the document that contains `start`.
        self._blocks: deque[tuple[int, np.ndarray, np.ndarray]] = deque(maxlen=64)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        place, offset = self._find(index)
        pieces, missing = [], self._length
        while missing:
            tokens = self._documents[self._order[place]]
            pieces.append(tokens[offset : offset + missing])
            missing -= len(pieces[-1])
            place, offset = place + 1, 0
        return np.concatenate(pieces), np.ones(self._length, np.bool_), document_starts(document_numbers(pieces))

    def __getstate__(self) -> dict[str, object]:
        return {**without_maps(self.__dict__), "_blocks": deque(maxlen=64)}

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        return self._documents.counts()

    def position(self, index: int) -> Position:
        """Returns the position at which sequence `index` begins."""
        return Position(index, *self._find(index))

    def require_tokens(self) -> None:
        """Raises DataError if no document has a token."""
        if not int(self._counts.sum(dtype=np.int64)) + self._documents.added:
            raise DataError(
                f"None of the {len(self._documents)} documents has a token. Check `data.text_key` and the files."
            )

    def _find(self, index: int) -> tuple[int, int]:
        """Returns the beginning of a sequence: the place of its first document in the order, and the token in it."""
        token = (index - self._start.sequences) * self._length + self._start.offset
        if self._blocks and token < self._blocks[0][1][0]:
            self._blocks.clear()
        while not self._blocks or token >= self._blocks[-1][1][-1]:
            self._walk()
        first, sums, _ = next(block for block in self._blocks if block[1][0] <= token < block[1][-1])
        within = int(np.searchsorted(sums, token, side="right")) - 1
        return first + within, token - int(sums[within])

    def _walk(self) -> None:
        """Appends the cumulative token counts of the next documents in the order."""
        first, before = self._start.document, 0
        if self._blocks:
            first, sums, numbers = self._blocks[-1]
            first, before = first + len(numbers), int(sums[-1])
        numbers = np.asarray([self._order[place] for place in range(first, first + WALK)])
        tokens = self._counts[numbers].astype(np.int64) + self._documents.added
        self._blocks.append((first, before + np.concatenate([[0], np.cumsum(tokens)]), numbers))


@dataclass(frozen=True)
class PackedByCounts:
    """Concatenated documents with known token counts: a process reads only the documents in its own sequences."""

    documents: Framed
    order: grain.MapDataset
    length: int
    share: Share

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        sequences = PackedSequences(self.documents, self.order, self.length, start)
        sequences.require_tokens()
        shard = grain.MapDataset.source(sequences)[
            start.sequences + self.share.process_index :: self.share.process_count
        ]
        with ahead(shard, self.share.workers) as rows:
            for taken, row in enumerate(rows, start=1):
                yield row, sequences.position(start.sequences + taken * self.share.process_count)


@dataclass(frozen=True)
class PackedByReading:
    """Concatenated documents with unknown token counts.

    The beginning of sequence n is known only after all documents before it are read. Every process therefore reads all
    documents and uses its share. Tokenizing is much faster than a training step, and positions stay global.
    """

    documents: grain.MapDataset  # endless
    length: int
    share: Share
    check: Callable[[], object]  # raises if there is nothing to train on

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        self.check()
        count, index = self.share.process_count, self.share.process_index
        sequences, document, offset = start.sequences, start.document, start.offset
        mask = np.ones(self.length, np.bool_)
        with ahead(self.documents[document:], self.share.workers) as stream:
            tokens = next(stream)
            while True:
                pieces, missing = [], count * self.length
                while missing:
                    if offset >= len(tokens):
                        tokens, document, offset = next(stream), document + 1, 0
                    pieces.append(tokens[offset : offset + missing])
                    offset += len(pieces[-1])
                    missing -= len(pieces[-1])
                everyones = np.concatenate(pieces).reshape(count, self.length)
                starts = document_starts(document_numbers(pieces).reshape(count, self.length)[index])
                sequences += count
                yield (everyones[index], mask, starts), Position(sequences, document, offset)


class Mixture:
    """Interleaves several endless orders: `[n] -> (order, number)` is the origin of sequence n.

    Up to any n, the number of sequences from each order is proportional to its weight, within less than one sequence
    per order. The numbers of each order are consecutive, so each source is read exactly once in each of its epochs.
    """

    PARTS = 10**6  # precision of the shares

    def __init__(self, weights: tuple[float, ...]):
        total = sum(weights)
        self._shares = [max(1, round(self.PARTS * weight / total)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        # Of the first n sequences, floor(n · rest / all) are from the orders after the first, and so on recursively.
        before, after, left = index, index + 1, sum(self._shares)
        for order, share in enumerate(self._shares[:-1]):
            rest_before, rest_after = before * (left - share) // left, after * (left - share) // left
            if rest_after == rest_before:
                return order, before - rest_before
            before, after, left = rest_before, rest_after, left - share
        return len(self._shares) - 1, before


def document_numbers(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the number of the piece that each token of the concatenated pieces belongs to: int64 [tokens]."""
    return np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])


def document_starts(numbers: np.ndarray) -> np.ndarray:
    """Returns the index of the first token of each token's document, int32 [L], from ascending document numbers [L]."""
    return np.searchsorted(numbers, numbers).astype(np.int32)


def without_maps(state: Mapping[str, object]) -> dict[str, object]:
    """Removes memory-mapped arrays from a state to be pickled: the other process maps the files itself."""
    return {name: value for name, value in state.items() if not isinstance(value, np.memmap)}


def spanned(tokens: np.ndarray, length: int, pad_id: int, bos: tuple[int, ...] = ()) -> Row:
    """Returns a row of the begin-of-text tokens and the first `tokens` that fit, padded to `length`."""
    used = min(len(bos) + len(tokens), length)
    row = np.full(length, pad_id, np.int32)
    row[: len(bos)] = bos
    row[len(bos) : used] = tokens[: used - len(bos)]
    return row, np.arange(length) < used
