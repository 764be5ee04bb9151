"""Reads folders of documents that `python -m quietstar_jax.data.prepare` tokenized in advance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quietstar_jax.data.begin_of_text import begins_with
from quietstar_jax.data.cache import cached_array
from quietstar_jax.data.sources.array_record import ArrayRecords
from quietstar_jax.data.sources.common import Label, Piece
from quietstar_jax.data.sources.files import is_url, one_file
from quietstar_jax.data.sources.tfrecord import Stretch
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data.unknown import Unknown, unknown_in_ids
from quietstar_jax.errors import DataError

PREPARED = "prepared:"
MANIFEST, PLAN, COUNTS, BEGUN = "manifest.json", "plan.json", "token_counts.npy", "begun.npy"
FORMAT = "quietstar_jax tokens 1"

_AGAIN = "Remove the folder and prepare it again with `python -m quietstar_jax.data.prepare`."


class PreparedDocuments:
    """Token ids of documents by number: int32 [tokens], without added begin or end tokens."""

    counts_known = True

    def __init__(self, folder: Path, tokenizer: Tokenizer, cache_dir: str = ""):
        """Opens a complete folder.

        Args:
          cache_dir: see `cached_array`.

        Raises:
          DataError: the folder is incomplete, damaged, or prepared with another tokenizer.
        """
        manifest = read_manifest(folder)
        check_tokenizer(folder, manifest["tokenizer"], tokenizer)
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = np.dtype(manifest["dtype"])
        self.tokens: int = manifest["tokens"]  # of all documents
        self._known_begin, self._cache_dir = manifest.get("begin"), cache_dir
        stretches = []
        for shard in manifest["shards"]:
            file, count = one_file(str(folder / shard["file"])), shard["documents"]
            if file.size != shard["bytes"]:
                raise DataError(
                    f"{file.name} has {file.size} bytes, but {shard['bytes']} according to {MANIFEST}. {_AGAIN}"
                )
            if count:
                stretches.append(Stretch(file, 0, count, count))
        self._records = ArrayRecords(stretches)
        self._tokenizer = tokenizer
        self._marks = json.dumps([shard["sha256"] for shard in manifest["shards"]])
        self._last: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int32))  # long documents are cut into many sequences
        self.counts()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        number, tokens = self._last
        if number != index:
            tokens = np.frombuffer(self._records[index], self._dtype).astype(np.int32)
            self._tokenizer.check(tokens)
            self._last = (index, tokens)
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": (-1, np.zeros(0, np.int32))}

    def pieces(self) -> list[Piece]:
        return [Label(str(self._folder), self._marks)]

    def unknown(self, index: int) -> Unknown:
        return unknown_in_ids(self._tokenizer, self[index])

    def counts(self, begin: tuple[int, ...] = ()) -> np.ndarray:
        counts = self._array(COUNTS)
        if int(counts.sum(dtype=np.int64)) != self.tokens:
            raise DataError(f"{self._folder / COUNTS} does not fit {MANIFEST}. {_AGAIN}")
        begun = self._begun(begin) if begin else np.zeros(0, np.bool_)
        return counts - len(begin) * begun.astype(np.int32) if begun.any() else counts

    def _begun(self, begin: tuple[int, ...]) -> np.ndarray:
        """Returns which documents themselves begin with these ids, bool [documents]; computed once if not stored."""
        if self._known_begin == list(begin):
            return self._array(BEGUN)
        key = hashlib.sha256(f"{self._marks} {begin}".encode()).hexdigest()

        def read() -> np.ndarray:
            return np.array([begins_with(self[index], begin) for index in range(len(self))], np.bool_)

        return cached_array(self._cache_dir, f"begun-{key}", read)

    def _array(self, name: str) -> np.ndarray:
        """Returns the content of a file with one number per document."""
        path = self._folder / name
        try:
            array: np.ndarray = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}. {_AGAIN}") from error
        if array.shape != (len(self),):
            raise DataError(f"{path} does not fit {MANIFEST}. {_AGAIN}")
        return array


def is_prepared(spec: str) -> bool:
    """Whether a source is a folder of prepared documents, complete or not."""
    if spec.startswith(PREPARED):
        return True
    if is_url(spec):
        return False
    folder = Path(spec).expanduser()
    return (folder / PLAN).is_file() or _is_manifest(folder / MANIFEST)


def prepared_folder(spec: str) -> Path:
    """Returns the folder that `prepared:FOLDER` or a plain path names.

    Raises:
      DataError: the name is a URL, or the folder does not exist.
    """
    name = spec.removeprefix(PREPARED)
    if is_url(name):
        raise DataError(f"{spec}: prepared documents must be on a local disk. Copy or mount the folder.")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"There is no folder {name!r}. Check the path (relative paths start in the current folder).")
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a complete folder after checking its fields.

    Raises:
      DataError: the folder is incomplete, or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise DataError(f"The preparation of {folder} has not finished. Run the same command again: it resumes.")
        raise DataError(f"{folder} has no {MANIFEST}: it was not written by `python -m quietstar_jax.data.prepare`.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
        shards = manifest["shards"]
        if manifest["dtype"] not in ("uint16", "uint32") or not all(
            isinstance(shard["file"], str) and isinstance(shard["sha256"], str) and "/" not in shard["file"]
            for shard in shards
        ):
            raise ValueError("a field has an impossible value")
        for name in ("documents", "tokens"):
            if sum(shard[name] for shard in shards) != manifest[name] or manifest[name] < 1:
                raise ValueError(f"{name} is not the sum over the shards")
        _ = manifest["tokenizer"]["fingerprint"], manifest["tokenizer"]["added_tokens"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path} cannot be used: {reason}. {_AGAIN}") from error
    return manifest


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the description of a tokenizer in a manifest, JSON-serializable."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.vocabulary_fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "added_tokens": dict(sorted(tokenizer.fast.get_added_vocab().items())),
    }


def check_tokenizer(folder: Path, prepared: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Checks that the run's tokenizer produces the same tokens as the one that prepared the folder.

    It may have more added tokens, such as the start and end tokens of thoughts.

    Raises:
      DataError: it is another tokenizer.
    """
    mine = describe_tokenizer(tokenizer)
    lacking = sorted(set(prepared["added_tokens"].items()) - set(mine["added_tokens"].items()))
    if prepared["fingerprint"] != mine["fingerprint"] or lacking:
        reason = f"; missing tokens: {', '.join(token for token, _ in lacking[:5])}" if lacking else ""
        raise DataError(
            f"{folder} was prepared with the tokenizer {prepared.get('name')!r} ({prepared.get('vocab_size')} tokens, "
            f"fingerprint {prepared['fingerprint'][:12]}); the run uses {tokenizer.name!r} ({tokenizer.vocab_size} "
            f"tokens, fingerprint {mine['fingerprint'][:12]}){reason}. Set data.tokenizer to the one it was prepared "
            "with, or prepare the text again."
        )


def _is_manifest(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return FORMAT.rpartition(" ")[0].encode() in stream.read(200)
