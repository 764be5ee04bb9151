"""The folders of saved steps: lists, checks, renames and removes them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.stored_arrays import unreadable
from quietstar_jax.checkpoint.train_state import OBJECTIVE
from quietstar_jax.errors import CheckpointError

REMOVED = ".removed"  # suffix of a step that is being removed
_logged: set[str] = set()


def absolute(path: Path | epath.Path) -> epath.Path:
    """Returns the absolute path; a URL is returned unchanged."""
    return epath.Path(path) if "://" in str(path) else epath.Path(os.path.abspath(path))


def saved_steps(folder: epath.Path) -> list[int]:
    """Returns the steps with a complete checkpoint, ascending; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.step for entry in ocp.path.step.standard_name_format().find_all(folder))


def damage(folder: epath.Path, step: int, *, leave_out: Collection[str] = (), part: int = 0, parts: int = 1) -> str:
    """Like `manifest.damage`, for a step in a `checkpoints` folder; without a manifest, all arrays are read.

    Raises:
      CheckpointError: the step cannot be read at present, for example because of a missing permission.
    """
    path = folder / str(step)
    try:
        problem = manifest.damage(path, step, leave_out=leave_out, part=part, parts=parts)
        if problem or manifest.exists(path):
            return problem
        items = {"params", "opt_state"} | ({OBJECTIVE} if (path / OBJECTIVE).exists() else set())
        for item in items - set(leave_out):
            if problem := unreadable(path / item, part, parts):
                return problem
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint of step {step} in {folder} cannot be read now: {error.strerror or error}: "
            f"{error.filename or path}. Fix this, then run the same command again."
        ) from error
    log_once(
        f"{path} has no manifest: an earlier version wrote it, or the manifest was lost. It is used, but its bytes are "
        "not checked."
    )
    return ""


def whole_step(folder: epath.Path, step: int | None = None, leave_out: Collection[str] = ()) -> int:
    """Returns the step to read, after checking the items that will be read.

    Args:
      folder: the `checkpoints` folder.
      step: the requested step; None = the newest.
      leave_out: items that are not read.

    Raises:
      CheckpointError: there is no such step, or it is damaged; the message names the newest undamaged step.
    """
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} contains no checkpoint. Give the work directory of a run that has saved one.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    if problem := damage(folder, step, leave_out=leave_out):
        others = (
            other for other in reversed(steps) if other != step and not damage(folder, other, leave_out=leave_out)
        )
        whole = next(others, None)
        advice = (
            "All other steps are damaged too."
            if whole is None
            else f"Step {whole} is the newest undamaged one: give `step` {whole}."
        )
        raise CheckpointError(f"The checkpoint of step {step} is damaged: {folder / str(step)}/{problem}. {advice}")
    return step


def set_aside(folder: epath.Path, step: int) -> epath.Path:
    """Renames a damaged step, so that it is no longer listed as a step; returns its new path.

    Raises:
      OSError: the step cannot be renamed.
    """
    number = 1
    while (kept := folder / f"{step}.broken-{number}").exists():
        number += 1
    return (folder / str(step)).rename(kept)


def prune(folder: epath.Path, kept: Callable[[Sequence[int]], Collection[int]]) -> None:
    """Removes the steps that `kept` does not select. For a step that cannot be removed, warns once.

    If a step is a symbolic link, only the link is removed.
    """
    try:
        left_over = [path for path in folder.iterdir() if path.name.endswith(REMOVED)]
        steps = saved_steps(folder)
        doomed = [folder / str(step) for step in steps if step not in kept(steps)]
    except OSError as error:
        return log_once(f"{folder} cannot be listed: {error}. No old checkpoint is removed.")
    for path in [*left_over, *doomed]:
        try:
            _remove(path)
        except OSError as error:
            renamed = path.with_name(path.name.removesuffix(REMOVED) + REMOVED)
            path = renamed if renamed.exists() else path
            log_once(f"{path} cannot be removed: {error.strerror or error}. Remove it by hand; training continues.")


def remove_unfinished(folder: epath.Path) -> None:
    """Removes the partial folders of a failed write, to free their space."""
    for _ in range(10):  # writes still in progress create the folder again
        left = [path for path in folder.iterdir() if ocp.path.atomicity_types.TMP_DIR_SUFFIX in path.name]
        for path in left:
            with contextlib.suppress(OSError):
                path.rmtree()
        if not left:
            break
        time.sleep(0.1)


def _remove(path: epath.Path) -> None:
    """Removes a step such that an incomplete folder is never listed as a step."""
    if os.path.islink(path):
        return os.unlink(path)
    if "://" in str(path):
        (path / ocp.path.atomicity_types.COMMIT_SUCCESS_FILE).unlink(missing_ok=True)
    elif not path.name.endswith(REMOVED):
        for root, _, _ in os.walk(path):
            if not os.access(root, os.W_OK):
                raise PermissionError(f"{root} is read-only")
        path = path.rename(path.with_name(path.name + REMOVED))
    path.rmtree()


def log_once(line: str) -> None:
    """Logs a warning, once per process."""
    if line not in _logged:
        _logged.add(line)
        logging.warning(line)
