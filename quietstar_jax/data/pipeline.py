"""Documents to batches of token sequences: shuffled, sharded over processes, and resumable to the sequence.

There is one global order of training sequences, fixed by the sources, the seed and the packing. Process p of P takes
sequences p, p + P, p + 2P, ... of it. A position in that order is all there is to save, so a run may be resumed on
another number of processes or workers and goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from quietstar_jax.config import DataConfig
from quietstar_jax.data.sources import RandomAccessSource, open_sources
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError, DataError

Batch = dict[str, np.ndarray]  # tokens: int32 [B, L]; mask: bool [B, L], False where padded
Row = tuple[np.ndarray, np.ndarray]  # tokens: int32 [L]; mask: bool [L]

PREFETCHED = 64  # sequences or documents that each worker process prepares ahead
KEPT_TOKENS = 1 << 25  # tokenized documents remembered in this process: 128 MiB
VALIDATION_SEED = 0  # of the embedded corpus: the same held-out documents in every run


@dataclass(frozen=True)
class Position:
    """A place in the global order of sequences."""

    sequences: int = 0  # handed out so far, over all processes
    document: int = 0  # packed only: the document (counted over epochs) that the next sequence begins in ...
    offset: int = 0  # ... and how many of its tokens are used up


class Packing(Protocol):
    """How documents become sequences."""

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        """This process's sequences from `start` on, each with the position after every process took its own."""
        ...


