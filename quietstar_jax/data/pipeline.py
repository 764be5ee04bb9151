"""Turns documents into batches of token sequences: shuffled, sharded over processes, and resumable at any sequence.

Sources, their weights, seed and packing determine one global order of training sequences. Process p of P reads
sequences p, p + P, p + 2P, ... of this order. The saved state is only a position in this order, so a run can resume
from it with another number of processes or workers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import grain
import numpy as np

from quietstar_jax.data.documents import Documents, Framed, joined, open_documents, require_some
from quietstar_jax.data.fingerprint import changes, fingerprint
from quietstar_jax.data.packing import (
    ConsecutiveSpans,
    Indexed,
    Mixture,
    PackedByCounts,
    PackedByReading,
    PackedSequences,
    Packing,
    Position,
    RandomSpan,
    Row,
    Share,
    document_starts,
    span_bounds,
    spanned,
)
from quietstar_jax.data.pretokenized.read import PreparedDocuments
from quietstar_jax.data.sources import Split
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.unknown import Unknown, sampled, total
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import CheckpointError, DataError

# tokens: int32 [B, L]; mask: bool [B, L], False for padding; with packed documents and `data.document_mask` also
# starts: int32 [B, L], for each token the index of the first token of its document
Batch = dict[str, np.ndarray]

VALIDATION_SEED = 0  # of the embedded corpus: the same held-out documents in every run


class SequenceIterator:
    """Endless training batches of one process. `close` stops its workers immediately."""

    def __init__(
        self, name: str, packing: Packing, sources: Sequence[tuple[str, Documents]] = (), *, starts: bool = True
    ):
        """Starts at the first sequence.

        Args:
          name: name of the packing.
          packing: yields the sequences.
          sources: (spec, documents) of each source, to detect changed data when resuming.
          starts: include `starts` in batches; only packed rows have it.
        """
        self._name = name
        self._starts = starts
        self._packing = packing
        self._sources = sources
        self._position = Position()
        self._rows: Iterator[tuple[Row, Position]] | None = None

    def next_batch(self, size: int) -> Batch:
        """Returns the next `size` sequences of this process.

        Raises:
          DataError: a document is broken. The position is then the same as before the call.
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
        return _stack(taken, self._starts)

    @functools.cached_property
    def fingerprints(self) -> list[dict[str, Any]]:
        """The fingerprint of each source's content, JSON-serializable."""
        return [fingerprint(spec, documents.pieces(), len(documents)) for spec, documents in self._sources]

    def unknown(self) -> list[tuple[str, Unknown]]:
        """Returns, for each source, (its name and number of documents, counts of unknown tokens in a sample)."""
        return [
            (
                f"{spec} ({len(documents):,} document{'s' * (len(documents) != 1)})",
                total(documents.unknown(index) for index in sampled(len(documents))),
            )
            for spec, documents in self._sources
        ]

    @property
    def counted_tokens(self) -> int | None:
        """Tokens of all documents, without added ones; None unless all sources were prepared."""
        counts = [documents.tokens for _, documents in self._sources if isinstance(documents, PreparedDocuments)]
        return sum(counts) if len(counts) == len(self._sources) else None

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batches returned so far, JSON-serializable; the same on every process."""
        return {"packing": self._name, **asdict(self._position), "sources": self.fingerprints}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state()` of any run with the same sources, seed, tokenizer and packing.

        Raises:
          CheckpointError: the state is of another packing or of other data, or is not a state.
        """
        names = [field.name for field in fields(Position)]
        values = {name: state.get(name) for name in names}
        if not all(isinstance(value, int) and value >= 0 for value in values.values()):
            raise CheckpointError(
                f"The saved data position {state!r} cannot be used: it must have the whole numbers {', '.join(names)}. "
                "Resume from an older checkpoint, or start in a new workdir."
            )
        if state.get("packing") != self._name:
            raise CheckpointError(
                f"The saved data position is of packing {state.get('packing')!r}, the run uses {self._name!r}. "
                "Restore data.packing, or start in a new workdir."
            )
        self._check_sources(state.get("sources"))
        self.close()
        self._position = Position(**values)  # type: ignore[arg-type]  # checked above

    def _check_sources(self, saved: Any) -> None:
        """Raises CheckpointError if the data has changed. States of earlier versions have no fingerprints."""
        if saved is None:
            return
        lines = [f"{len(saved)} sources -> {len(self._sources)} sources"] if len(saved) != len(self._sources) else []
        for before, now, (_, documents) in zip(saved, self.fingerprints, self._sources, strict=False):
            lines += changes(before, now, documents.pieces())
        if lines:
            raise CheckpointError(
                "The training data has changed since the checkpoint was written (saved -> now):\n"
                + "\n".join(f"  - {line}" for line in lines)
                + "\nThe saved position is invalid for the changed data. Restore the data, or start in a new workdir."
            )

    def close(self) -> None:
        """Stops prefetching. `next_batch` starts it again."""
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()  # type: ignore[attr-defined]  # it is a generator


