"""Prepared tensorflow-datasets, stored as array_record or tfrecord, read without TensorFlow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from quietstar_jax.config import DataConfig
from quietstar_jax.data.sources.array_record import ArrayRecords
from quietstar_jax.data.sources.common import SET_KEY, Numbered, Piece, decoded, names, optional_module, text_of
from quietstar_jax.data.sources.files import local_file
from quietstar_jax.data.sources.tfrecord import Stretch, TfRecords
from quietstar_jax.errors import DataError

TFDS = "tfds:"

_PREPARE = "Prepare it: `tfds build NAME --file_format=array_record --data_dir=DIR`."
# Versions begin with a digit, splits with a letter; a split may hold a colon itself: `train[:90%]`.
_SPEC = re.compile(r"(?P<name>.+?):(?P<split>[A-Za-z_]\w*(\[[^\]]*\])?(\+\S+)?)")


class TfdsExamples:
    """The examples of a split; the text is one of their features."""

    def __init__(self, spec: str, config: DataConfig):
        self._spec = spec
        self._text_key = config.text_key
        parts = _SPEC.fullmatch(spec.removeprefix(TFDS))
        if parts is None:
            raise DataError(f"{spec!r} is not `tfds:NAME[/CONFIG[:VERSION]]:SPLIT`. An example: `tfds:gsm8k:train`.")
        tfds = optional_module("tensorflow_datasets", spec)
        directory = _prepared_directory(spec, parts["name"], Path(config.data_dir or tfds.core.constants.DATA_DIR))
        try:
            builder = tfds.builder_from_directory(str(directory))
        except Exception as error:  # JSON and protocol buffers, each with errors of its own
            raise DataError(f"{spec}: {directory} cannot be read as a dataset: {error}. {_PREPARE}") from error
        self._features = builder.info.features
        if config.text_key not in self._features:
            raise DataError(f"{spec}: no feature {config.text_key!r}; it has {names(self._features)}. {SET_KEY}")
        stretches = _stretches(spec, builder, parts["split"])
        stored = builder.info.file_format.value if builder.info.file_format else "an unknown format"
        self._records: Numbered[bytes]
        if stored == "array_record":
            self._records = ArrayRecords(stretches)
        elif stored == "tfrecord":
            self._records = TfRecords(stretches, config.cache_dir)
        else:
            raise DataError(f"{spec}: {directory} is stored as {stored}, which cannot be read here. {_PREPARE}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        where = f"{self._spec}, example {index}"
        try:
            value = self._features.deserialize_example_np(self._records[index])[self._text_key]
        except (DecodeError, KeyError) as error:
            raise DataError(f"{where} cannot be read: {error}. Copy the files again, or prepare it anew.") from error
        value = decoded(value, where) if isinstance(value, bytes) else value
        return text_of({self._text_key: value}, self._text_key, where)

    def pieces(self) -> list[Piece]:
        return self._records.pieces()


def _stretches(spec: str, builder: Any, split: str) -> list[Stretch]:
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        found = names(builder.info.splits)
        raise DataError(f"{spec}: split {split!r} cannot be read; there are {found}. ({error})") from error
    if not sum(item.take for item in instructions):
        raise DataError(f"{spec}: split {split!r} cannot be read: it is empty.")
    return [
        Stretch(local_file(Path(item.filename)), item.skip, item.take, item.examples_in_shard) for item in instructions
    ]


def _prepared_directory(spec: str, name: str, data_dir: Path) -> Path:
    """The folder with the dataset's info: the one given, or the newest version under `data_dir`."""
    path, _, version = name.partition(":")
    for root in (Path(name).expanduser(), data_dir.expanduser() / path / version):
        if (root / "dataset_info.json").is_file():
            return root
    versions = [item.parent for item in (data_dir.expanduser() / path).glob("*/dataset_info.json")]
    if versions and not version:
        return max(versions, key=lambda item: [int(part) for part in re.findall(r"\d+", item.name)])
    there = [str(item.parent.relative_to(data_dir)) for item in data_dir.glob(f"{path}/**/dataset_info.json")]
    found = f"prepared are {names(sorted(there))}" if there else "nothing of it is prepared"
    raise DataError(f"{spec}: not found in {data_dir} (data.data_dir); {found}. {_PREPARE}")
