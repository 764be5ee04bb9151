"""Tokenized documents by number: text that is tokenized when it is read, or prepared ahead."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from tqdm import tqdm

from quietstar_jax.config import DataConfig
from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.pretokenized.read import PreparedDocuments, is_prepared, prepared_folder
from quietstar_jax.data.sources import Split, open_source
from quietstar_jax.data.sources.common import Concatenated, Numbered, Piece, RandomAccessSource
from quietstar_jax.data.tokenization import Tokenizer, without_begin
from quietstar_jax.data.unknown import Unknown, unknown_in_text
from quietstar_jax.data.workers import ahead
from quietstar_jax.errors import DataError

UNKNOWN = "\U000f0000"  # a character of private use; a tokenizer that has nothing for it may leave out whole documents
KEPT_TOKENS = 1 << 25  # tokenized documents remembered in this process: 128 MiB


class Documents(Numbered[np.ndarray], Protocol):
    """Documents as their text says, without a begin or end token added: int32 [tokens]."""

    @property
    def counts_known(self) -> bool:
        """Whether `counts` costs nothing."""
        ...

    def unknown(self, index: int) -> Unknown:
        """How much of a document the tokenizer does not know."""
        ...

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        """Tokens of every document, int32 [documents]; counted once and cached where they are not known.

        Args:
          begin: ids that are not counted where a document itself begins with them.
        """
        ...


def open_documents(spec: str, config: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> Documents:
    """A folder of `prepare`, or any source of `open_source`.

    Raises:
      DataError: it is missing, empty, of an unknown kind, incomplete, or of another tokenizer.
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
    """One after another."""
    return documents[0] if len(documents) == 1 else _Joined(documents)


class TextDocuments:
    """Tokenized when they are read.

    A span needs its whole document tokenized, most of which is then thrown away; a small corpus is worth keeping.
    Nothing is ever dropped: in shuffled epochs the oldest document is as likely to be next as any.
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
            sorted(self._tokenizer.fast.get_added_vocab().items()),  # a conversation spells them out
            self._config.text_key,
            self._config.text_documents,
            self._tokenizer.fast.chat_template,
        )
        key = hashlib.sha256(repr(known).encode()).hexdigest()
        return cached_array(self._config.cache_dir, f"token-counts-{key}", functools.partial(self._count, begin))

    def _count(self, begin: tuple[int, ...]) -> np.ndarray:
        counts = np.zeros(len(self), np.int32)
        lengths = grain.MapDataset.source(self).map(_Length(begin))
        with ahead(lengths, self._config.workers) as found:
            # disable=None: no bar where nobody watches
            for i, count in enumerate(tqdm(found, f"counting tokens of {self._spec}", len(self), disable=None)):
                counts[i] = count
        return counts


class _Chosen:
    """Some of the documents, by their numbers."""

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
    """Tokens of a document behind `begin`; can be sent to worker processes."""

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
    """Documents with what begins and ends each of them: int32 [tokens]. None begins twice."""

    def __init__(self, documents: Documents, bos: tuple[int, ...], eos: tuple[int, ...], *, begins: bool = True):
        """Args: begins: False leaves out what begins a document, for spans that all begin so."""
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
        """Whether `counts` costs nothing."""
        return self._documents.counts_known

    @property
    def added(self) -> int:
        """Tokens of the frame."""
        return len(self._bos) * self._begins + len(self._eos)

    def counts(self) -> np.ndarray:
        """Tokens of every document without its frame, int32 [documents]."""
        return self._documents.counts(self._bos)


def require_some(documents: Framed, least: int) -> None:
    """Makes sure that some document has `least` tokens.

    Raises:
      DataError: none has.
    """
    if not any(len(documents[index]) >= least for index in range(len(documents))):
        raise DataError(
            f"None of the {len(documents)} documents has {least} tokens or more. Check data.text_key and the files."
        )
