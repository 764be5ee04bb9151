"""Reads a checkpoint without starting the run: its configuration, and its weights a few layers at a time.

Needs no accelerator, and works for checkpoints written on any mesh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.steps import absolute, saved_steps, whole_step
from quietstar_jax.checkpoint.stored_arrays import UNREADABLE, first_line, open_arrays
from quietstar_jax.checkpoint.train_state import OBJECTIVE
from quietstar_jax.config import Config
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.hf.names import Shape, Target
from quietstar_jax.io import folder_to_read
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.settings import from_mapping
from quietstar_jax.thoughts.settings import Vocabulary


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run."""

    workdir: Path | epath.Path  # contains tokenizer/, metrics.jsonl and summary.json
    step: int
    config: Config
    architecture: Architecture
    vocabulary: Vocabulary
    model_commit: str  # commit of the hub id that training began from, or empty
    generation: Mapping[str, Any]  # generation_config.json of the checkpoint that training began from
    license: Mapping[str, str]  # of the checkpoint that training began from, as in `CheckpointFiles`
    base: Mapping[str, Any]  # fingerprint of the weights that training began from
    base_folder: str  # absolute path of their folder when training began or resumed; empty for a hub id
    parameters: StoredParameters

    @property
    def checksum(self) -> str:
        """Identifies this checkpoint: SHA-256 of its manifest, or of its configuration if it has no manifest."""
        folder = self.parameters.folder.parent
        return hashlib.sha256(
            (folder / (manifest.NAME if manifest.exists(folder) else manifest.CONFIG)).read_bytes()
        ).hexdigest()


class StoredParameters:
    """The parameters of an orbax checkpoint, read layer by layer.

    Memory is needed only for the layers of a parameter that one stored chunk holds.
    """

    def __init__(self, folder: epath.Path):
        """Opens every array.

        Raises:
          CheckpointError: the folder is not an orbax checkpoint, or is damaged.
        """
        self.folder = folder
        try:
            self._arrays = open_arrays(folder)
        except UNREADABLE as error:
            raise CheckpointError(f"{folder} cannot be read: {first_line(error)}. Choose another step.") from error
        self.shapes: Mapping[str, Shape] = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self._piece: tuple[str, int, np.ndarray] = ("", 0, np.empty(0))  # last chunk read: (path, first layer, layers)

    def read(self, target: Target) -> np.ndarray:
        """Returns a parameter, or one layer of it, in the dtype of the checkpoint.

        Raises:
          CheckpointError: its bytes are missing or damaged.
        """
        if target.layer is None:
            return self._read(target.path, self._arrays[target.path])
        path, first, layers = self._piece
        if path != target.path or not first <= target.layer < first + len(layers):
            self._piece = ("", 0, np.empty(0))  # freed before the next chunk is read
            array = self._arrays[target.path]
            span = max(1, array.chunk_layout.read_chunk.shape[0])
            first = target.layer // span * span
            layers = self._read(target.path, array[first : min(first + span, array.shape[0])])
            self._piece = (target.path, first, layers)
        return layers[target.layer - first]

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Returns the parameters with these paths, all or some, in these dtypes and shardings.

        Raises:
          CheckpointError: a parameter is missing, or its bytes are missing or damaged.
        """
        if absent := [name for name in abstract if name not in self.shapes]:  # orbax would return only their shapes
            raise CheckpointError(f"{self.folder} has no parameter {', '.join(absent[:3])}. Choose another step.")
        args = ocp.args.PyTreeRestore(
            item=dict(abstract),
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(self.folder, args=args)
        except UNREADABLE as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}\nChoose another step.") from error

    def _read(self, path: str, array: Any) -> np.ndarray:
        try:
            return array.read().result()
        except UNREADABLE as error:
            raise CheckpointError(f"{self.folder}: parameter {path} cannot be read: {first_line(error)}") from error


def open_run(checkpoint: Path, step: int | None = None) -> RunCheckpoint:
    """Opens a checkpoint after checking all of its files except those of the optimizer; the folder is not modified.

    Args:
      checkpoint: a run's work directory, or the `checkpoints` folder in it.
      step: step of the checkpoint; None = the newest.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged; the message names the newest undamaged step.
    """
    folder = _checkpoints_folder(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint} is not a folder. Give a run's work directory, or the checkpoints folder in it."
        )
    step = whole_step(folder, step, leave_out=("opt_state", OBJECTIVE))
    record_file = folder / str(step) / "config" / "metadata"
    try:
        record = json.loads(record_file.read_text("utf-8"))
        return RunCheckpoint(
            workdir=folder.parent,
            step=step,
            config=_config(record["config"]),
            architecture=from_mapping(Architecture, record["architecture"], root="architecture"),
            vocabulary=_vocabulary(record["vocabulary"] | {"unused": record.get("unused_ids", [])}),
            model_commit=record["model_commit"],
            generation=record.get("generation", {}),
            license=record.get("license", {}),
            base=record.get("base", {}),
            base_folder=record.get("base_folder", ""),
            parameters=StoredParameters(folder / str(step) / "params"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{record_file} does not describe a run of this program: {error}. Choose another step."
        ) from error


def named_run(checkpoint: str) -> Path | None:
    """Returns the folder of the run that `config.model.checkpoint` names; None if it names a Hugging Face checkpoint.

    Raises:
      ConfigError: the name is a URL.
    """
    if "://" in checkpoint:
        raise ConfigError(
            f"config.model.checkpoint {checkpoint} is a URL; it must be a local folder or a hub id. Copy the folder to "
            "a local disk first."
        )
    folder = Path(checkpoint).expanduser()
    return folder if is_run(folder) else None


def is_run(path: Path) -> bool:
    """Whether `open_run` accepts the folder. True also for a work directory without a checkpoint yet."""
    if (path / "checkpoints").is_dir():
        return True
    return path.is_dir() and not (path / "config.json").exists() and bool(saved_steps(absolute(path)))


def run_tokenizer(run: RunCheckpoint) -> Tokenizer:
    """Loads the tokenizer stored with a run.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    folder = run.workdir / "tokenizer"
    try:
        with folder_to_read(folder) as local:
            return load_tokenizer(str(local))
    except (DataError, OSError) as error:
        raise CheckpointError(
            f"The tokenizer of the run in {folder} cannot be used: {error} Copy the complete run."
        ) from error


def _config(record: dict[str, Any]) -> Config:
    """The configuration of a run.

    A reward or an advantage that this process has not registered keeps its name: only training calls the function.
    """
    thought = record.get("thought", {})
    own = {
        name: thought[name]
        for name, registry in (("reward", REWARDS), ("advantage", ADVANTAGES))
        if str(thought.get(name, "")).isidentifier() and thought[name] not in registry
    }
    known = {name: value for name, value in thought.items() if name not in own}
    config = from_mapping(Config, record | {"thought": known})
    return dataclasses.replace(config, thought=dataclasses.replace(config.thought, **own))


def _vocabulary(record: dict[str, Any]) -> Vocabulary:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    first = fields["start_tokens"]  # in a record from before there was `start_token`
    fields.setdefault("start_token", first[0] if len(first) == 1 else None)
    return Vocabulary(**fields)


def _checkpoints_folder(path: Path) -> epath.Path:
    inside = path / "checkpoints"
    return absolute(inside if inside.is_dir() else path)
