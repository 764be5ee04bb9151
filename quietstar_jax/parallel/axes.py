"""The table from logical axes to mesh axes, and the functions that apply it to weights and activations.

These functions use the mesh of the context (`jax.set_mesh`). Without a mesh they change nothing, so that the code of
the model runs unchanged on a single device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Tree = TypeVar("Tree")

MESH_AXES = ("data", "position", "fsdp", "tensor", "group")
"""Ordered from the axis with the least communication to the one with the most; devices along the last axes are network
neighbours. `group` is the part of `config.mesh.tensor` beyond the key/value heads: it splits the query heads that share
a key/value head.
"""

_TENSOR = ("tensor", "group")

RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "vocab": _TENSOR,
    "embed": ("fsdp",),
    "mlp": _TENSOR,
    "heads": _TENSOR,
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mixing": _TENSOR,
    # activations
    "batch": ("data", "fsdp"),
    "rows": ("data",),  # sequences, in arrays that are sharded over fsdp along an axis of the weights
    "text": ("position",),  # tokens of the text as queries
    "keys": (),  # tokens of the text as keys
    "positions": ("position",),  # positions where thoughts start
    "chain": (),
    "hidden": (),
    "query_rows": ("group",),  # query heads of a key/value head, times tokens of a chain
}

Axes = tuple[str | None, ...]


def partition_spec(axes: Sequence[str | EllipsisType | None]) -> PartitionSpec:
    """Returns how an array with these logical axes is sharded over a mesh.

    Args:
      axes: for each dimension a name of `RULES`, None if it is never sharded, or `...` if its sharding is left
        unconstrained.

    Raises:
      ValueError: no rule names an axis, or two dimensions map to the same mesh axis.
    """
    entries: list[Any] = []
    used: list[str] = []
    for name in axes:
        if name is ...:
            entries.append(PartitionSpec.UNCONSTRAINED)
            continue
        if name is not None and name not in RULES:
            raise ValueError(f"No rule names the axis {name!r} of {tuple(axes)}; known axes: {', '.join(RULES)}.")
        mesh_axes = RULES[name] if name is not None else ()
        used += mesh_axes
        entries.append(mesh_axes or None)
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
        raise ValueError(f"Two dimensions of {tuple(axes)} would be on the mesh axis {', '.join(sorted(twice))}.")
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | EllipsisType | None) -> jax.Array:
    """Returns x, sharded over the mesh according to its logical axes; see `partition_spec`.

    Mesh axes that are manual here (inside `shard_map`) are ignored. `...` means any number of dimensions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not mesh.auto_axes:
        return x
    if ... in axes:
        at = axes.index(...)
        axes = (*axes[:at], *(...,) * (x.ndim - len(axes) + 1), *axes[at + 1 :])
    if len(axes) != x.ndim:
        raise ValueError(f"An array of shape {x.shape} got the axes {axes}.")
    return jax.lax.with_sharding_constraint(x, _only(partition_spec(axes), mesh.auto_axes))


def constrain_tree(tree: Tree, axes: Any) -> Tree:
    """Applies `constrain` to every array of a tree; `axes` is the same tree with a tuple of names for each array."""
    return jax.tree.map(lambda x, names: constrain(x, *names), tree, axes)


def num_shards(name: str) -> int:
    """Returns into how many parts the automatic mesh axes here split a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1
    for axis in RULES[name]:
        count *= mesh.shape[axis] if not mesh.empty and axis in mesh.auto_axes else 1
    return count


def on_all_devices(condition: jax.Array) -> jax.Array:
    """Returns whether a scalar condition is True on all devices along the manual mesh axes here.

    A loop with this condition runs the same number of iterations on all devices, and a branch takes the same side, so
    all issue the same collectives. If no automatic axis has several devices, there are no collectives in them, and each
    device decides alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in mesh.auto_axes):
        return condition
    axes = tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
    return jax.lax.pmin(condition.astype(jnp.int32), axes) > 0 if axes else condition


def manual_shard_map(fn: Callable[..., Any], over: Sequence[str], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """Runs `fn` on each device's own part of its arguments, for those mesh axes of `over` that are automatic here.

    Args:
      fn: called with `psum`, then the arguments; `psum(tree, mesh axis)` is the sum along one mesh axis of `over`.
      in_axes, out_axes: for each argument and result a tuple of logical axes, as for `partition_spec`, or () for a tree
        of arrays that these mesh axes do not split.

    Returns:
      A function of whole arrays. If these mesh axes have one device each, it is `fn` itself with its `psum`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = {axis for axis in over if not mesh.empty and axis in mesh.auto_axes}

    def psum(tree: Tree, axis: str) -> Tree:
        return jax.lax.psum(tree, axis) if axis in manual and mesh.shape[axis] > 1 else tree

    local = functools.partial(fn, psum)
    if all(mesh.shape[axis] == 1 for axis in manual):
        return local
    specs = [
        jax.tree.map(lambda axes: _only(partition_spec(axes), manual), tree, is_leaf=_is_axes)
        for tree in (in_axes, out_axes)
    ]
    # Axes of one device split nothing, but kernels cannot be compiled while any axis is left to the compiler.
    alone = {axis for axis in mesh.auto_axes if mesh.shape[axis] == 1}
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], axis_names=manual | alone, check_vma=False)


def split_microbatches(x: jax.Array, pieces: int) -> jax.Array:
    """[B, ...] -> [pieces, B / pieces, ...]; every piece has equally many rows of each device, and no row moves."""
    shards, rows = num_shards("batch"), x.shape[0] // pieces
    parts = x.reshape(shards, pieces, rows // shards, *x.shape[1:]).swapaxes(0, 1)
    return constrain(parts.reshape(pieces, rows, *x.shape[1:]), None, "batch", ...)


def merge_microbatches(x: jax.Array) -> jax.Array:
    """The inverse of `split_microbatches`: [pieces, B / pieces, ...] -> [B, ...]."""
    (pieces, rows), shards = x.shape[:2], num_shards("batch")
    parts = x.reshape(pieces, shards, rows // shards, *x.shape[2:]).swapaxes(0, 1)
    return constrain(parts.reshape(pieces * rows, *x.shape[2:]), "batch", ...)


def _is_axes(value: Any) -> bool:
    return type(value) is tuple and all(item is None or isinstance(item, str) for item in value)


def _only(spec: PartitionSpec, kept: Any) -> PartitionSpec:
    """Returns the specification restricted to the mesh axes in `kept`."""

    def entry(axes: Any) -> Any:
        if axes is None or axes is PartitionSpec.UNCONSTRAINED:
            return axes
        return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis in kept) or None

    return PartitionSpec(*(entry(axes) for axes in spec))