class SequenceIterator:
    """Endless training batches of one process. Close it to stop its workers at once."""

    def __init__(self, name: str, packing: Packing):
        self._name = name
        self._packing = packing
        self._position = Position()
        self._rows: Iterator[tuple[Row, Position]] | None = None

    def next_batch(self, size: int) -> Batch:
        """The next `size` sequences of this process: tokens int32 [size, L], mask bool [size, L].

        Raises:
          DataError: a document is broken. The position stays where it was before the call.
        """
        if self._rows is None:
            self._rows = self._packing.rows(self._position)
        taken, position = [], self._position
        try:
            for _ in range(size):
                row, position = next(self._rows)
                taken.append(row)
        except BaseException:
            self.close()
            raise
        self._position = position
        return _stack(taken)

    def get_state(self) -> dict[str, Any]:
        """Where the batches handed out so far end, ready for JSON. The same on every process of a run."""
        return {"packing": self._name, **asdict(self._position)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from `get_state()` of any run with the same sources, seed, tokenizer and packing.

        Raises:
          CheckpointError: the state is of another packing or is not a state.
        """
        names = [field.name for field in fields(Position)]
        values = {name: state.get(name) for name in names}
        if not all(isinstance(value, int) and value >= 0 for value in values.values()):
            raise CheckpointError(
                f"The saved data position {state!r} cannot be used: it takes whole numbers {', '.join(names)}. "
                "Resume from an older checkpoint, or start in a new workdir."
            )
        if state.get("packing") != self._name:
            raise CheckpointError(
                f"The saved data position is of packing {state.get('packing')!r}, the run uses {self._name!r}. "
                "Set data.packing back, or start in a new workdir."
            )
        self.close()
        self._position = Position(**values)  # type: ignore[arg-type]  # checked above

    def close(self) -> None:
        """Stops prefetching. The next batch starts it again."""
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()  # type: ignore[attr-defined]  # it is a generator


def training_sequences(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, process_index: int = 0, process_count: int = 1
) -> SequenceIterator:
    """Endless training sequences, reshuffled every epoch.

    With packing `random_span` (paper) a sequence is a random span of one document, padded where the document is
    shorter; with `packed`, documents follow each other without gaps and are cut every L tokens. The begin-of-text
    token, where wanted, begins every span or every document.

    Raises:
      DataError: a source is missing or empty (here), or a document is broken (from `next_batch`).
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not within 0 .. process_count - 1 = {process_count - 1}")
    source = open_sources(config.train, config, split="train", seed=seed)
    packed, bos = config.packing == "packed", bos_tokens(config, tokenizer)
    tokenized = _Documents(
        source, tokenizer, bos if packed else (), config.append_eos, shortest=1 if packed else 2 - len(bos)
    )
    documents = (
        grain.MapDataset.source(tokenized)
        .seed(seed % 2**32)  # all that grain takes
        .shuffle()
        .repeat()
    )
    packing: Packing
    if packed:
        packing = _Packed(documents, config.sequence_length, process_index, process_count, config.workers)
    else:
        spans = documents.random_map(_RandomSpan(config.sequence_length, tokenizer.pad_id, bos))
        packing = _RandomSpans(spans, process_index, process_count, config.workers)
    return SequenceIterator(config.packing, packing)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The validation sources in order, once: for `random_span` the first L tokens of every document with at least
    two, for `packed` all tokens in a row. Every process gets equally many batches of `batch_size` sequences (its own
    of a global order, as in training); the last ones are filled up with rows whose mask is all False.

    Args:
      batch_size: sequences per process.
      batches: how many at most; 0 = all.

    Raises:
      DataError: a source is missing or empty (here), or a document is broken (from the iterator).
    """
    source = open_sources(config.validation, config, split="validation", seed=VALIDATION_SEED)
    documents = _Documents(source, tokenizer, bos_tokens(config, tokenizer), config.append_eos, shortest=0)

    def generate() -> Iterator[Batch]:
        length, pad_id = config.sequence_length, tokenizer.pad_id
        # Every process walks all sequences: only so do all know how many there are, and stop at the same batch.
        sequences = _consecutive if config.packing == "packed" else _firsts
        rows = sequences(documents, length, pad_id)
        given = 0
        while not batches or given < batches:
            taken = list(itertools.islice(rows, process_count * batch_size))
            if not taken:
                return
            own = taken[process_index::process_count]
            yield _stack(own + [_row(np.zeros(0, np.int32), length, pad_id)] * (batch_size - len(own)))
            given += 1

    return generate()


def bos_tokens(config: DataConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What begins a text: the begin-of-text token, or nothing.

    Raises:
      ConfigError: it is always wanted but the tokenizer has none.
    """
    if config.prepend_bos == "never" or (config.prepend_bos == "auto" and not tokenizer.adds_bos):
        return ()
    if tokenizer.bos_id is None:
        raise ConfigError(
            f"config.data.prepend_bos is 'always', but the tokenizer {tokenizer.name!r} names no begin-of-text token. "
            "Set `bos_token` in its tokenizer_config.json, or set prepend_bos to 'auto'."
        )
    return (tokenizer.bos_id,)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Makes sure that every token has a row in the model's embedding; spare rows are fine.

    Raises:
      DataError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"The tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, but the model embeds only "
            f"{vocab_size}. Use the tokenizer that came with the model (leave data.tokenizer empty), or, for fresh "
            f"weights, set model.architecture.vocab_size to at least {tokenizer.vocab_size}."
        )


