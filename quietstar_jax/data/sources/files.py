"""Finds, reads and identifies files, local or at a URL (`gs://`, `s3://`, and all other protocols of fsspec)."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.registry import known_implementations

from quietstar_jax.errors import DataError

KINDS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "table", ".tsv": "table", ".txt": "text",
    ".md": "text", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")  # for all kinds except parquet
READABLE = (
    "Supported are .jsonl, .ndjson and .json (lines, or one array), .csv, .tsv, .txt and .md, each also with .gz, "
    ".zst, .xz or .bz2, and .parquet. The package `datasets` supports more: hf:FOLDER:SPLIT."
)
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# Files in a dataset's folder that are not text to train on.
DESCRIPTIONS = re.compile(
    r"(readme|license|licence|changelog|citation|contributing)(\..*)?"
    r"|(dataset_infos?|dataset_dict|state|metadata|features|croissant|config|manifest)\.json",
    re.IGNORECASE,
)
SAMPLE_BYTES = 1 << 12  # size of a sample that identifies a file

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|[a-z]+::")  # at least two letters: `c:` is a drive
_CHECKSUMS = ("md5Hash", "md5", "ETag", "etag", "crc32c", "sha256", "checksum")  # names in different file systems


@dataclass(frozen=True)
class File:
    """A file by its path or URL."""

    name: str  # path or URL
    size: int  # bytes

    @property
    def is_local(self) -> bool:
        return not is_url(self.name)

    @property
    def suffix(self) -> str:
        return PurePosixPath(bare_name(self.name)).suffix.lower()

    def open(self) -> IO[bytes]:
        """Opens the file for reading from the start."""
        if self.is_local:
            return Path(self.name).open("rb")
        system, path = file_system(self.name)
        stream: IO[bytes] = system.open(path, "rb")
        return stream

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes `start` .. `end` - 1; fewer if the file has become shorter."""
        if self.is_local:
            with Path(self.name).open("rb") as stream:
                stream.seek(start)
                return stream.read(end - start)
        system, path = file_system(self.name)
        content: bytes = system.cat_file(path, start=start, end=end)
        return content

    def identity(self, samples: int) -> bytes:
        """Returns size and checksum if a remote file system stores one, otherwise a hash of size and content samples.

        The modification time is not included: a copy is the same data. A change of the same length between the samples
        is not detected.
        """
        if not self.is_local:
            system, path = file_system(self.name)
            known = system.info(path)
            checksum = next((str(known[key]) for key in _CHECKSUMS if known.get(key)), None)
            if checksum is not None:
                return f"{self.size} {checksum}".encode()
        whole = self.size <= samples * SAMPLE_BYTES
        last = max(self.size - SAMPLE_BYTES, 0)
        starts = [0] if whole else sorted({last * i // max(samples - 1, 1) for i in range(samples)})
        digest = hashlib.sha256(str(self.size).encode())
        for start in starts:
            digest.update(self.read(start, self.size if whole else start + SAMPLE_BYTES))
        return digest.digest()

    def stamp(self) -> str:
        """Returns a string that changes whenever the file is rewritten; used in the names of derived files."""
        if self.is_local:
            return str(Path(self.name).stat().st_mtime_ns)
        return self.identity(2).hex()


def is_url(name: str) -> bool:
    """Whether the name is a URL, not a path."""
    return _URL.match(name) is not None


def bare_name(name: str) -> str:
    """Returns a path unchanged, and a URL without query and fragment."""
    return re.split(r"[?#]", name, maxsplit=1)[0] if re.match(r"https?://", name) else name


def file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises:
      DataError: the protocol is unknown, or its package is missing.
    """
    protocol = url.partition("::")[0].partition("://")[0]
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        advice = known_implementations.get(protocol, {}).get("err", str(error))
        raise DataError(f"Reading {url} needs another package. {advice}.") from error
    except ValueError as error:
        raise DataError(
            f"{url}: {error}. Common ones are gs:// (`pip install gcsfs`), s3:// (`pip install s3fs`), hf://, https:// "
            "(`pip install aiohttp`) and file://."
        ) from error
    return system, path


def kind_of(name: str) -> str | None:
    """Returns `json`, `table`, `text` or `parquet` according to the file's name; None for other files."""
    path = PurePosixPath(bare_name(name))
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = KINDS.get(PurePosixPath(path.stem).suffix.lower())
        return None if inner == "parquet" else inner
    return KINDS.get(suffix)


def find_files(spec: str) -> list[File]:
    """Returns the files that a path, folder, glob or URL refers to, sorted, so that the order is reproducible.

    Raises:
      DataError: there are no files, one is empty or cannot be read, or a folder has several kinds of text or splits.
    """
    files = _find_remote(spec) if is_url(spec) else _find_local(spec)
    for item in files:
        if kind_of(item.name) is None:
            raise DataError(f"{item.name} has an unsupported format. {READABLE}")
        if not item.size:
            raise DataError(f"{item.name} is empty. Remove it, or write it again.")
    return files


def one_file(name: str) -> File:
    """Returns the file at a path or URL.

    Raises:
      DataError: it does not exist or cannot be read.
    """
    if not is_url(name):
        path = Path(name)
        if not path.is_file():
            raise DataError(f"{name} is missing. Copy it again, or create it again.")
        if not os.access(path, os.R_OK):
            raise DataError(f"{name} cannot be read: permission denied. Change its permissions, or copy it.")
        return File(name, path.stat().st_size)
    system, path_there = file_system(name)
    try:
        return File(name, int(system.info(path_there)["size"]))
    except Exception as error:  # every file system has its own errors
        raise DataError(f"{name} cannot be read: {error}. Check the URL, the network, your credentials.") from error


def _find_local(spec: str) -> list[File]:
    path = Path(spec).expanduser()
    if path.is_dir():
        inside = {str(item): item.relative_to(path).parts for item in path.rglob("*") if item.is_file()}
        return [one_file(name) for name in _of_folder(spec, inside)]
    if path.is_file():
        return [one_file(str(path))]
    if not has_magic(spec):
        raise DataError(
            f"There is no file or folder {spec!r}. Check the path (relative paths start in the current folder)."
        )
    paths = sorted(item for item in map(Path, glob(str(path), recursive=True)) if item.is_file())
    if not paths:
        raise DataError(f"No file matches {spec!r}. Check the pattern; `**` matches any number of nested folders.")
    return [one_file(str(item)) for item in paths]


def _find_remote(spec: str) -> list[File]:
    system, path = file_system(spec)
    try:
        if has_magic(path) and not system.exists(path):
            listed = system.glob(path, detail=True)
            if not any(entry["type"] == "file" for entry in listed.values()):
                raise DataError(
                    f"No file matches {spec!r}. Check the pattern; `**` matches any number of nested folders."
                )
        elif system.isfile(path):
            listed = {path: system.info(path)}
        elif system.isdir(path):
            listed = system.find(path, detail=True)
            inside = {name: name.removeprefix(path).strip("/").split("/") for name in listed}
            listed = {name: listed[name] for name in _of_folder(spec, inside)}
        else:
            raise DataError(f"There is no file or folder {spec!r}. Check the URL, and your permission to read it.")
    except DataError:
        raise
    except Exception as error:  # every file system has its own errors
        raise DataError(f"{spec} cannot be listed: {error}. Check the URL, the network, your credentials.") from error
    unsized = [name for name, entry in listed.items() if entry["type"] == "file" and entry["size"] is None]
    if unsized:
        raise DataError(f"{unsized[0]}: the server does not report its size. Download it, and give the file.")
    return [
        File(system.unstrip_protocol(name), int(entry["size"]))
        for name, entry in sorted(listed.items())
        if entry["type"] == "file"
    ]


def _of_folder(folder: str, inside: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the data files of a folder, sorted; they must be of one kind and one split.

    Otherwise, a README.txt in the folder or the test split of a dataset could silently become training documents.

    Args:
      inside: file -> components of its path within the folder.

    Raises:
      DataError: there are no such files, or several kinds or splits; the message says how to choose.
    """
    texts = sorted(
        name
        for name, parts in inside.items()
        if kind_of(name) and not any(p.startswith(".") for p in parts) and not DESCRIPTIONS.fullmatch(parts[-1])
    )
    if not texts:
        raise DataError(f"The folder {folder} contains no text. {READABLE}")
    root = folder.rstrip("/")
    kinds = _grouped(texts, lambda name: str(kind_of(name)))
    if len(kinds) > 1:
        examples = ", ".join(PurePosixPath(bare_name(of_kind[0])).name for of_kind in kinds.values())
        endings = sorted({PurePosixPath(name).suffix for name in texts})
        raise DataError(
            f"The folder {folder} contains several kinds of text ({examples}). Select one with a glob: "
            f"{' or '.join(repr(f'{root}/**/*{ending}') for ending in endings)}."
        )
    splits = _grouped(texts, lambda name: _split_of(inside[name])) if "text" not in kinds else {}
    if len(splits) > 1:
        globs = (f"{root}/{'/'.join([*inside[names[0]][:-1], _starred(names, inside)])}" for names in splits.values())
        raise DataError(
            f"The folder {folder} contains several splits ({', '.join(splits)}). Select one with a glob: "
            f"{' or '.join(map(repr, globs))}."
        )
    return texts


def _grouped(names: Sequence[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _split_of(parts: Sequence[str]) -> str:
    """Returns the split named in a file's name or folder; `train` if there is none."""
    for part in reversed(parts):
        words = [word for word in re.split(r"[^a-z]+", part.lower().partition(".")[0]) if word not in ("", "of")]
        for word in words[:1] + words[-1:]:
            if word in SPLITS:
                return SPLITS[word]
    return "train"


def _starred(names: Sequence[str], inside: Mapping[str, Sequence[str]]) -> str:
    """Returns a pattern for file names with a common prefix."""
    first, last = inside[names[0]][-1], inside[names[-1]][-1]  # the names are sorted
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return first if len(names) == 1 else f"{first[:alike]}*"
