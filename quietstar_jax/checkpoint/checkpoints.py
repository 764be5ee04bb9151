"""Checkpoints of a run: weights, optimizer, data position, configuration and step, written with orbax."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.steps import absolute, damage, prune, remove_unfinished, saved_steps, say_once, set_aside
from quietstar_jax.checkpoint.stored_arrays import UNREADABLE, first_line
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import CheckpointConfig
from quietstar_jax.errors import CheckpointError, DivergedError, PreemptedError
from quietstar_jax.io import disk_error
from quietstar_jax.parallel.processes import any_process

ARRAYS, RECORDS = ("params", "opt_state"), ("data", "config", "progress")
LARGE_BYTES = 2**26  # stacked layers beyond it are stored apart, so that an export need not hold them all


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    data: dict[str, Any]  # of `SequenceIterator.get_state`


class Checkpoints:
    """The checkpoints of one work directory, written by all processes together; a context manager that waits for the
    last write."""

    def __init__(self, directory: Path | epath.Path, config: CheckpointConfig, kept_steps: Sequence[int] = ()):
        """Args: kept_steps: checkpoints that are never deleted, beside those of the configuration.

        Raises:
          CheckpointError: the folder cannot be written to.
        """
        self._directory = directory = absolute(directory)
        _silence_orbax()

        def kept(steps: Sequence[int]) -> set[int]:
            every = config.keep_every_steps
            return {*steps[-config.keep_latest :], *kept_steps, *(step for step in steps if every and not step % every)}

        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
            lightweight_initialize=True,  # a damaged step shall not be read before it is checked
            temporary_path_class=_step_path(directory, lambda: prune(directory, kept)),
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in RECORDS}
        with self._disk_errors("The folder of checkpoints cannot be used"):
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which an error that is not theirs too would have do so for ever.
        if kind is None or issubclass(kind, (PreemptedError, DivergedError)):  # these name what has been saved
            with self._disk_errors("The last checkpoint cannot be written"):
                self._manager.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error says more
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Steps done in the newest complete checkpoint."""
        return self._manager.latest_step()

    def folder(self, step: int) -> epath.Path:
        """Of a checkpoint."""
        return self._directory / str(step)

    def newest_whole_step(self) -> int | None:
        """The newest step whose files are all as they were written; damaged newer ones are set aside, with a warning.

        None where nothing has been saved. All processes call it, and share the reading.

        Raises:
          CheckpointError: there are steps, but none is whole; nothing is set aside then.
        """
        broken: dict[int, str] = {}
        steps = saved_steps(self._directory)
        part, parts = jax.process_index(), jax.process_count()
        for step in reversed(steps):
            found = damage(self._directory, step, part=part, parts=parts)
            if not any_process(bool(found)):
                break
            broken[step] = found or "another process names the file"
        else:
            if broken:
                raise CheckpointError(
                    "No checkpoint is whole:\n"
                    + "\n".join(f"  - {self._directory / str(step)}/{said}" for step, said in broken.items())
                    + f"\nRestore the files, or remove {self._directory} to start from the beginning."
                )
            return None
        if broken:
            self._set_aside(broken, step)
        return step

    def _set_aside(self, broken: Mapping[int, str], whole: int) -> None:
        lines = []
        with self._disk_errors("A damaged checkpoint cannot be renamed"):
            for step, found in broken.items():
                line = f"The checkpoint of step {step} is damaged: {self._directory / str(step)}/{found}."
                if jax.process_index() == 0:
                    line += f" It is kept as {set_aside(self._directory, step).name}: remove it when it is not needed."
                lines.append(line)
        any_process(False)  # all wait for the first
        self._manager.reload()
        lines.append(f"Training resumes from step {whole}, the newest whole one.")
        if jax.process_index() == 0 or any("another process" not in found for found in broken.values()):
            say_once("\n".join(lines))

    def save(self, state: TrainState, data: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint under its step, unless it is there already.

        Args:
          record: the configuration and what a reader needs beside it, JSON-able.

        Raises:
          CheckpointError: this one or the one before it cannot be written, as on a full disk.
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
        with self._disk_errors(f"The checkpoint of step {step}, or the one before it, cannot be written"):
            if "://" not in str(self._directory) and not self._directory.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the work directory has disappeared", str(self._directory))
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
        except jax.errors.JaxRuntimeError:  # of a device, or another process
            raise
        except UNREADABLE as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._directory} cannot be read: {first_line(error)}\n"
                f"Remove the folder {self._directory / str(step)} to resume from the one before it, "
                "or start in a new workdir."
            ) from error

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := disk_error(error)) is None:
                raise
            if jax.process_count() == 1:
                with contextlib.suppress(OSError):
                    remove_unfinished(self._directory)
            steps = saved_steps(self._directory) if self._directory.exists() else []
            then = f"it resumes from step {steps[-1]}" if steps else "it starts from the beginning"
            raise CheckpointError(
                f"{what}: {reason}.\nMend that (free space, mount the disk, or give permission); then run the same "
                f"command again: {then}."
            ) from error


def _step_path(
    directory: epath.Path, committed: Callable[[], None]
) -> type[ocp.path.atomicity_types.TemporaryPath]:  # fmt: skip
    """How orbax makes a folder whole: as it does otherwise, but a step gets its manifest before it gets its name.

    On gs://, where a file in the folder tells that it is whole and nothing is renamed, the manifest comes after it.

    Args:
      committed: called on the first process, after each step.
    """
    base = ocp.path.atomicity_defaults.get_default_temporary_path_class(directory)

    class StepPath(base):  # type: ignore[misc, valid-type]
        async def finalize(self) -> None:
            final, temporary = self.get_final(), self.get()
            if not final.name.isdigit():  # an item of a step
                return await super().finalize()
            if temporary == final:
                await super().finalize()
                manifest.write(final)
            else:
                self._final_path = temporary.with_name(temporary.name + ".whole")  # a temporary name too
                await super().finalize()
                manifest.write(self._final_path)
                self._final_path.rename(final)
                self._final_path = final
            committed()

    return StepPath


@functools.cache
def _silence_orbax() -> None:
    """Keeps tracebacks of errors in its threads off the terminal: the first of them is raised as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_raised_anyway)
    show = sys.unraisablehook

    def show_unraisable(what: sys.UnraisableHookArgs) -> None:
        if str(what.exc_value) != "Event loop is closed":  # tensorstore, of each write after one that failed
            show(what)

    sys.unraisablehook = show_unraisable


def _raised_anyway(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "exception was never retrieved" not in record.getMessage()
    return "orbax" not in record.pathname or not record.exc_info


def _layers_apart(arrays: Any) -> ocp.args.StandardSave:
    def layout(path: Any, array: Any) -> ocp.SaveArgs:
        apart = "layers." in jax.tree_util.keystr(path) and array.nbytes > LARGE_BYTES
        return ocp.SaveArgs(chunk_byte_size=LARGE_BYTES, shard_axes=(0,)) if apart else ocp.SaveArgs()

    return ocp.args.StandardSave(arrays, save_args=jax.tree_util.tree_map_with_path(layout, arrays))
