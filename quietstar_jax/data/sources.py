"""Documents from anywhere, by number: JSON lines, text, parquet, tensorflow-datasets, the embedded corpus.

Every source can be pickled for worker processes and keeps only an index of its files in memory (compressed JSON
lines excepted: those are decompressed into memory once per process).
"""

from __future__ import annotations

import bisect
import gzip
import importlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

from quietstar_jax.config import DataConfig
from quietstar_jax.errors import DataError

SYNTHETIC = "synthetic"
TFDS = "tfds:"
KINDS = {".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")  # of JSON lines
SCAN_BYTES = 1 << 24  # read at a time while lines are being found
ROW_GROUP_BYTES = 1 << 29  # parquet row groups kept in memory, per file

_READABLE = "Readable are .jsonl and .json lines (also with .gz or .zst), .txt, .md and .parquet."
_RECODE = "Convert it to UTF-8, for example with `iconv -t UTF-8`."
_SET_KEY = "Set data.text_key to the field that holds the text."
_PREPARE = "Prepare it as array_record: `tfds build NAME --file_format=array_record --data_dir=DIR`."

Split = Literal["train", "validation"]


class RandomAccessSource(Protocol):
    """Documents by number. Thread-safe to read, picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_sources(specs: Sequence[str], config: DataConfig, *, split: Split, seed: int) -> RandomAccessSource:
    """One source after another, as one. Arguments and errors as in `open_source`."""
    if not specs:
        raise DataError(f"No {split} sources are given. Set data.{split} to files, folders, tfds names or `synthetic`.")
    return _concatenated([open_source(spec, config, split=split, seed=seed) for spec in specs])


def open_source(spec: str, config: DataConfig, *, split: Split, seed: int) -> RandomAccessSource:
    """Opens a source of documents.

    Args:
      spec: a file, a folder or a glob of .jsonl/.json lines (also .gz, .zst), .txt/.md (one document a file) or
        .parquet; `tfds:NAME[/CONFIG[:VERSION]]:SPLIT` or `tfds:FOLDER:SPLIT` of a prepared dataset; `synthetic`.
      config: `text_key` names the field with the text, `data_dir` where tfds datasets are.
      split, seed: which documents of the embedded corpus; other sources ignore them.

    Raises:
      DataError: here for what is missing, empty or of an unknown kind; by the source for a broken document.
    """
    if spec == SYNTHETIC:
        from quietstar_jax.data.synthetic import SyntheticSource

        embedded: RandomAccessSource = SyntheticSource(config.synthetic, split=split, seed=seed)
        return embedded
    if spec.startswith(TFDS):
        return TfdsExamples(spec, config.data_dir, config.text_key)
    sources: list[RandomAccessSource] = []
    for kind, paths in itertools.groupby(_find_files(spec), _kind):
        if kind == "text":
            sources.append(TextFiles(list(paths)))
        elif kind == "json":
            sources += [JsonLines(path, config.text_key) for path in paths]
        else:
            sources += [ParquetRows(path, config.text_key) for path in paths]
    return _concatenated(sources)


class TextFiles:
    """Each file is one document."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        for path in paths:
            _require_content(path)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> str:
        path = self._paths[index]
        return _decoded(path.read_bytes(), str(path)).removeprefix("\ufeff")


