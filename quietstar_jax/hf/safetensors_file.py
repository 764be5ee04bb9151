"""Reads and writes one safetensors file: a checked header, and single tensors, without memory mapping.

The format is eight bytes of header length, a JSON header, and the concatenated tensors. The safetensors library is not
used for reading, because errors should name the damaged tensor, and because a memory-mapped checkpoint counts against
host memory as if it were loaded twice. It is not used for writing, because it needs all tensors of a file in memory at
the same time, and copies them.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quietstar_jax.errors import CheckpointError, short

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 32

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4,
    "U64": 8, "I64": 8, "C64": 8, **{name: dtype.itemsize for name, dtype in FLOAT_DTYPES.items()},
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Location, shape and dtype of one tensor in its file, known without reading the tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, ...
    file: Path
    offset: int  # bytes from the start of the file
    num_bytes: int


def file_size(file: Path) -> int:
    """Returns the size of a regular file in bytes.

    Call it before opening the file: reading from a pipe would block, and a device may never end.

    Raises:
      OSError: the file is missing.
      CheckpointError: it is not a regular file.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{file} is not a regular file. Do not trust this folder, or put a copy of the file there."
        )
    return status.st_size


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a file by name, including aliases.

    `safetensors.torch.save_model` stores tensors that share memory only once, and lists the others in `__metadata__`.

    Raises:
      CheckpointError: the file is missing, truncated, not safetensors, or its header is inconsistent.
    """
    try:
        size = file_size(file)
        with file.open("rb") as stream:
            begin = stream.read(8)
            if begin == b"version ":
                raise CheckpointError(f"{file} is a pointer of Git LFS, not the file itself. Run `git lfs pull` there.")
            length = int.from_bytes(begin, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file: {size} bytes cannot contain a header of {length}. "
                    "Fetch it again."
                )
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}. Fetch it again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken safetensors header ({error}). Fetch it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken safetensors header (not a JSON object). Fetch it again.")
    metadata = header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, 8 + length, name, fields) for name, fields in header.items()}
    _check_layout(file, 8 + length, size, list(tensors.values()))
    aliases = metadata.items() if isinstance(metadata, Mapping) else ()
    return {**{new: tensors[old] for new, old in aliases if isinstance(old, str) and old in tensors}, **tensors}


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Returns one tensor in the dtype of its file.

    Raises:
      CheckpointError: its dtype is not a float dtype, or the file cannot be read or has become shorter.
    """
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} is {info.dtype}; supported are {', '.join(FLOAT_DTYPES)}. "
            "Use a checkpoint that is not quantized."
        )
    dtype = FLOAT_DTYPES[info.dtype]
    try:
        flat = np.fromfile(info.file, np.uint8, info.num_bytes, offset=info.offset)
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {info.name} cannot be read: {error}.") from error
    if flat.size != info.num_bytes:
        raise CheckpointError(f"{info.file} ends within tensor {info.name}. Fetch it again.")
    return flat.view(dtype).reshape(info.shape)


def write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes tensors one by one from an iterable; only one is in memory at a time.

    Args:
      shapes: shape of every tensor by name, in the order of `tensors`.
      dtype: dtype of all tensors, a key of `FLOAT_DTYPES`.
      tensors: (name, array of the given shape and dtype).

    Raises:
      ValueError: a tensor does not match `shapes` or `dtype`.
      OSError: the file cannot be written.
    """
    begin = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, array), (announced, shape) in zip(tensors, shapes.items(), strict=True):
            if (name, array.shape, array.dtype) != (announced, shape, FLOAT_DTYPES[dtype]):
                raise ValueError(f"{announced} {dtype}{list(shape)} was expected, {name} {array.shape} came.")
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


class DuplicateNamesError(ValueError):
    """An object in a JSON file repeats a name, so that its value is ambiguous."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises DuplicateNamesError if a name occurs twice (hook for `json.loads`)."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = sorted(short(name, str) for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise DuplicateNamesError(f"it gives {', '.join(twice[:5])} more than once")
    return values


def _tensor_info(file: Path, start: int, name: str, fields: Any) -> TensorInfo:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: the header of tensor {short(name, str)} is broken ({what}). Fetch the file again."
        )

    if not isinstance(fields, Mapping):
        raise refuse("not an object")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str):
        raise refuse(f"dtype is {short(dtype)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape) or not _fits_numpy(shape):
        raise refuse(f"shape is {short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise refuse(f"data_offsets is {short(offsets)}")
    begin, end = offsets
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise refuse(f"{dtype}{shape} does not fit in {end - begin} bytes")
    return TensorInfo(name, tuple(shape), dtype, file, start + begin, end - begin)


def _fits_numpy(shape: list[int]) -> bool:
    """Whether numpy supports this shape; the limits hold even for empty tensors."""
    return len(shape) <= MAX_DIMENSIONS and math.prod(max(n, 1) for n in shape) <= 2**56


def _check_layout(file: Path, start: int, size: int, tensors: list[TensorInfo]) -> None:
    """Checks that the tensors fill the file up to its end, without gaps or overlaps."""
    position = start
    for info in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if info.num_bytes < 0 or info.offset != position:
            raise CheckpointError(
                f"{file}: tensor {info.name} begins at byte {info.offset} where {position} was expected: it overlaps "
                "another or leaves a gap. Fetch the file again."
            )
        position += info.num_bytes
        if position > size:
            raise CheckpointError(
                f"{file} is truncated: it ends at byte {size}, within tensor {info.name}. Fetch it again."
            )
    if position != size:
        raise CheckpointError(f"{file} has {size - position} bytes that belong to no tensor. Fetch it again.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
