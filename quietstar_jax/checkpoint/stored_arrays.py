"""Opens the arrays of a checkpoint item one by one, without a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tensorstore
from etils import epath

# The errors that tensorstore and the code around it raise if a file is missing or damaged.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, NotImplementedError, RuntimeError)


def open_arrays(folder: epath.Path) -> dict[str, Any]:
    """Returns the tensorstore arrays of an item such as `params`, by dotted path.

    Raises one of `UNREADABLE` if the item is missing or damaged.
    """
    described = json.loads((folder / "_METADATA").read_bytes())
    items = [item for item in described["tree_metadata"].values() if item["value_metadata"]["value_type"] != "None"]
    names = [".".join(str(key["key"]) for key in item["key_metadata"]) for item in items]
    return {name: _open(folder, name, described) for name in names}


def unreadable(folder: epath.Path, part: int = 0, parts: int = 1) -> str:
    """Describes why an item of a step without a manifest cannot be read; empty if its arrays can be read.

    Reads every `parts`-th array, starting at number `part`, one stored chunk along the first axis at a time.
    """
    try:
        for array in list(open_arrays(folder).values())[part::parts]:
            if not array.rank:
                array.read().result()
                continue
            span = max(1, array.chunk_layout.read_chunk.shape[0])
            for first in range(0, array.shape[0], span):
                array[first : min(first + span, array.shape[0])].read().result()
    except UNREADABLE as error:
        return f"{folder.name}: {first_line(error)}"
    return ""


def first_line(error: Exception) -> str:
    """Returns the first line of a library's error, short enough for a message."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [tensorstore_spec")[0][:300]


def _open(folder: epath.Path, name: str, described: Mapping[str, Any]) -> Any:
    base = folder.as_posix() if "://" in str(folder) else folder.as_uri()
    store: dict[str, Any] = {"driver": "ocdbt", "base": f"{base}/", "path": name + "/"}
    if not described.get("use_ocdbt", False):
        store = {"driver": "file", "path": f"{folder / name}/"}
    driver = "zarr3" if described.get("use_zarr3", False) else "zarr"
    return tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