class _Documents:
    """Tokenized documents by number, int32 [tokens].

    One that is shorter than `shortest` gives way to the next long enough one of the source. So every number has a
    document, and which one depends on nothing but the source: skipping would make the order depend on how far
    each process has read.
    """

    def __init__(
        self, source: RandomAccessSource, tokenizer: Tokenizer, bos: tuple[int, ...], append_eos: bool, shortest: int
    ):
        self._source = source
        self._tokenizer = tokenizer
        self._bos = bos
        self._eos = (tokenizer.eos_id,) if append_eos else ()
        self._shortest = shortest
        # A span needs its whole document tokenized, most of which is then thrown away; a small corpus is worth
        # keeping. Nothing is ever dropped: in shuffled epochs the oldest document is as likely to be next as any.
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_TOKENS

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        for number in range(index, index + len(self)):
            tokens = self._tokens(number % len(self))
            if len(tokens) >= self._shortest:
                return tokens
        raise DataError(
            f"None of the {len(self)} documents has {self._shortest} tokens or more. Check data.text_key and the files."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": KEPT_TOKENS}

    def _tokens(self, index: int) -> np.ndarray:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        ids = self._tokenizer.encode(self._source[index])
        tokens = np.asarray([*self._bos, *ids, *self._eos], np.int32)
        if len(tokens) <= self._room:
            self._room -= len(tokens)
            self._kept[index] = tokens
        return tokens


@dataclass(frozen=True)
class _RandomSpan:
    """Cuts a document to a span of L tokens, every span equally likely; pads a shorter one."""

    length: int
    pad_id: int
    bos: tuple[int, ...]  # begins every span

    def __call__(self, tokens: np.ndarray, generator: np.random.Generator) -> Row:
        room = self.length - len(self.bos)
        start = int(generator.integers(max(len(tokens) - room, 0) + 1))
        span = np.concatenate([np.asarray(self.bos, np.int32), tokens[start : start + room]])
        return _row(span, self.length, self.pad_id)


@dataclass(frozen=True)
class _RandomSpans:
    """One span per document. grain draws span n from the seed and n alone, so any n can be had directly."""

    spans: grain.MapDataset
    process_index: int
    process_count: int
    workers: int

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        own = self.spans[start.sequences + self.process_index :: self.process_count]
        with _ahead(own, self.workers) as rows:
            for taken, row in enumerate(rows, start=1):
                yield row, Position(start.sequences + taken * self.process_count)


@dataclass(frozen=True)
class _Packed:
    """Documents end to end. Where sequence n begins is known only by reading up to it, so every process reads all
    documents and keeps its share: tokenizing is far faster than a training step, and the position stays global."""

    documents: grain.MapDataset
    length: int
    process_index: int
    process_count: int
    workers: int

    def rows(self, start: Position) -> Iterator[tuple[Row, Position]]:
        sequences, document, offset = start.sequences, start.document, start.offset
        mask = np.ones(self.length, np.bool_)
        with _ahead(self.documents[document:], self.workers) as stream:
            tokens = next(stream)
            while True:
                pieces, missing = [], self.process_count * self.length
                while missing:
                    if offset >= len(tokens):
                        tokens, document, offset = next(stream), document + 1, 0
                    pieces.append(tokens[offset : offset + missing])
                    offset += len(pieces[-1])
                    missing -= len(pieces[-1])
                everyones = np.concatenate(pieces).reshape(self.process_count, self.length)
                sequences += self.process_count
                yield (everyones[self.process_index], mask), Position(sequences, document, offset)


@contextlib.contextmanager
def _ahead(elements: grain.MapDataset, workers: int) -> Iterator[Iterator[Any]]:
    """Elements in order: worker processes prepare them ahead, or this thread does while the device computes a step.

    A prefetching thread of this process would cost twice the work in bookkeeping and nothing would be sooner ready.
    """
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl flags for debugging options, which not every main parses
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCHED)
        iterator = iter(elements.to_iter_dataset(inline).mp_prefetch(options))
    else:
        iterator = iter(elements.to_iter_dataset(inline))
    try:
        yield iterator
    finally:
        iterator.close()


def _firsts(documents: _Documents, length: int, pad_id: int) -> Iterator[Row]:
    for index in range(len(documents)):
        tokens = documents[index]
        if len(tokens) >= 2:  # fewer predict nothing
            yield _row(tokens, length, pad_id)


def _consecutive(documents: _Documents, length: int, pad_id: int) -> Iterator[Row]:
    left = np.zeros(0, np.int32)
    for index in range(len(documents)):
        left = np.concatenate([left, documents[index]])
        whole = len(left) // length * length
        for start in range(0, whole, length):
            yield _row(left[start:], length, pad_id)
        left = left[whole:]
    if len(left) >= 2:
        yield _row(left, length, pad_id)


def _row(tokens: np.ndarray, length: int, pad_id: int) -> Row:
    """The first `length` tokens, padded where there are fewer."""
    used = min(len(tokens), length)
    row = np.full(length, pad_id, np.int32)
    row[:used] = tokens[:used]
    return row, np.arange(length) < used


def _stack(rows: list[Row]) -> Batch:
    return {"tokens": np.stack([tokens for tokens, _ in rows]), "mask": np.stack([mask for _, mask in rows])}
