"""Compilation targets: `v5e:8x8`, `v5p:2x2x4*2` (two slices), `gpu:h100x8`, `cpu:8`.

libtpu compiles for TPUs without a TPU. The compiler for GPUs needs a GPU, so programs for GPUs are compiled for as many
TPU v5p chips (or CPU devices) instead: arguments are sharded in the same way, temporaries are an estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.chips import CPU, GPUS, NETWORK_RATE, TPUS, Chip

KNOWN = {
    "v4": "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16",
    "v5e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    "v5p": "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16",
    "v6e": "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
}
STAND_INS = {1: "1x1x1", 2: "1x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
GPUS_PER_NODE = 8
_TPU = re.compile(r"(v\w+):(\d+(?:x\d+)+)(?:\*(\d+))?")
_GPU = re.compile(r"gpu:(\w+?)x(\d+)")
_CPU = re.compile(r"cpu:(\d+)")


@dataclass(frozen=True)
class Target:
    """A target. name: as given; chip: its memory and rates; devices: to compile for; note: what is not exact, or ""."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    note: str = ""
    compiler: str = "TPU"


def compile_only() -> None:
    """Lets this process compile for accelerators that it does not have; call it before any other use of JAX."""
    jax.config.update("jax_platforms", "cpu")


def find_target(name: str) -> Target:
    """Resolves the name of a topology.

    Raises:
      ConfigError: the name is unknown, or the compiler for it is not installed.
    """
    tpu, gpu, cpu = (pattern.fullmatch(name) for pattern in (_TPU, _GPU, _CPU))
    if tpu and tpu[1] in TPUS and tpu[2].count("x") == KNOWN[tpu[1]].split()[0].count("x"):
        devices = _tpu_devices(name, tpu[1], tpu[2], int(tpu[3] or 1))
        note = "" if not tpu[3] else "Bytes between slices count as if sent between chips: the network is slower."
        return Target(name, TPUS[tpu[1]], devices, note)
    if gpu and gpu[1] in GPUS:
        return _gpu_target(name, GPUS[gpu[1]], int(gpu[2]))
    if cpu:
        return Target(name, CPU, _cpu_devices(int(cpu[1])), "Memory by the compiler for CPUs, rates unknown.", "CPU")
    raise _unknown(name)


def _gpu_target(name: str, chip: Chip, count: int) -> Target:
    note = (
        f"Nothing can be compiled for {chip.name} here: arguments are exact, temporaries are those of the {{}} "
        "compiler for the same layout, and kernels of the GPU may need more or less. Thoughts attend in XLA's blocks."
    )
    if count > GPUS_PER_NODE:
        chip = dataclasses.replace(chip, link_rate=NETWORK_RATE)
        note += f" Beyond {GPUS_PER_NODE} GPUs all traffic counts at the rate between nodes."
    if count in STAND_INS and importlib.util.find_spec("libtpu"):
        devices = _tpu_devices(name, "v5p", STAND_INS[count], 1)
        return Target(name, chip, devices, note.format("TPU v5p"))
    return Target(name, chip, _cpu_devices(count), note.format("CPU"), "CPU")


def _tpu_devices(name: str, generation: str, shape: str, slices: int) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology is {name!r}: compiling for TPUs needs libtpu, which is not installed: pip install "
            "'quietstar_jax[tpu]' (or pip install libtpu). No TPU is needed."
        )
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is touched: another process may have libtpu loaded too
    # The kind of this machine does not matter; without these values, libtpu queries each of them and complains.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    sizes = [int(size) for size in shape.split("x")]
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # its two cores are one device
    if min(sizes[:2]) < 2:
        options["chips_per_host_bounds"] = (min(sizes[0], 2), min(sizes[1], 2), 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{shape}", **options)
    except Exception as error:  # of several types, none of them public
        raise _unknown(name) from error
    return topology.devices


def _cpu_devices(count: int) -> Sequence[Any]:
    """Returns this many CPU devices; their number can only be set before the CPU is first used."""
    with contextlib.suppress(RuntimeError):  # already used: its devices must suffice
        jax.config.update("jax_num_cpu_devices", count)
    if not 0 < count <= len(jax.devices("cpu")):
        raise ConfigError(
            f"This process has {len(jax.devices('cpu'))} CPU devices, but {count} are needed; their number can only be "
            "set before JAX is initialized."
        )
    return jax.devices("cpu")[:count]


def _unknown(name: str) -> ConfigError:
    lines = [f"  {generation}: {shapes}" for generation, shapes in KNOWN.items()]
    return ConfigError(
        f"topology is {name!r}; it must be one of these (append *2 for two slices):\n"
        + "\n".join(lines)
        + f"\n  gpu: {', '.join(f'{card}x8' for card in GPUS)}, any number of them\n  cpu: 1, 2, ... devices"
        + "\nas in v5e:4x4, v5p:2x2x4, gpu:h100x8, cpu:8."
    )