def training_sequences(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, process_index: int = 0, process_count: int = 1
) -> SequenceIterator:
    """Returns endless training sequences, reshuffled every epoch.

    With packing `random_span` (paper), a sequence is a random span of one document, padded if the document is shorter.
    With `consecutive_spans`, every document is cut into spans, and all spans are shuffled. With `packed`, documents are
    concatenated without gaps and cut every L tokens. If enabled, the begin-of-text token begins every span or, with
    `document_start` and in packed documents, every document.

    Without `weights`, the sources form one corpus, and an epoch contains every document, span or token exactly once.
    With `weights`, sequences are drawn from each source in proportion to its weight; each source has its own epochs.

    Raises:
      DataError: a source is missing or empty (here), or a document is broken (from `next_batch`).
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not within 0 .. process_count - 1 = {process_count - 1}")
    share = Share(process_index, process_count, config.workers)
    sources = _open_all(config.train, config, tokenizer, split="train", seed=seed)
    seed %= 2**32  # grain accepts only 32 bits
    if not config.weights:
        packing = _packing(config, joined([documents for _, documents in sources]), tokenizer, seed, share)
        return SequenceIterator(config.packing, packing, sources, starts=config.document_mask)
    seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(sources))]
    orders, checks = zip(
        *(_endless(config, documents, tokenizer, s) for (_, documents), s in zip(sources, seeds, strict=True)),
        strict=True,
    )
    mixed = grain.MapDataset.select_from_datasets(orders, Mixture(config.weights))
    packing = Indexed(mixed, lambda: [check() for check in checks], share)
    return SequenceIterator(config.packing, packing, sources, starts=config.document_mask)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    batches: int = 0,
) -> Iterator[Batch]:
    """Yields batches of the validation sources, once and in order.

    With `random_span`, the first span of L tokens of every document comes first, then the second span of each longer
    document, and so on. With `consecutive_spans`, all spans follow document by document; with `packed`, all tokens are
    concatenated. The last batch is filled up with rows whose mask is all False.

    Args:
      batches: maximum number of batches; 0 = all.

    Raises:
      DataError: a source is missing or empty (here), or a document is broken (from the iterator).
    """
    sources = _open_all(config.validation, config, tokenizer, split="validation", seed=VALIDATION_SEED)
    documents = joined([documents for _, documents in sources])
    frame = _frame(config, tokenizer)
    length, pad_id = config.sequence_length, tokenizer.pad_id

    def generate() -> Iterator[Batch]:
        if config.packing == "packed":
            rows = _end_to_end(frame.documents(documents), length, pad_id)
        else:
            walk = _all_spans if config.packing == "consecutive_spans" else _rounds
            rows = walk(frame.spans(documents), length, pad_id, frame.span_begin)
        yielded = 0
        while not batches or yielded < batches:
            taken = list(itertools.islice(rows, batch_size))
            if not taken:
                return
            empty = spanned(np.zeros(0, np.int32), length, pad_id)
            if config.packing == "packed":
                empty = (*empty, np.zeros(length, np.int32))
            yield _stack(taken + [empty] * (batch_size - len(taken)), config.document_mask)
            yielded += 1

    return generate()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that every token has a row in the model's embedding; spare rows are allowed.

    Raises:
      DataError: the tokenizer has more tokens than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"The tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, but the model has only {vocab_size} "
            "embeddings. Use the tokenizer that came with the model (leave data.tokenizer empty), or, for fresh "
            f"weights, set model.architecture.vocab_size to at least {tokenizer.vocab_size}."
        )


@dataclass(frozen=True)
class Frame:
    """The token ids that begin and end the documents of a run, and that begin its spans."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    every_span: bool  # whether `begin` begins every span, or only every document

    @property
    def span_begin(self) -> tuple[int, ...]:
        """The ids that begin every span of the documents of `spans`."""
        return self.begin if self.every_span else ()

    def documents(self, documents: Documents) -> Framed:
        """Returns complete documents with begin and end ids."""
        return Framed(documents, self.begin, self.end)

    def spans(self, documents: Documents) -> Framed:
        """Returns documents to be cut into spans that begin with `span_begin`."""
        return Framed(documents, self.begin, self.end, begins=not self.every_span)


def _frame(config: DataConfig, tokenizer: Tokenizer) -> Frame:
    end = (tokenizer.eos_id,) if config.append_eos else ()
    return Frame(tokenizer.begins(config.prepend_bos), end, config.prepend_bos != "document_start")


