"""Loads the tensors of a checkpoint into our stacked float32 parameters, one tensor at a time.

Host memory: the parameters themselves (or, with shardings, the parameter being filled) and the tensor being read.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quietstar_jax.errors import CheckpointError, short
from quietstar_jax.hf.canonical import LM_HEAD
from quietstar_jax.hf.files import listing
from quietstar_jax.hf.folder_kinds import IGNORED_HEADS, describe_tensors
from quietstar_jax.hf.names import Entry, Shape, parameter_shapes, to_ours
from quietstar_jax.hf.safetensors_file import FLOAT_DTYPES

HARMLESS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)")  # buffers that old versions stored

Module = TypeVar("Module", bound=nnx.Module)


class Info(Protocol):
    """The metadata of a tensor, known before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...  # F32, BF16, ...
    @property
    def file(self) -> Path: ...  # for messages


class TensorSource(Protocol):
    """Tensors by name, e.g. `CheckpointFiles`."""

    @property
    def tensors(self) -> Mapping[str, Info]: ...
    def read(self, name: str) -> np.ndarray: ...


def load_parameters(
    source: TensorSource,
    entries: Sequence[Entry],
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtypes: Mapping[str, jnp.dtype] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Returns the parameters that the entries fill, by dotted path, with stacked layers.

    Args:
      entries: `decoder_entries` or `quietstar_entries`.
      shardings: sharding of each parameter. Each is moved to its devices as soon as it is complete, and its host copy
        is freed. None = the default device.
      dtypes: dtype of each parameter; None = float32.
      only: paths of the parameters to return; the others are not read. None = all.

    Raises:
      CheckpointError: tensors are missing, unexpected, or of a wrong shape or dtype (checked before any is read), or
        contain values that are not finite; the message lists these tensors.
    """
    _check_names(source, entries)
    shapes = parameter_shapes(entries)
    remaining = Counter(target.path for entry in entries for target in entry.targets)
    filling: dict[str, np.ndarray] = {}
    done: dict[str, jax.Array] = {}
    broken: list[str] = []
    for entry in entries:
        if only is not None and not any(target.path in only for target in entry.targets):
            continue
        if not _fill(entry, source.read(entry.name), filling, shapes):
            broken.append(f"{entry.name} ({source.tensors[entry.name].file})")
        for target in entry.targets:
            remaining[target.path] -= 1
            if not remaining[target.path]:
                host = filling.pop(target.path)
                if only is not None and target.path not in only:
                    continue
                host = host if dtypes is None else host.astype(dtypes[target.path], copy=False)
                done[target.path] = _place(host, shardings, target.path)
    if broken:
        raise CheckpointError(
            listing("Tensors contain NaN, infinite values, or values beyond float32:", broken)
            + "\nThe checkpoint is damaged, or its training diverged: use another one."
        )
    return done


def build(constructor: Callable[[], Module], parameters: Mapping[str, jax.Array]) -> Module:
    """Returns the module that a constructor defines, with these parameters; the initial ones are never computed.

    Args:
      parameters: all parameters of the module, by dotted path.

    Raises:
      ValueError: the paths or shapes are not those of the module.
    """
    graphdef, state = nnx.split(nnx.eval_shape(constructor))
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    wrong = sorted(
        path
        for path in {*flat, *parameters}
        if path not in flat or path not in parameters or flat[path][1].shape != parameters[path].shape
    )
    if wrong:
        raise ValueError(f"Parameters do not fit the module: {', '.join(wrong)}.")
    filled = [(path, variable.replace(parameters[name])) for name, (path, variable) in flat.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _fill(entry: Entry, tensor: np.ndarray, filling: dict[str, np.ndarray], shapes: Mapping[str, Shape]) -> bool:
    """Copies one tensor into the parameters being filled; returns False if any value is not finite."""
    finite = True
    for target, piece in zip(entry.targets, to_ours(entry, tensor), strict=True):
        if target.path not in filling:
            filling[target.path] = np.empty(shapes[target.path], np.float32)
        place = filling[target.path][target.index]
        with np.errstate(over="ignore"):  # a float64 outside the range of float32 becomes infinite
            place[...] = piece
        finite = finite and bool(np.isfinite(place).all())
    return finite


def _place(host: np.ndarray, shardings: Mapping[str, jax.sharding.Sharding] | None, path: str) -> jax.Array:
    """Moves a parameter to its devices, and waits until its host array can be freed."""
    if shardings is None:
        return jax.device_put(host).block_until_ready()
    placed = jax.make_array_from_callback(host.shape, shardings[path], lambda index: host[index])
    return placed.block_until_ready()


def _check_names(source: TensorSource, entries: Sequence[Entry]) -> None:
    """Checks names, shapes and dtypes without reading weights, and reports all problems together."""
    expected = {entry.name: entry for entry in entries}
    problems = [
        f"{name}: missing, expected {list(e.shape)}" for name, e in expected.items() if name not in source.tensors
    ]
    foreign = [name for name in source.tensors if name not in expected and not HARMLESS.fullmatch(name)]
    ignored = [name for name in foreign if not problems and IGNORED_HEADS.fullmatch(name)]
    for name, info in source.tensors.items():
        if name not in expected:
            if name in foreign and name not in ignored:
                problems.append(f"{short(name, str)}: unexpected, shape {short(list(info.shape))} ({info.file})")
            continue
        if tuple(info.shape) != expected[name].shape:
            shape = f"{short(list(info.shape))}, expected {list(expected[name].shape)}"
            problems.append(f"{name}: shape {shape} ({info.file})")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: dtype {info.dtype}, supported are {', '.join(FLOAT_DTYPES)} ({info.file})")
    if problems:
        advice = describe_tensors(getattr(source, "config", {}), foreign)
        if any(info.dtype not in FLOAT_DTYPES for name, info in source.tensors.items() if name in expected):
            advice = "Use the unquantized checkpoint of this model."
        if set(expected) - set(source.tensors) == {LM_HEAD}:
            advice = "If head and embedding are one matrix, set tie_word_embeddings to true in config.json."
        raise CheckpointError(
            listing("The tensors do not fit what config.json describes:", problems)
            + f"\n{advice or 'Use config.json and weights of the same checkpoint.'}"
        )
    if ignored:
        file = source.tensors[ignored[0]].file
        logging.warning("%s: %d tensors of other heads or parts are ignored, e.g. %s.", file, len(ignored), ignored[0])
