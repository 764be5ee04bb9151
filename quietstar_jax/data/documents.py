"""Tokenized documents by number: text that is tokenized when it is read, or prepared ahead."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np
from tqdm import tqdm

from quietstar_jax.config import DataConfig
from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.prepared import PreparedDocuments, is_prepared, prepared_folder
from quietstar_jax.data.sources import Split, open_source
from quietstar_jax.data.sources.common import Concatenated, Numbered, Piece, RandomAccessSource
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.workers import ahead
from quietstar_jax.errors import DataError

UNKNOWN = "\U000f0000"  # a character of private use; a tokenizer that has nothing for it may leave out whole documents
KEPT_TOKENS = 1 << 25  # tokenized documents remembered in this process: 128 MiB


class Documents(Numbered[np.ndarray], Protocol):
    """Documents without begin or end token: int32 [tokens]."""

    @property
    def counts_known(self) -> bool:
        """Whether `counts` costs nothing."""
        ...

    def counts(self) -> np.ndarray:
        """Tokens of every document, int32 [documents]; counted once and cached where they are not known."""
        ...


def open_documents(spec: str, config: DataConfig, tokenizer: Tokenizer, *, split: Split, seed: int) -> Documents:
    """A folder of `prepare`, or any source of `open_source`.

    Raises:
      DataError: it is missing, empty, of an unknown kind, incomplete, or of another tokenizer.
    """
    if is_prepared(spec):
        return PreparedDocuments(prepared_folder(spec), tokenizer)
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

    def counts(self) -> np.ndarray:
        known = (
            fingerprint(self._spec, self.pieces(), len(self)),
            self._tokenizer.vocabulary_fingerprint,
            self._config.text_key,
            self._config.text_documents,
            self._tokenizer.fast.chat_template,
        )
        key = hashlib.sha256(repr(known).encode()).hexdigest()
        return cached_array(self._config.cache_dir, f"token-counts-{key}", self._count)

    def _count(self) -> np.ndarray:
        counts = np.zeros(len(self), np.int32)
        with ahead(grain.MapDataset.source(self).map(len), self._config.workers) as found:
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

    def counts(self) -> np.ndarray:
        return self._documents.counts()[self._numbers]


class _Joined(Concatenated[np.ndarray]):
    def __init__(self, documents: Sequence[Documents]):
        super().__init__(documents)
        self._documents = documents

    @property
    def counts_known(self) -> bool:
        return all(part.counts_known for part in self._documents)

    def counts(self) -> np.ndarray:
        return np.concatenate([part.counts() for part in self._documents])


class Framed:
    """Documents with what begins and ends each of them: int32 [tokens]."""

    def __init__(self, documents: Documents, bos: tuple[int, ...], eos: tuple[int, ...]):
        self._documents = documents
        self._bos = np.asarray(bos, np.int32)
        self._eos = np.asarray(eos, np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.concatenate([self._bos, self._documents[int(index)], self._eos])

    @property
    def counts_known(self) -> bool:
        """Whether `counts` costs nothing."""
        return self._documents.counts_known

    @property
    def added(self) -> int:
        """Tokens of the frame."""
        return len(self._bos) + len(self._eos)

    def counts(self) -> np.ndarray:
        """Tokens of every document without its frame, int32 [documents]."""
        return self._documents.counts()


def require_some(documents: Framed, least: int) -> None:
    """Makes sure that some document has `least` tokens.

    Raises:
      DataError: none has.
    """
    if not any(len(documents[index]) >= least for index in range(len(documents))):
        raise DataError(
            f"None of the {len(documents)} documents has {least} tokens or more. Check data.text_key and the files."
        )