class JsonLines:
    """Each line is a JSON object with the document under one key. Lines are found by byte offset."""

    def __init__(self, path: Path, text_key: str):
        self._path = path
        self._text_key = text_key
        self._content: bytes | None = None  # decompressed; None until it is read in this process
        _require_content(path)
        with self._open() as stream:
            self._ends = _line_ends(stream)
        if not len(self._ends):
            raise DataError(f"{path} decompresses to nothing. Remove it, or write it anew.")
        # Blank lines are found at the door: no object is shorter than `{}`. Broken ones cost a parse of the whole file.
        lengths = np.diff(self._ends, prepend=0)
        short = np.flatnonzero(lengths <= 2)
        self[int(short[0]) if len(short) else 0]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        with self._open() as stream:
            stream.seek(start)
            raw = stream.read(int(self._ends[index]) - start)
        where = f"{self._path}, line {index + 1}"
        try:
            record = json.loads(_decoded(raw, where, start))
        except (ValueError, RecursionError) as error:
            if not raw.strip():
                raise DataError(f"{where}: the line is blank. Remove it; every line holds one JSON object.") from error
            raise DataError(
                f"{where}: broken JSON ({error}). Every line holds one JSON object; one large JSON array has to be "
                "written out as lines."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__}, not an object. Write {{{self._text_key!r}: ...}}."
            )
        return _text_of(record, self._text_key, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_content": None}  # a worker process decompresses its own copy

    def _open(self) -> IO[bytes]:
        if self._path.suffix.lower() not in COMPRESSIONS:
            return self._path.open("rb")
        if self._content is None:
            self._content = _decompressed(self._path)
        return io.BytesIO(self._content)


class ParquetRows:
    """Each row is a document. Row groups are read when one of their rows is.

    Shuffled reading costs a row group for almost every document once the file has more of them than fit in
    `ROW_GROUP_BYTES`: JSON lines are the better format for training on a large corpus.
    """

    def __init__(self, path: Path, text_key: str):
        self._path = path
        self._text_key = text_key
        self._groups: dict[int, Any] = {}
        _require_content(path)
        pyarrow = _optional_module("pyarrow", str(path))
        file = self._open()
        schema = file.schema_arrow
        if text_key not in schema.names:
            raise DataError(f"{path}: no column {text_key!r}; it has {_names(schema.names)}. {_SET_KEY}")
        kind = schema.field(text_key).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
            raise DataError(f"{path}: column {text_key!r} holds {kind}, not text. {_SET_KEY}")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        largest = max((group.total_byte_size for group in groups), default=0)
        self._most_groups = max(1, ROW_GROUP_BYTES // (largest + 1))
        if not len(self):
            raise DataError(f"{path} has no rows. Remove it, or write it anew.")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        group = self._groups.get(number)
        if group is None:
            group = self._open().read_row_group(number, columns=[self._text_key]).column(0)
            if len(self._groups) >= self._most_groups:
                self._groups.pop(next(iter(self._groups)), None)
            self._groups[number] = group
        where = f"{self._path}, row {index + 1}"
        try:
            value = group[index - (self._ends[number - 1] if number else 0)].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 at byte {error.start} of the text. {_RECODE}") from error
        return _text_of({self._text_key: value}, self._text_key, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}}

    def _open(self) -> Any:
        parquet = _optional_module("pyarrow.parquet", str(self._path))
        try:
            return parquet.ParquetFile(self._path)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise DataError(f"{self._path} cannot be read as parquet: {error} Write or copy it anew.") from error


class TfdsExamples:
    """A prepared tensorflow-datasets split in array_record format, read without TensorFlow."""

    def __init__(self, spec: str, data_dir: str, text_key: str):
        self._spec = spec
        self._text_key = text_key
        # Versions begin with a digit, splits with a letter; a split may hold a colon itself: `train[:90%]`.
        parts = re.fullmatch(r"(?P<name>.+?):(?P<split>[A-Za-z_]\w*(\[[^\]]*\])?(\+\S+)?)", spec.removeprefix(TFDS))
        if parts is None:
            raise DataError(f"{spec!r} is not `tfds:NAME[/CONFIG[:VERSION]]:SPLIT`. An example: `tfds:gsm8k:train`.")
        tfds = _optional_module("tensorflow_datasets", spec)
        directory = _prepared_directory(spec, parts["name"], Path(data_dir or tfds.core.constants.DATA_DIR))
        builder = tfds.builder_from_directory(str(directory))
        stored = builder.info.file_format.value if builder.info.file_format else "an unknown format"
        if stored != "array_record":
            raise DataError(f"{spec}: {directory} is stored as {stored}, which needs TensorFlow. {_PREPARE}")
        try:
            self._examples = builder.as_data_source(split=parts["split"])
        except (ValueError, KeyError) as error:
            splits = _names(builder.info.splits)
            raise DataError(
                f"{spec}: split {parts['split']!r} cannot be read; there are {splits}. ({error})"
            ) from error
        if text_key not in builder.info.features:
            raise DataError(f"{spec}: no feature {text_key!r}; it has {_names(builder.info.features)}. {_SET_KEY}")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        where = f"{self._spec}, example {index}"
        value = self._examples[index][self._text_key]
        value = _decoded(value, where) if isinstance(value, bytes) else value
        return _text_of({self._text_key: value}, self._text_key, where)


class Concatenated:
    """One source after another."""

    def __init__(self, sources: Sequence[RandomAccessSource]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number][index - (self._ends[number - 1] if number else 0)]


def _concatenated(sources: Sequence[RandomAccessSource]) -> RandomAccessSource:
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def _kind(path: Path) -> str | None:
    """json, text or parquet by the file's name; None where it is neither."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = KINDS.get(Path(path.stem).suffix.lower())
        return inner if inner == "json" else None
    return KINDS.get(suffix)


def _find_files(spec: str) -> list[Path]:
    """The files that a file, folder or glob stands for, sorted: the order must not depend on the file system."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _files_in_folder(path)
    if path.is_file():
        found = [path]
    elif has_magic(spec):
        found = sorted(item for item in map(Path, glob(str(path), recursive=True)) if item.is_file())
        if not found:
            raise DataError(f"No file matches {spec!r}. Check the pattern; `**` stands for any depth of folders.")
    else:
        raise DataError(f"There is no file or folder {spec!r}. Check the path (sources are relative to where you run).")
    for item in found:
        if _kind(item) is None:
            raise DataError(f"{item} is of a kind that cannot be read. {_READABLE}")
    return found


def _files_in_folder(folder: Path) -> list[Path]:
    everything = ((item, item.relative_to(folder).parts) for item in folder.rglob("*") if item.is_file())
    found = sorted(item for item, parts in everything if _kind(item) and not any(part[0] == "." for part in parts))
    if not found:
        raise DataError(f"The folder {folder} holds no text. {_READABLE}")
    kinds = sorted({str(_kind(item)) for item in found})
    if len(kinds) > 1:
        # A README.txt beside the corpus would quietly become a training document.
        examples = ", ".join(next(item.name for item in found if _kind(item) == kind) for kind in kinds)
        raise DataError(
            f"The folder {folder} holds several kinds of text ({examples}). Say which is meant with a glob, "
            f"for example {str(folder / '*.jsonl')!r}."
        )
    return found


def _require_content(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: permission denied. Change its permissions, or copy it.")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty. Remove it, or write it anew.")


def _line_ends(stream: IO[bytes]) -> np.ndarray:
    """Byte offsets one past the end of every line, the newline included: int64 [lines]."""
    found, position = [], 0
    while chunk := stream.read(SCAN_BYTES):
        found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1)
        position += len(chunk)
    ends = np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.int64)
    unterminated = position and (not len(ends) or ends[-1] != position)
    return np.append(ends, position) if unterminated else ends


