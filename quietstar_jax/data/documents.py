"""Random access to tokenized documents: text that is tokenized when it is read, or tokens prepared in advance."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from tqdm import tqdm

from quietstar_jax.data.begin_of_text import without_begin
from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.pretokenized.read import PreparedDocuments, is_prepared, prepared_folder
from quietstar_jax.data.sources import Split, open_source
from quietstar_jax.data.sources.common import Concatenated, Numbered, Piece, RandomAccessSource
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.unknown import Unknown, unknown_in_text
from quietstar_jax.data.workers import ahead
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

UNKNOWN = "\U000f0000"  # a private-use character; if it has no token, whole documents may have no tokens
KEPT_TOKENS = 1 << 25  # tokens of documents cached in this process: 128 MiB


class Documents(Numbered[np.ndarray], Protocol):
    """Documents by number, without added begin or end tokens: int32 [tokens]."""

    @property
    def counts_known(self) -> bool:
        """Whether `counts` needs no reading of documents."""
        ...

    def unknown(self, index: int) -> Unknown:
        """Returns how much of a document the tokenizer does not know."""
        ...

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        """Returns the number of tokens of every document, int32 [documents]; counted once and cached if not known.

        Args:
          begin: ids that are not counted if a document itself begins with them.
        """
        ...


def open_documents(spec: str, config: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> Documents:
    """Opens a folder written by `prepare`, or any source of `open_source`.

    Raises:
      DataError: the source is missing, empty, of an unknown kind, incomplete, or prepared with another tokenizer.
    """
    if is_prepared(spec):
        return PreparedDocuments(prepared_folder(spec), tokenizer, config.cache_dir)
    source = open_source(spec, config, split=split, seed=seed, render=tokenizer.render_conversation)
    documents = TextDocuments(spec, source, tokenizer, config)
    if not tokenizer.encode(UNKNOWN):
        counts = documents.counts()
        if not counts.all():
            return _Chosen(documents, np.flatnonzero(counts))
    return documents


def joined(documents: Sequence[Documents]) -> Documents:
    """Returns the concatenation of several collections of documents."""
    return documents[0] if len(documents) == 1 else _Joined(documents)


class TextDocuments:
    """Documents that are tokenized when they are read.

    A span needs its whole document tokenized, and most of the tokens are then discarded, so documents are cached up to
    `KEPT_TOKENS`. Nothing is evicted: in shuffled epochs, the oldest document is as likely to be next as any other.
    """

    counts_known = False

    def __init__(self, spec: str, source: RandomAccessSource, tokenizer: Tokenizer, config: DataConfig):
        self._spec = spec
        self._source = source
        self._tokenizer = tokenizer
        self._config = config
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_TOKENS

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        index = int(index)
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        text = self._source[index]
        try:
            tokens = np.asarray(self._tokenizer.encode(text), np.int32)
        except DataError as error:
            raise DataError(f"{self._spec}, document {index}: {error}") from error
        if len(tokens) <= self._room:
            self._room -= len(tokens)
            self._kept[index] = tokens
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": KEPT_TOKENS}

    def pieces(self) -> list[Piece]:
        return self._source.pieces()

    def unknown(self, index: int) -> Unknown:
        return unknown_in_text(self._tokenizer, self._source[index])

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        known = (
            fingerprint(self._spec, self.pieces(), len(self)),
            (self._tokenizer.vocabulary_fingerprint, *begin),
            sorted(self._tokenizer.fast.get_added_vocab().items()),  # rendered conversations spell them out
            self._config.text_key,
            self._config.text_documents,
            self._tokenizer.fast.chat_template,
        )
        key = hashlib.sha256(repr(known).encode()).hexdigest()
        return cached_array(self._config.cache_dir, f"token-counts-{key}", functools.partial(self._count, begin))

    def _count(self, begin: tuple[int, ...]) -> np.ndarray:
        counts = np.zeros(len(self), np.int32)
        lengths = grain.MapDataset.source(self).map(_Length(begin))
        with ahead(lengths, self._config.workers) as token_counts:
            # disable=None: no progress bar without a terminal
            for i, count in enumerate(tqdm(token_counts, f"counting tokens of {self._spec}", len(self), disable=None)):
                counts[i] = count
        return counts


class _Chosen:
    """A selection of documents, given by their numbers."""

    counts_known = False

    def __init__(self, documents: Documents, numbers: np.ndarray):
        if not len(numbers):
            raise DataError(f"None of the {len(documents)} documents has a token. Use another tokenizer.")
        self._documents = documents
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._documents[int(self._numbers[index])]

    def pieces(self) -> list[Piece]:
        return self._documents.pieces()

    def unknown(self, index: int) -> Unknown:
        return self._documents.unknown(int(self._numbers[index]))

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        return self._documents.counts(begin)[self._numbers]


@dataclass(frozen=True)
class _Length:
    """Counts the tokens of a document after `begin`; can be sent to worker processes."""

    begin: tuple[int, ...]

    def __call__(self, tokens: np.ndarray) -> int:
        return len(without_begin(tokens, self.begin))


class _Joined(Concatenated[np.ndarray]):
    def __init__(self, documents: Sequence[Documents]):
        super().__init__(documents)
        self._documents = documents

    @property
    def counts_known(self) -> bool:
        return all(part.counts_known for part in self._documents)

    def unknown(self, index: int) -> Unknown:
        for part in self._documents:
            if index < len(part):
                return part.unknown(index)
            index -= len(part)
        raise IndexError(index)

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        return np.concatenate([part.counts(begin) for part in self._documents])


class Framed:
    """Documents with begin and end tokens: int32 [tokens]. A document that has the begin tokens keeps only one copy."""

    def __init__(self, documents: Documents, bos: tuple[int, ...], eos: tuple[int, ...], *, begins: bool = True):
        """Wraps documents.

        Args:
          documents: documents without begin and end tokens.
          bos, eos: ids that begin and end a document.
          begins: if False, documents do not begin with `bos`; for spans, which add it themselves.
        """
        self._documents = documents
        self._bos, self._begins = bos, begins
        self._eos = np.asarray(eos, np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        begin = np.asarray(self._bos if self._begins else (), np.int32)
        return np.concatenate([begin, without_begin(self._documents[int(index)], self._bos), self._eos])

    @property
    def counts_known(self) -> bool:
        """Whether `counts` needs no reading of documents."""
        return self._documents.counts_known

    @property
    def added(self) -> int:
        """Number of tokens added to each document."""
        return len(self._bos) * self._begins + len(self._eos)

    def counts(self) -> np.ndarray:
        """Returns the number of tokens of every document without the added ones, int32 [documents]."""
        return self._documents.counts(self._bos)


def require_some(documents: Framed, least: int) -> None:
    """Checks that at least one document has `least` tokens or more.

    Raises:
      DataError: no document has.
    """
    if not any(len(documents[index]) >= least for index in range(len(documents))):
        raise DataError(
            f"None of the {len(documents)} documents has {least} tokens or more. Check `data.text_key` and the files."
        )
