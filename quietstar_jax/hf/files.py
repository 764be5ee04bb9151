"""A Hugging Face checkpoint folder: its config.json and its tensors, one at a time. Nothing in it is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from quietstar_jax.errors import CheckpointError
from quietstar_jax.hf.safetensors_file import TensorInfo, read_header, read_tensor, unique_keys

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
NOT_DOWNLOADED = ["*/*", "*.bin", "*.pt", "*.pth", "*.pkl"]  # copies in subfolders, and anything pickled


@dataclass(frozen=True)
class CheckpointFiles:
    """A folder with config.json and safetensors; shapes are known, weights not yet read."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    commit: str = ""  # of a hub id: what `revision` stood for
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json, where there is one

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype of its file (float16, bfloat16, float32 or float64).

        Raises:
          CheckpointError: there is none of that name, it is not of a float dtype, or its file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        return read_tensor(self.tensors[name])


def open_checkpoint(name: str, revision: str = "") -> CheckpointFiles:
    """Opens a local folder, or downloads a hub id (cached, resumed) and opens that.

    Args:
      name: a folder, or a hub id such as `mistralai/Mistral-7B-v0.1`.
      revision: branch, tag or commit of a hub id; empty = its default branch.

    Raises:
      CheckpointError: it is missing, incomplete or broken; names the file and tensor.
    """
    folder = Path(os.path.expanduser(name))
    local = name != "" and folder.is_dir()
    if local and revision:
        raise CheckpointError(f"{name} is a folder and has no revision {revision!r}. Leave the revision empty.")
    if not local:
        folder = download(name, revision)
    tensors: dict[str, TensorInfo] = {}
    config = read_json(folder / "config.json")
    expected, files = _weight_files(folder)
    for file in files:
        for tensor, info in read_header(file).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"Tensor {tensor} is in both {tensors[tensor].file} and {file}. Remove the shard that does not "
                    "belong to this checkpoint."
                )
            tensors[tensor] = info
    strayed = [
        f"{tensor}, promised in {file.name}"
        for tensor, file in expected.items()
        if tensor not in tensors or tensors[tensor].file != file
    ]
    if strayed:
        raise CheckpointError(
            f"{folder / INDEX} names tensors that are not in their shards:\n"
            + "\n".join(f"  - {line}" for line in strayed)
            + "\nFetch the checkpoint again."
        )
    generation = folder / "generation_config.json"
    return CheckpointFiles(
        folder,
        config,
        tensors,
        commit="" if local else folder.name,
        generation=read_json(generation) if generation.exists() else {},
    )


def download(name: str, revision: str = "") -> Path:
    """The folder of a hub id in the local cache, fetched if need be: JSON, safetensors and tokenizer only.

    Raises:
      CheckpointError: it is not a hub id, or cannot be fetched.
    """
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name
    if looks_like_path or Path(name).exists():
        raise CheckpointError(
            f"{name!r} is not a folder. Give a run's work directory, a Hugging Face folder, or a hub id "
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
            f"{name!r} is not a folder here, and could not be fetched from the hub{at}: {error}\n"
            "Check the spelling, the network and, for gated models, `hf auth login`; or give a local folder."
        ) from error


def _weight_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """(tensor -> file as the index says, files); without an index nothing is promised."""
    if (folder / SINGLE).exists():
        return {}, [folder / SINGLE]
    if not (folder / INDEX).exists():
        others = sorted(
            file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".safetensors")
        )
        found = f" It has {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}.{found} Only safetensors are read, never pickled weights: "
            "fetch them, or convert with save_pretrained of transformers."
        )
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map. Fetch it again.")
    expected = {tensor: _shard(folder, tensor, file) for tensor, file in weight_map.items()}
    files = sorted(set(expected.values()))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks shards that its index names: {', '.join(missing)}. Fetch them.")
    return expected, files


def _shard(folder: Path, tensor: str, file: Any) -> Path:
    """A path of the index, which may not leave the folder."""
    unsafe = not isinstance(file, str) or "\0" in file or "\\" in file or bool(PureWindowsPath(file).drive)
    path = PurePosixPath("" if unsafe else file)
    if unsafe or path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
        raise CheckpointError(
            f"{folder / INDEX} places tensor {tensor} in {file!r}. It takes a .safetensors file inside the folder: "
            "do not trust this checkpoint."
        )
    return folder / path


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: it is missing, cannot be read, or is no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Give a complete Hugging Face folder.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object. Fetch it again.")
    return value