def _decompressed(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        if path.suffix.lower() == ".gz":
            return gzip.decompress(raw)
        zstandard = _optional_module("zstandard", str(path))
        parts = []
        while raw:  # a file may be several frames; a stream reader would take a cut-off one for the end
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(raw))
            if not frame.eof:
                raise EOFError("the file ends in the middle of a frame")
            raw = frame.unused_data
        return b"".join(parts)
    except Exception as error:
        if isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError":
            raise DataError(f"{path} cannot be decompressed: {error}. Compress or copy it anew.") from error
        raise


def _decoded(raw: bytes, where: str, start: int = 0) -> str:
    """UTF-8 text; `start` is where in the file the bytes begin."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {start + error.start}. {_RECODE}") from error


def _text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text of one document, checked."""
    if key not in record:
        raise DataError(f"{where}: no key {key!r}; it has {_names(record)}. {_SET_KEY}")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds {type(text).__name__}, not text. {_SET_KEY}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell what no tokenizer takes
            raise DataError(
                f"{where}: character {error.start} is half of a surrogate pair. Repair the text."
            ) from error
    return text


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
    found = f"prepared are {_names(sorted(there))}" if there else "nothing of it is prepared"
    raise DataError(f"{spec}: not found in {data_dir} (data.data_dir); {found}. {_PREPARE}")


def _names(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _optional_module(name: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise DataError(f"Reading {needed_by} needs {package}: `pip install {package}`. ({error})") from error
