"""Reads prepared tensorflow-datasets in array_record or tfrecord format, without TensorFlow."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from quietstar_jax.data.sources.array_record import ArrayRecords
from quietstar_jax.data.sources.common import Numbered, Piece, Record, names, optional_module
from quietstar_jax.data.sources.files import file_system, is_url, one_file
from quietstar_jax.data.sources.tfrecord import Stretch, TfRecords
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

TFDS = "tfds:"
INFO, FEATURES = "dataset_info.json", "features.json"

_PREPARE = "Prepare it: `tfds build NAME --file_format=array_record --data_dir=DIR`."
# Versions begin with a digit, splits with a letter; a split may contain a colon: `train[:90%]`.
_SPEC = re.compile(r"(?P<name>.+?):(?P<split>[A-Za-z_]\w*(\[[^\]]*\])?(\+\S+)?)")


class TfdsExamples:
    """The examples of a split by number. Text features are bytes, which the caller decodes."""

    def __init__(self, spec: str, config: DataConfig):
        self._spec = spec
        parts = _SPEC.fullmatch(spec.removeprefix(TFDS))
        if parts is None:
            raise DataError(f"{spec!r} is not `tfds:NAME[/CONFIG[:VERSION]]:SPLIT`. An example: `tfds:gsm8k:train`.")
        tfds = optional_module("tensorflow_datasets", spec)
        directory = _prepared_directory(spec, parts["name"], config.data_dir or str(tfds.core.constants.DATA_DIR))
        builder = _builder(tfds, spec, directory)
        self._features = builder.info.features
        stretches = _stretches(spec, builder, parts["split"], directory)
        stored = builder.info.file_format.value if builder.info.file_format else "an unknown format"
        self._records: Numbered[bytes]
        if stored == "array_record":
            if is_url(directory):
                raise DataError(f"{spec}: array_record files must be on a local disk. Copy or mount {directory}.")
            self._records = ArrayRecords(stretches)
        elif stored == "tfrecord":
            self._records = TfRecords(stretches, config.cache_dir)
        else:
            raise DataError(f"{spec}: {directory} is stored as {stored}, which is not supported. {_PREPARE}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        where = f"{self._spec}, example {index}"
        try:
            fields = self._features.deserialize_example_np(self._records[index])
        except (DecodeError, KeyError) as error:
            raise DataError(f"{where} cannot be read: {error}. Copy the files again, or prepare them again.") from error
        return Record(where, _plain(fields))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def pieces(self) -> list[Piece]:
        return self._records.pieces()


def _plain(value: Any) -> Any:
    """Converts numpy values to plain Python values; text stays bytes."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _builder(tfds: Any, spec: str, directory: str) -> Any:
    """Returns the builder of a prepared dataset; for a URL, only its description files are downloaded."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if is_url(directory):
                system, path = file_system(directory)
                for name in (INFO, FEATURES):
                    (Path(folder) / name).write_bytes(system.cat_file(f"{path}/{name}"))
            local = folder if is_url(directory) else directory
            _require_known_features(tfds, spec, f"{directory}/{FEATURES}", Path(local) / FEATURES)
            return tfds.builder_from_directory(local)
    except DataError:
        raise
    except Exception as error:  # errors of JSON, protocol buffers and file systems
        raise DataError(f"{spec}: {directory} cannot be read as a dataset: {error}. {_PREPARE}") from error


def _require_known_features(tfds: Any, spec: str, name: str, path: Path) -> None:
    """Rejects feature classes of other packages: tensorflow_datasets would import any class that the file names.

    Raises:
      DataError: there is such a class; the message names it.
    """
    base = tfds.features.FeatureConnector
    exported = (kind for kind in vars(tfds.features).values() if isinstance(kind, type) and issubclass(kind, base))
    known = {f"{kind.__module__}.{kind.__name__}" for kind in exported}
    for feature in _feature_classes(json.loads(path.read_text("utf-8"))):
        if feature not in known:
            raise DataError(
                f"{spec}: {name} names the feature class {feature!r}, which is not one of tensorflow_datasets. Classes "
                "of other packages are code and are not imported. Prepare the dataset with features of "
                "tensorflow_datasets, or export its text as JSON lines."
            )


def _feature_classes(value: Any) -> Iterator[object]:
    """Yields the class names in a features.json under all keys that its reader accepts, also in JSON within strings."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return
    if isinstance(value, dict):
        named = ("pythonClassName", "python_class_name", *(("type",) if "content" in value else ()))
        yield from (value[key] for key in named if isinstance(value.get(key), str))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _feature_classes(inner)


def _stretches(spec: str, builder: Any, split: str, directory: str) -> list[Stretch]:
    try:
        instructions = builder.info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        splits = names(builder.info.splits)
        raise DataError(f"{spec}: split {split!r} cannot be read; there are {splits}. ({error})") from error
    if not sum(item.take for item in instructions):
        raise DataError(f"{spec}: split {split!r} cannot be read: it is empty.")
    files = (one_file(f"{directory}/{Path(item.filename).name}") for item in instructions)
    return [
        Stretch(file, item.skip, item.take, item.examples_in_shard)
        for file, item in zip(files, instructions, strict=True)
    ]


def _prepared_directory(spec: str, name: str, data_dir: str) -> str:
    """Returns the folder with the dataset's info: `name` itself, or the newest version under `data_dir`."""
    if _has_info(name):
        return name if is_url(name) else str(Path(name).expanduser())
    path, _, version = name.partition(":")
    system, root = file_system(data_dir) if is_url(data_dir) else file_system(str(Path(data_dir).expanduser()))
    folders = [folder.rpartition("/")[0] for folder in sorted(system.glob(f"{root}/{path}/**/{INFO}"))]
    versions = [folder for folder in folders if folder.rpartition("/")[0] == f"{root}/{path}"]
    candidates = [folder for folder in versions if not version or folder.endswith(f"/{version}")]
    if candidates:
        newest = max(
            candidates, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.rpartition("/")[2])]
        )
        return str(system.unstrip_protocol(newest)) if is_url(data_dir) else newest
    there = f"prepared are {names(folder.removeprefix(f'{root}/') for folder in folders)}" if folders else (
        "it is not prepared"
    )  # fmt: skip
    raise DataError(f"{spec}: not found in {data_dir} (`data.data_dir`); {there}. {_PREPARE}")


def _has_info(name: str) -> bool:
    if not is_url(name):
        return (Path(name).expanduser() / INFO).is_file()
    system, path = file_system(name)
    return bool(system.isfile(f"{path}/{INFO}"))