def _open_all(
    specs: Sequence[str], config: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int
) -> list[tuple[str, Documents]]:
    if not specs:
        raise DataError(f"No {split} sources are given. Set data.{split} to files, folders, tfds names or `synthetic`.")
    return [(spec, open_documents(spec, config, tokenizer, split=split, seed=seed)) for spec in specs]


def _packing(config: DataConfig, documents: Documents, tokenizer: Tokenizer, seed: int, share: Share) -> Packing:
    """Returns the packing of one corpus into sequences."""
    if config.packing != "packed":
        return Indexed(*_endless(config, documents, tokenizer, seed), share)
    framed = _frame(config, tokenizer).documents(documents)
    if documents.counts_known:
        return PackedByCounts(framed, _order(grain.MapDataset.range(len(framed)), seed), config.sequence_length, share)
    stream = _order(grain.MapDataset.source(framed), seed)
    return PackedByReading(stream, config.sequence_length, share, functools.partial(require_some, framed, 1))


def _endless(
    config: DataConfig, documents: Documents, tokenizer: Tokenizer, seed: int
) -> tuple[grain.MapDataset, Callable[[], None]]:
    """Returns the endless sequences of one corpus by number, and a check that raises if there is nothing to train on.

    `packed` and `consecutive_spans` need the token counts of all documents.
    """
    length, pad_id = config.sequence_length, tokenizer.pad_id
    frame = _frame(config, tokenizer)
    if config.packing == "packed":
        framed = frame.documents(documents)
        packed = PackedSequences(framed, _order(grain.MapDataset.range(len(framed)), seed), length, Position())
        return grain.MapDataset.source(packed), packed.require_tokens
    framed, bos = frame.spans(documents), frame.span_begin
    if config.packing == "consecutive_spans":
        spans = ConsecutiveSpans(framed, length, pad_id, bos)
        return _order(grain.MapDataset.source(spans), seed), lambda: None
    shuffled = _order(grain.MapDataset.source(framed), seed)
    return shuffled.random_map(RandomSpan(length, pad_id, bos)), functools.partial(require_some, framed, 2 - len(bos))


def _order(elements: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Repeats the elements endlessly, with another shuffle in each epoch. Element n depends only on the seed and n."""
    return elements.seed(seed).shuffle().repeat()


def _rounds(documents: Framed, length: int, pad_id: int, bos: tuple[int, ...]) -> Iterator[Row]:
    """Yields the first span of every document, then the second spans, and so on.

    So long documents contribute more than their beginning, but never more rows than shorter ones that still have spans.
    """
    room = length - len(bos)
    number, left, last = 0, list(range(len(documents))), (-1, np.zeros(0, np.int32))
    while left:
        longer = []
        for index in left:
            tokens = last[1] if last[0] == index else documents[index]
            last = index, tokens
            if len(tokens) + len(bos) >= 2:  # a shorter row has nothing to predict
                start, stop = span_bounds(number, len(tokens), room, bool(bos))
                yield spanned(tokens[start:stop], length, pad_id, bos)
            if len(tokens) > (number + 1) * room:
                longer.append(index)
        number, left = number + 1, longer


def _all_spans(documents: Framed, length: int, pad_id: int, bos: tuple[int, ...]) -> Iterator[Row]:
    room = length - len(bos)
    for index in range(len(documents)):
        tokens = documents[index]
        if len(tokens) + len(bos) >= 2:
            for number in range(-(-len(tokens) // room)):
                start, stop = span_bounds(number, len(tokens), room, bool(bos))
                yield spanned(tokens[start:stop], length, pad_id, bos)


def _end_to_end(documents: Framed, length: int, pad_id: int) -> Iterator[Row]:
    left, numbers = np.zeros(0, np.int32), np.zeros(0, np.int64)

    def row(start: int) -> Row:
        documents_of_row = np.full(length, len(documents))  # padding counts as a separate document
        documents_of_row[: len(numbers) - start] = numbers[start : start + length]
        return *spanned(left[start:], length, pad_id), document_starts(documents_of_row)

    for index in range(len(documents)):
        tokens = documents[index]
        left, numbers = np.concatenate([left, tokens]), np.concatenate([numbers, np.full(len(tokens), index)])
        whole = len(left) // length * length
        yield from map(row, range(0, whole, length))
        left, numbers = left[whole:], numbers[whole:]
    if len(left) >= 2:
        yield row(0)


def _stack(rows: list[Row], starts: bool) -> Batch:
    """Stacks rows into a batch; `starts`: whether to include the starts of documents."""
    names = ("tokens", "mask", "starts") if starts else ("tokens", "mask")
    return {name: np.stack(arrays) for name, arrays in zip(names, zip(*rows, strict=True), strict=False)}
