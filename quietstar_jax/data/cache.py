"""A cache on disk for counts and indices; it may be deleted at any time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging

from quietstar_jax.io import replacing


def cached_array(directory: str, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the cached array `name`, memory-mapped; first computes and writes it if it is missing or damaged.

    If the file cannot be written, the array is computed every time.

    Args:
      directory: folder of the cache; empty = `$XDG_CACHE_HOME/quietstar_jax`, or `~/.cache/quietstar_jax`.
      name: file name, which must depend on everything that the array depends on.
      make: computes the array.
    """
    path = cache_folder(directory) / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        made = make()
    try:
        write_array(path, made)
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s): this is computed again in every run. Set data.cache_dir to another folder.",
            path,
            error,
        )
    return made


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file atomically; several hosts may write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def cache_folder(directory: str) -> Path:
    """Returns the folder of the cache; `directory` as in `cached_array`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quietstar_jax"
    return (Path(directory) if directory else default).expanduser()
