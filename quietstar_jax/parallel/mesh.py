"""Builds the device mesh from the sizes in the configuration, and checks that models and batches fit it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config, MeshConfig, PrefixAttention
from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.axes import MESH_AXES
from quietstar_jax.settings import one_of

SIZES = ("data", "position", "fsdp", "tensor")  # of `MeshConfig`


def make_mesh(config: MeshConfig, architecture: Architecture, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a run, with the axes `MESH_AXES`.

    Args:
      devices: devices of the mesh, e.g. of a topology for ahead-of-time compilation; None = `jax.devices()`.

    Raises:
      ConfigError: the sizes do not fit the devices, or the tensor axis does not fit the model.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    tensor, group = split_tensor(sizes["tensor"], architecture)
    check_weights(architecture, sizes["fsdp"], sizes["tensor"])
    shape = (sizes["data"], sizes["position"], sizes["fsdp"], tensor, group)
    return Mesh(_arrange(config, shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def resolve(config: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the sizes of the mesh axes, with -1 replaced by the remaining number of devices.

    Raises:
      ConfigError: the product of the sizes is not the number of devices.
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and devices % fixed == 0:
        sizes = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        written = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"config.mesh is {written}, but there are {devices} devices (processes: {jax.process_count()}): the "
            f"product of the sizes must be {devices}. Change the sizes; one of them may be -1, for the remaining "
            "devices. To try a mesh on a CPU, set JAX_NUM_CPU_DEVICES."
        )
    return sizes


def split_tensor(tensor: int, architecture: Architecture) -> tuple[int, int]:
    """Splits the tensor axis into (parts of the key/value heads, parts of the query heads of each key/value head).

    If the axis is longer than the number of key/value heads, several devices store the same key/value head, each with
    some of its query heads.

    Raises:
      ConfigError: the heads cannot be split this way.
    """
    kv_heads, heads = architecture.num_kv_heads, architecture.num_heads
    shared = math.gcd(tensor, kv_heads)
    group = tensor // shared
    if (group > 1 and shared != kv_heads) or heads % tensor:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ConfigError(
            f"config.mesh.tensor is {tensor}, but the model has {heads} heads on {kv_heads} key/value heads. It must "
            f"be one of {', '.join(map(str, fitting))}."
        )
    return shared, group


def check_weights(architecture: Architecture, fsdp: int, tensor: int) -> None:
    """Raises ConfigError if a mesh axis does not divide a dimension of the weights that it splits."""
    a = architecture
    for axis, size, split in (
        ("fsdp", fsdp, {"hidden_size": a.hidden_size}),
        ("tensor", tensor, {"hidden_size": a.hidden_size, "intermediate_size": a.intermediate_size,
                            "vocab_size": a.vocab_size}),
    ):  # fmt: skip
        for name, extent in split.items():
            if extent % size:
                fitting = [n for n in range(1, size) if all(other % n == 0 for other in split.values())]
                raise ConfigError(
                    f"config.mesh.{axis} is {size}, which does not divide the model's {name} {extent}. Below it, "
                    f"{', '.join(map(str, fitting))} are possible; use the remaining devices for another axis."
                )


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if the sequences of a phase cannot be sharded evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for i, phase in enumerate(config.phases):
        rows = phase.batch_size // phase.microbatches
        if rows % ways:
            raise ConfigError(
                f"config.phases[{i}]: batch_size {phase.batch_size} in {phase.microbatches} microbatches is {rows} "
                f"sequences, which {ways} devices (mesh data {mesh.shape['data']} x fsdp "
                f"{mesh.shape['fsdp']}) cannot share evenly. Choose a batch_size that is a multiple of "
                f"{ways * phase.microbatches}, fewer microbatches, or more devices for config.mesh.tensor or position."
            )


def check_kernels(prefix_attention: str, device: Any) -> None:
    """Raises ConfigError if `prefix_attention` is not an allowed value, or not available on this kind of device."""
    if problems := one_of("prefix_attention", prefix_attention, PrefixAttention):
        raise ConfigError(f"{problems[0]}.")
    if prefix_attention == "triton" and (
        device.platform != "gpu" or "rocm" in getattr(device.client, "platform_version", "")
    ):
        raise ConfigError(
            f"prefix_attention is 'triton', a kernel for NVIDIA GPUs, and the platform is {device.platform!r} "
            f"({device.device_kind}). Set it to 'auto' or 'blocks'."
        )


def _arrange(config: MeshConfig, shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Returns devices [data, position, fsdp, tensor, group]; those that communicate most are network neighbours."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    outer = (config.dcn_data, 1, config.dcn_fsdp, 1, 1)
    if math.prod(outer) == 1 and len(slices) == 1:
        return _create(shape, devices)
    by_process = len(slices) == 1
    groups = len({device.process_index for device in devices}) if by_process else len(slices)
    inner = tuple(size // ways for size, ways in zip(shape, outer, strict=True))
    if math.prod(outer) != groups or any(size % ways for size, ways in zip(shape, outer, strict=True)):
        raise ConfigError(
            f"config.mesh.dcn_data is {config.dcn_data} and dcn_fsdp {config.dcn_fsdp}, but the devices are "
            f"{groups} {'processes' if by_process else 'slices'} that a slower network connects: the product of the "
            f"two must be {groups}, and they must divide data ({shape[0]}) and fsdp ({shape[2]})."
        )
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def _create(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # the axes of the torus do not have these sizes: allow splitting them
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
