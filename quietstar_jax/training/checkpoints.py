"""Checkpoints of a run: weights, optimizer, data position, configuration and step, written with orbax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as preserve

from quietstar_jax.config import CheckpointConfig
from quietstar_jax.errors import CheckpointError, DivergedError, PreemptedError
from quietstar_jax.training.step import TrainState

ARRAYS, RECORDS = ("params", "opt_state"), ("data", "config", "progress")
LARGE_BYTES = 2**26  # stacked layers beyond it are stored apart, so that an export need not hold them all


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    data: dict[str, Any]  # of `SequenceIterator.get_state`


class Checkpoints:
    """The checkpoints of one work directory, written by all processes together; a context manager that waits for the
    last write."""

    def __init__(self, directory: Path, config: CheckpointConfig, kept_steps: Sequence[int] = ()):
        """Args: kept_steps: checkpoints that are never deleted, beside those of the configuration."""
        policies = [preserve.LatestN(config.keep_latest), preserve.CustomSteps(kept_steps)]
        if config.keep_every_steps:
            policies.append(preserve.EveryNSteps(config.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in RECORDS}
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which an error that is not theirs too would have do so for ever.
        shared = kind is None or issubclass(kind, (PreemptedError, DivergedError))
        if shared or jax.process_count() == 1:
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Steps done in the newest complete checkpoint."""
        return self._manager.latest_step()

    def folder(self, step: int) -> Path:
        """Of a checkpoint."""
        return self._directory / str(step)

    def save(self, state: TrainState, data: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint under its step, unless it is there already.

        Args:
          record: the configuration and what a reader needs beside it, JSON-able.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        items = ocp.args.Composite(
            params=_layers_apart(state.params),
            opt_state=_layers_apart(state.opt_state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(record)),
            progress=ocp.args.JsonSave({"step": step}),
        )
        self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """The configuration that a checkpoint was written with."""
        return self._restore(step, config=ocp.args.JsonRestore())["config"]

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Reads a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Raises:
          CheckpointError: it is damaged or of another model.
        """
        found = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        done = jax.device_put(np.int32(found["progress"]["step"]), abstract.step.sharding)
        return Restored(TrainState(done, found["params"], found["opt_state"]), found["data"])

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._directory} cannot be read: {error}\n"
                f"Remove the folder {self._directory / str(step)} to resume from the one before it, "
                "or start in a new workdir."
            ) from error


def _layers_apart(arrays: Any) -> ocp.args.StandardSave:
    def layout(path: Any, array: Any) -> ocp.SaveArgs:
        apart = "layers." in jax.tree_util.keystr(path) and array.nbytes > LARGE_BYTES
        return ocp.SaveArgs(chunk_byte_size=LARGE_BYTES, shard_axes=(0,)) if apart else ocp.SaveArgs()

    return ocp.args.StandardSave(arrays, save_args=jax.tree_util.tree_map_with_path(layout, arrays))
