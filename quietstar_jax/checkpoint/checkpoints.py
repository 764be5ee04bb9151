"""Writes and reads the checkpoints of a run with orbax: weights, optimizer, data position, configuration and step."""

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
from quietstar_jax.checkpoint.steps import absolute, damage, log_once, prune, remove_unfinished, saved_steps, set_aside
from quietstar_jax.checkpoint.stored_arrays import UNREADABLE, first_line
from quietstar_jax.checkpoint.train_state import OBJECTIVE, TrainState
from quietstar_jax.config import CheckpointConfig
from quietstar_jax.errors import CheckpointError, CollapsedError, DivergedError, PreemptedError
from quietstar_jax.io import disk_error
from quietstar_jax.parallel.processes import any_process

ARRAYS, RECORDS = ("params", "opt_state"), ("data", "config", "progress")
LARGE_BYTES = 2**26  # layers of larger stacked arrays are stored separately, so that an export can read a few at a time


class Restored(NamedTuple):
    """The contents of a restored checkpoint."""

    state: TrainState
    data: dict[str, Any]  # as returned by `SequenceIterator.get_state`


class Checkpoints:
    """The checkpoints of one work directory. All processes write them together.

    A context manager: on exit it waits for the last write.
    """

    def __init__(self, directory: Path | epath.Path, config: CheckpointConfig, kept_steps: Sequence[int] = ()):
        """Opens the folder of checkpoints, and creates it if necessary.

        Args:
          kept_steps: steps whose checkpoints are never deleted, in addition to those that the configuration keeps.

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
            cleanup_tmp_directories=True,  # left by a run that was killed during a write
            lightweight_initialize=True,  # do not read a damaged step before it is checked
            temporary_path_class=_step_path(directory, lambda: prune(directory, kept)),
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers[OBJECTIVE] = ocp.PyTreeCheckpointHandler()  # references of earlier versions have a mixing head
        handlers |= {name: ocp.JsonCheckpointHandler() for name in RECORDS}
        with self._disk_errors("The folder of checkpoints cannot be used"):
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes. After an error in this process alone, it would wait forever. The
        # messages of these three name a saved step.
        if kind is None or issubclass(kind, (PreemptedError, DivergedError, CollapsedError)):
            with self._disk_errors("The last checkpoint cannot be written"):
                self._manager.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is more informative
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def folder(self, step: int) -> epath.Path:
        """Returns the folder of a checkpoint."""
        return self._directory / str(step)

    def newest_whole_step(self) -> int | None:
        """Returns the newest step whose files are undamaged, or None if nothing has been saved.

        Damaged newer steps are renamed, with a warning. All processes must call this method, and share the reading.

        Raises:
          CheckpointError: there are steps, but all are damaged; none is renamed in this case.
        """
        broken: dict[int, str] = {}
        steps = saved_steps(self._directory)
        part, parts = jax.process_index(), jax.process_count()
        for step in reversed(steps):
            problem = damage(self._directory, step, part=part, parts=parts)
            if not any_process(bool(problem)):
                break
            broken[step] = problem or "another process names the file"
        else:
            if broken:
                raise CheckpointError(
                    "All checkpoints are damaged:\n"
                    + "\n".join(f"  - {self._directory / str(step)}/{problem}" for step, problem in broken.items())
                    + f"\nRestore the files, or remove {self._directory} to start from the beginning."
                )
            return None
        if broken:
            self._set_aside(broken, step)
        return step

    def _set_aside(self, broken: Mapping[int, str], whole: int) -> None:
        lines = []
        with self._disk_errors("A damaged checkpoint cannot be renamed"):
            for step, problem in broken.items():
                line = f"The checkpoint of step {step} is damaged: {self._directory / str(step)}/{problem}."
                if jax.process_index() == 0:
                    line += f" It is kept as {set_aside(self._directory, step).name}: remove it when it is not needed."
                lines.append(line)
        any_process(False)  # all processes wait for the first
        self._manager.reload()
        lines.append(f"Training resumes from step {whole}, the newest undamaged one.")
        if jax.process_index() == 0 or any("another process" not in problem for problem in broken.values()):
            log_once("\n".join(lines))

    def save(self, state: TrainState, data: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint named by its step, unless it already exists.

        Args:
          record: the configuration and other data that a reader needs; JSON-serializable.

        Raises:
          CheckpointError: this checkpoint or the one before it cannot be written, for example on a full disk.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        objective = state.objective
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, save_args=_layers_apart(state.params)),
            opt_state=ocp.args.StandardSave(state.opt_state, save_args=_layers_apart(state.opt_state)),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(record)),
            progress=ocp.args.JsonSave({"step": step}),
            **({OBJECTIVE: ocp.args.PyTreeSave(objective, _layers_apart(objective))} if objective else {}),
        )
        with self._disk_errors(f"The checkpoint of step {step}, or the one before it, cannot be written"):
            if "://" not in str(self._directory) and not self._directory.is_dir():
                raise FileNotFoundError(errno.ENOENT, "the work directory has disappeared", str(self._directory))
            self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record (see `save`) that a checkpoint was written with."""
        return self._restore(step, config=ocp.args.JsonRestore())["config"]

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Reads a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Raises:
          CheckpointError: the checkpoint is damaged or of another model.
        """
        objective = abstract.objective
        arguments = ocp.checkpoint_utils.construct_restore_args(objective)
        further = ocp.args.PyTreeRestore(objective, arguments, partial_restore=True)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
            **({OBJECTIVE: further} if objective else {}),
        )
        reference = items[OBJECTIVE].get("reference", {}) if objective else {}
        if absent := [name for name, value in reference.items() if isinstance(value, jax.ShapeDtypeStruct)]:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._directory} has no {absent[0]} in the reference of the KL "
                "divergence: an earlier version wrote it, whose reference was the model without adapters. This run "
                "cannot resume. To continue from its weights in a new run, set config.model.checkpoint to its workdir, "
                "and config.workdir to a new folder."
            )
        done = jax.device_put(np.int32(items["progress"]["step"]), abstract.step.sharding)
        rest = items[OBJECTIVE] if objective else {}
        return Restored(TrainState(done, items["params"], items["opt_state"], **rest), items["data"])

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # from a device or another process
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
                f"{what}: {reason}.\nFix this (free some space, mount the disk, or change permissions), then run the "
                f"same command again: {then}."
            ) from error


def _step_path(
    directory: epath.Path, committed: Callable[[], None]
) -> type[ocp.path.atomicity_types.TemporaryPath]:  # fmt: skip
    """Returns the class with which orbax commits a folder; it writes the manifest of a step before the final rename.

    On gs://, nothing is renamed: a marker file in the folder says that it is complete. There, the manifest is written
    after that file.

    Args:
      committed: called on the first process after each step.
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
                self._final_path = temporary.with_name(temporary.name + ".whole")  # also a temporary name
                await super().finalize()
                manifest.write(self._final_path)
                self._final_path.rename(final)
                self._final_path = final
            committed()

    return StepPath


@functools.cache
def _silence_orbax() -> None:
    """Keeps tracebacks from orbax's threads off the terminal: the first error is raised anyway."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_raised_anyway)
    show = sys.unraisablehook

    def show_unraisable(what: sys.UnraisableHookArgs) -> None:
        if str(what.exc_value) != "Event loop is closed":  # from tensorstore, for each write after a failed one
            show(what)

    sys.unraisablehook = show_unraisable


def _raised_anyway(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "exception was never retrieved" not in record.getMessage()
    return "orbax" not in record.pathname or not record.exc_info


def _layers_apart(arrays: Any) -> Any:
    def layout(path: Any, array: Any) -> ocp.SaveArgs:
        apart = "layers." in jax.tree_util.keystr(path) and array.nbytes > LARGE_BYTES
        return ocp.SaveArgs(chunk_byte_size=LARGE_BYTES, shard_axes=(0,)) if apart else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(layout, arrays)
