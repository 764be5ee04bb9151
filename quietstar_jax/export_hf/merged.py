"""The parameters of a run with adapters, merged with its base and read one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint
from quietstar_jax.export_hf.save import Parameters
from quietstar_jax.hf.files import CheckpointFiles
from quietstar_jax.hf.names import Shape, Target, decoder_entries, parameter_shapes, quietstar_entries, to_ours
from quietstar_jax.models.adapters import A, B
from quietstar_jax.models.parameters import stored_dtype
from quietstar_jax.training.base import can_think, open_base_again
from quietstar_jax.training.base_record import RecordedBase


def merged_parameters(run: RunCheckpoint) -> Parameters:
    """Returns the parameters of the equivalent model without adapters.

    Raises:
      CheckpointError: the base of the adapters is missing or has changed.
    """
    return run.parameters if run.config.model.adapters.maps == "none" else _Merged(run)


class _Merged:
    """W + scale * A B in float32, where W is rounded to the dtype in which it was frozen."""

    def __init__(self, run: RunCheckpoint):
        base = open_base_again(RecordedBase.of(run), run.workdir)
        self._model, self._stored = run.config.model, run.parameters
        self._base = merged_parameters(base) if isinstance(base, RunCheckpoint) else _OfFiles(base, run.architecture)
        self.shapes: Mapping[str, Shape] = parameter_shapes(
            quietstar_entries(run.architecture, run.config.thought.heads)
        )
        self._adapter: tuple[str, np.ndarray, np.ndarray] = ("", np.empty(0), np.empty(0))  # the last: path, A, B

    def read(self, target: Target) -> np.ndarray:
        """A parameter or one layer of it, as `StoredParameters.read`."""
        if target.path in self._stored.shapes:
            return self._stored.read(target)
        frozen = self._base.read(target).astype(jnp.dtype(stored_dtype(target.path, self._model.frozen_dtype)))
        if target.path + A not in self._stored.shapes or target.layer is None:
            return frozen.astype(np.float32)
        if self._adapter[0] != target.path:
            paths = [target.path + suffix for suffix in (A, B)]
            a, b = (self._stored.read(Target(path, self._stored.shapes[path])) for path in paths)
            self._adapter = (target.path, a, b)
        _, a, b = self._adapter
        product = np.tensordot(a[target.layer], b[target.layer], 1)
        return frozen.astype(np.float32) + np.float32(self._model.adapters.scale) * product


class _OfFiles:
    """The parameters in a Hugging Face checkpoint."""

    def __init__(self, files: CheckpointFiles, architecture: Architecture):
        entries = quietstar_entries(architecture) if can_think(files) else decoder_entries(architecture, "decoder.")
        self.shapes: Mapping[str, Shape] = parameter_shapes(entries)
        self._files = files
        self._places = {(t.path, t.layer): (entry, i) for entry in entries for i, t in enumerate(entry.targets)}

    def read(self, target: Target) -> np.ndarray:
        """A parameter or one layer of it, in the dtype of its file."""
        entry, index = self._places[target.path, target.layer]
        return to_ours(entry, self._files.read(entry.name))[index]
