"""Reads a Hugging Face checkpoint folder: config.json, and tensors one at a time. Never executes code from it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from quietstar_jax.errors import CheckpointError, short
from quietstar_jax.hf.canonical import canonical_names, tie
from quietstar_jax.hf.config_json import text_config
from quietstar_jax.hf.folder_kinds import adapter_advice, describe_folder
from quietstar_jax.hf.generation import LEGACY_GENERATION
from quietstar_jax.hf.json_file import MAX_JSON_BYTES, read_json
from quietstar_jax.hf.safetensors_file import (
    TensorInfo,
    read_header,
    read_tensor,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
TEXT_FILES = (
    "config.json", "generation_config.json", "*.index.json", "adapter_config.json", "tokenizer*", "*.model", "*.jinja",
    "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
MAX_LINES = 8  # lines of a list in a message
MAX_NAME_BYTES = 255  # limit of common file systems for one component of a path
DOWNLOADED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "README.md"]
NOT_DOWNLOADED = ["*/*", "*.bin", "*.pt", "*.pth", "*.pkl"]  # copies in subfolders, and pickled files
# Values of a model card that are copied; a link may not lead to another file of that repository.
LICENSE = {"license": r"[\w.+-]+", "license_name": r"[\w.+-]+", "license_link": r"https?://[\w./%+-]+"}


@dataclass(frozen=True)
class CheckpointFiles:
    """A folder with config.json and safetensors. Shapes are known; weights are not read yet."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    commit: str = ""  # of a hub id: the commit that `revision` resolved to
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json, or its fields in config.json
    license: Mapping[str, str] = field(default_factory=dict)  # of the model card: license, license_name, license_link

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in the dtype of its file (float16, bfloat16, float32 or float64).

        Raises:
          CheckpointError: there is no such tensor, its dtype is not a float dtype, or its file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        return read_tensor(self.tensors[name])


def open_checkpoint(name: str, revision: str = "") -> CheckpointFiles:
    """Opens a local folder, or downloads a model from the hub (cached and resumable) and opens it.

    Args:
      name: a folder, or a hub id such as `mistralai/Mistral-7B-v0.1`.
      revision: branch, tag or commit of a hub id; empty = its default branch.

    Raises:
      CheckpointError: the checkpoint is missing, incomplete or damaged; the message names the file and tensor.
    """
    folder = Path(os.path.expanduser(name))
    local = name != "" and os.path.isdir(folder)
    if local and revision:
        raise CheckpointError(f"{name} is a folder and has no revision {revision!r}. Leave the revision empty.")
    if not local:
        folder = download(name, revision)
    check_regular(folder)
    expected, files = _weight_files(folder)
    config = text_config(read_json(folder / "config.json"))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for tensor, info in read_header(file).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"Tensor {tensor} is in both {tensors[tensor].file} and {file}. Remove the shard that does not "
                    "belong to this checkpoint."
                )
            tensors[tensor] = info
    strayed = [
        f"{short(tensor, str)}, listed in {short(file.name, str)}"
        for tensor, file in expected.items()
        if tensor not in tensors or tensors[tensor].file != file
    ]
    if strayed:
        raise CheckpointError(
            listing(f"{folder / INDEX} names tensors that are not in their shards:", strayed)
            + "\nFetch the checkpoint again."
        )
    config, tensors = tie(folder, config, canonical_names(folder, tensors), read_tensor)
    generation = folder / "generation_config.json"
    return CheckpointFiles(
        folder,
        config,
        tensors,
        commit="" if local else folder.name,
        generation=read_json(generation)
        if generation.exists()
        else {k: config[k] for k in LEGACY_GENERATION & config.keys()},
        license=_license(folder / "README.md"),
    )


def _license(card: Path) -> dict[str, str]:
    """Returns the fields about the licence in the front matter of a model card; empty if there are none."""
    from huggingface_hub import metadata_load

    try:
        fields = metadata_load(card) or {}
    except Exception:  # no such file, or front matter that is not YAML
        return {}
    found = {name: fields.get(name) for name in LICENSE}
    return {k: v for k, v in found.items() if isinstance(v, str) and re.fullmatch(LICENSE[k], v)}


def check_regular(folder: Path) -> None:
    """Checks that no read of a file in the folder would block or never end.

    Raises:
      CheckpointError: an entry is a pipe, a socket or a device, or a text file of a model is implausibly large.
    """
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except OSError:  # a dangling link; reported as missing if it is read
            continue
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise CheckpointError(
                f"{folder / entry.name} is not a regular file. Do not trust this folder, or put a copy of the "
                "file there."
            )
        if status.st_size > MAX_JSON_BYTES and any(fnmatch(entry.name, pattern) for pattern in TEXT_FILES):
            raise CheckpointError(
                f"{folder / entry.name} has {status.st_size} bytes; a file of this name is read up to "
                f"{MAX_JSON_BYTES}. Fetch it again."
            )


def listing(title: str, lines: Sequence[str]) -> str:
    """Returns a title and the first lines of a list, with the number of omitted lines."""
    more = [f"  - and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join([title, *(f"  - {line}" for line in lines[:MAX_LINES]), *more])


def download(name: str, revision: str = "") -> Path:
    """Returns the cached folder of a hub id; downloads it if necessary (only JSON, safetensors and tokenizer files).

    Raises:
      CheckpointError: the name is not a hub id, or the download fails.
    """
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name
    if looks_like_path or os.path.exists(name):
        raise CheckpointError(
            f"{short(name)} is not a folder. Give a run's work directory, a Hugging Face folder, or a hub id "
            "such as NAME/MODEL."
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED
            )
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{name!r} is not a folder here, and could not be downloaded from the hub{at}: {error}\n"
            "Check the spelling, the network and, for gated models, `hf auth login`; or give a local folder."
        ) from error


def _weight_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Returns (file of each tensor according to the index, weight files); without an index, the mapping is empty."""
    has_weights = any(os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    if not has_weights:
        raise CheckpointError(f"{folder} is not a model in safetensors: {describe_folder(folder)}")
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} contains both a model and a PEFT adapter, which transformers would load instead of the model. "
            f"Remove {ADAPTER} to use the model alone. For the adapter: {adapter_advice(folder)}."
        )
    if (folder / SINGLE).exists():
        return {}, [folder / SINGLE]
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map. Fetch it again.")
    expected = {tensor: _shard(folder, tensor, file) for tensor, file in weight_map.items()}
    files = sorted(set(expected.values()))
    missing = [short(file.name, str) for file in files if not os.path.isfile(file)]
    if missing:
        more = f" and {len(missing) - MAX_LINES} more" if len(missing) > MAX_LINES else ""
        shown = ", ".join(missing[:MAX_LINES]) + more
        raise CheckpointError(f"{folder}: shards of the index are missing: {shown}. Fetch them.")
    return expected, files


def _shard(folder: Path, tensor: str, file: Any) -> Path:
    """Returns the path of a shard named in the index; the path must be inside the folder."""
    unsafe = not isinstance(file, str) or "\0" in file or "\\" in file or bool(PureWindowsPath(file).drive)
    path = PurePosixPath("" if unsafe else file)
    lengths = [len(part.encode("utf-8", "surrogatepass")) for part in path.parts]
    unsafe = unsafe or len(lengths) > 10 or max(lengths, default=0) > MAX_NAME_BYTES
    if unsafe or path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
        raise CheckpointError(
            f"{folder / INDEX} places tensor {short(tensor, str)} in {short(file)}. It must be a .safetensors file "
            "inside the folder: do not trust this checkpoint."
        )
    return folder / path
