"""Sharding of parameters, gradients, optimizer state and batches over the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.axes import Axes, partition_spec

ROWS = partition_spec(("batch",))  # for arrays whose first dimension is the sequences of a batch


def specs_like_parameters(tree: Any, axes: Mapping[str, Axes]) -> Any:
    """Returns the sharding of a tree of parameters, gradients or optimizer state.

    Args:
      tree: arrays or shapes; an array below the dotted path of a parameter is sharded like the parameter, a scalar
        elsewhere is replicated.
      axes: logical axes by dotted path.

    Returns:
      The tree with a `PartitionSpec` in place of each array.

    Raises:
      ValueError: an array belongs to no parameter, or has another rank.
    """

    def spec(path: tuple[Any, ...], array: Any) -> PartitionSpec:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
        if not names and array.ndim == 0:
            return PartitionSpec()
        if not names or len(axes[names[-1]]) != array.ndim:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"No rule for the placement of {where} of shape {array.shape} on the mesh.")
        return partition_spec(axes[names[-1]])

    return jax.tree_util.tree_map_with_path(spec, tree)


def on_mesh(mesh: Mesh, specs: Any) -> Any:
    """Converts a tree of `PartitionSpec` to shardings of this mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def shard_batch(rows: np.ndarray) -> jax.Array:
    """Shards rows [B, ...], complete on every process, over the mesh of the context; without a mesh, on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(rows)
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, ROWS), lambda index: rows[index])


def row_ways(mesh: Mesh) -> int:
    """Returns into how many parts the sequences of a batch are split; 1 without a mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"] if not mesh.empty else 1


@dataclass(frozen=True)
class ProcessBatchShard:
    """The sequences of every batch that this process reads: numbers `index`, `index + count`, ... of the global order.

    Processes whose devices hold the same rows have the same `index` and read the same sequences.
    """

    index: int
    count: int
    parts: tuple[tuple[int, ...], ...]  # for each index, the parts of a batch that its devices hold

    def place(self, rows: np.ndarray, mesh: Mesh) -> jax.Array:
        """This process's rows [B / count, ...] in the order in which they are read -> the global array [B, ...]."""
        mine = self.parts[self.index]
        size = len(rows) // len(mine)

        def part(index: Any) -> np.ndarray:
            first = mine.index((index[0].start or 0) // size) * size
            return rows[first : first + size]

        shape = (len(rows) * self.count, *rows.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, ROWS), part)

    def numbers(self, batch_size: int) -> np.ndarray | None:
        """Returns which sequence of the batch each global row holds, int32 [B]; None if they are in order."""
        size = batch_size // (self.count * len(self.parts[0]))
        numbers = np.empty(batch_size, np.int32)
        for reader, parts in enumerate(self.parts):
            rows = np.concatenate([np.arange(part * size, (part + 1) * size) for part in parts])
            numbers[rows] = reader + self.count * np.arange(len(rows))
        return None if self.count == 1 else numbers


def find_process_shard(mesh: Mesh) -> ProcessBatchShard:
    """Returns the shard of every batch that this process reads.

    Raises:
      ConfigError: two processes have some but not all rows in common.
    """
    ways = row_ways(mesh)
    held: dict[int, set[int]] = {}
    indices: Mapping[Any, Any] = NamedSharding(mesh, ROWS).devices_indices_map((ways,))
    for device, index in indices.items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != ways or len({len(rows) for rows in parts}) > 1:
        raise ConfigError(
            f"config.mesh divides the sequences into {ways} parts (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']}), which do not coincide with the processes. Choose sizes of data and fsdp whose "
            f"product is a multiple, or a divisor, of the {len(held)} processes."
        )
    return ProcessBatchShard(parts.index(tuple(sorted(held[jax.process_index()]))), len(parts), tuple(parts))
