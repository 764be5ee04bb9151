"""Reads datasets from the Hugging Face hub or a local folder, with the package `datasets`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quietstar_jax.data.sources.common import SET_KEY, Label, Piece, Record, names, optional_module
from quietstar_jax.errors import DataError

HUB = "hf:"
SAMPLES = 16  # rows hashed to identify a dataset


class Name(NamedTuple):
    """The parts of `hf:NAME[@REVISION][/CONFIG]:SPLIT`."""

    path: str
    config: str | None
    revision: str | None
    split: str


class HubRows:
    """The rows of a split, downloaded (or read from the cache of `datasets`) and memory-mapped."""

    def __init__(self, spec: str, key: str):
        """Loads the split; reads only the column with the field `key`."""
        self._spec = spec
        dataset = _load(spec, streaming=False)
        column = _column(spec, dataset.column_names, key)
        if not len(dataset):
            raise DataError(f"{spec} has no rows. Choose another split.")
        self._rows = dataset.select_columns([column])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return Record(f"{self._spec}, row {index}", self._rows[index])

    def __iter__(self) -> Iterator[Record]:
        return (Record(f"{self._spec}, row {number}", row) for number, row in enumerate(self._rows))

    def pieces(self) -> list[Piece]:
        last, digest = len(self) - 1, hashlib.sha256()
        for i in range(SAMPLES):
            digest.update(repr(self._rows[last * i // (SAMPLES - 1)]).encode("utf-8", "backslashreplace"))
        return [Label(self._spec, f"{len(self)} rows {digest.hexdigest()}")]


def stream_parts(spec: str, key: str) -> int:
    """Returns the number of parts of a split that can be streamed independently: its files.

    Raises:
      DataError: the dataset cannot be loaded, or lacks the column.
    """
    dataset = _load(spec, streaming=True)
    _column(spec, dataset.column_names or list(next(iter(dataset), {})), key)
    return int(dataset.num_shards)


def stream(spec: str, key: str, part: int, parts: int) -> Iterator[Record]:
    """Yields the rows of one of `parts` parts, with only the column of the field `key`; streams the data."""
    dataset = _load(spec, streaming=True)
    column = _column(spec, dataset.column_names or list(next(iter(dataset), {})), key)
    for number, row in enumerate(dataset.select_columns([column]).shard(num_shards=parts, index=part)):
        yield Record(f"{spec}, row {number} of part {part}", row)


def rows(spec: str) -> Iterator[Record]:
    """Yields the rows of a split; streams the data."""
    for number, row in enumerate(_load(spec, streaming=True)):
        yield Record(f"{spec}, row {number}", row)


def parse(spec: str) -> Name:
    """Parses `hf:OWNER/NAME[@REVISION][/CONFIG]:SPLIT` or `hf:FOLDER[/CONFIG]:SPLIT`.

    Raises:
      DataError: the spec has another form.
    """
    text = spec.removeprefix(HUB)
    match = re.fullmatch(r"(?P<path>.+):(?P<split>[A-Za-z_]\w*(\[[^\]]*\])?)", text)
    if match is None:
        raise DataError(f"{spec!r} is not `hf:NAME[/CONFIG]:SPLIT`. An example: `hf:openai/gsm8k/main:train`.")
    path, split = match["path"], match["split"]
    folder = Path(path).expanduser()
    if folder.exists():
        return Name(str(folder), None, None, split)
    if folder.parent.is_dir() and len(folder.parts) > 1 and path[:1] in "/.~":
        return Name(str(folder.parent), folder.name, None, split)
    path, _, revision = path.partition("@")
    revision, _, config = revision.partition("/")
    owner, *rest = path.split("/")
    if not revision and len(rest) > 1:
        rest, config = rest[:1], "/".join(rest[1:])
    return Name("/".join([owner, *rest]), config or None, revision or None, split)


def _load(spec: str, *, streaming: bool) -> Any:
    name = parse(spec)
    datasets = optional_module("datasets", spec)
    try:
        if any((Path(name.path) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _saved(datasets, name, streaming)
        return datasets.load_dataset(
            name.path, name.config, split=name.split, revision=name.revision, streaming=streaming
        )
    except Exception as error:  # the package raises the errors of its file systems and parsers
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(
            f"{spec} cannot be loaded: {reason}. Check name, configuration and split (`hf:OWNER/NAME/CONFIG:SPLIT`), "
            "the network, and whether you have to log in (`hf auth login`)."
        ) from error


def _saved(datasets: Any, name: Name, streaming: bool) -> Any:
    """Loads a split from a folder written by `save_to_disk`."""
    dataset = datasets.load_from_disk(name.path)
    if isinstance(dataset, datasets.DatasetDict):
        if name.split not in dataset:
            raise ValueError(f"no split {name.split!r}; it has {names(dataset)}")
        dataset = dataset[name.split]
    return dataset.to_iterable_dataset() if streaming else dataset


def _column(spec: str, columns: list[str], key: str) -> str:
    """Returns the column that contains a field."""
    column = key if key in columns else key.partition(".")[0]
    if column not in columns:
        raise DataError(f"{spec}: no field {key!r}; it has {names(columns)}. {SET_KEY}")
    return column
