"""Compiled programs in the work directory: a run that starts again loads them instead of compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import compilation_cache as jax_cache  # `decompress_executable` has no public name

COMPILED = "compiled"  # folder in the work directory
FOLDER = "jax_compilation_cache_dir"  # setting of JAX


@contextlib.contextmanager
def compilation_cache(workdir: Any) -> Iterator[None]:
    """Stores programs that take more than a second to compile in `workdir/compiled`, and reads them from there.

    JAX's own variables have precedence: with JAX_COMPILATION_CACHE_DIR, programs are stored in that folder; with
    JAX_ENABLE_COMPILATION_CACHE=false, nowhere. A folder that cannot be written to causes a warning, not an error.
    """
    chosen, enabled = (getattr(jax.config, name) for name in (FOLDER, "jax_enable_compilation_cache"))
    if chosen or not enabled:
        yield
        return
    # With caches of XLA's own, the path of the folder would be part of what identifies a program.
    during = {FOLDER: str(workdir / COMPILED), "jax_persistent_cache_enable_xla_caches": "none"}
    before = {name: getattr(jax.config, name) for name in during}
    if jax.process_index() == 0:  # the process that writes
        _remove_incomplete(workdir / COMPILED)
    _configure(during)
    try:
        yield
    finally:
        _configure(before)


def _remove_incomplete(folder: Any) -> None:
    """Removes programs whose writing was interrupted: JAX would never write them again, but compile them every time."""
    for path in folder.glob("*-cache") if folder.exists() else ():
        with contextlib.suppress(OSError):  # a file that cannot be read now may be whole
            content = path.read_bytes()
            try:
                jax_cache.decompress_executable(content)
            except Exception:  # zstandard's or zlib's, whichever JAX uses here: all mean that the content is not whole
                path.unlink()


def _configure(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX opens the folder once per process, and a process can contain several runs
