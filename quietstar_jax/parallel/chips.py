"""Published rates of accelerators.

TPUs: the pages v4, v5e, v5p and v6e of https://docs.cloud.google.com/tpu/docs (peak bf16 FLOP/s, HBM capacity and
bandwidth, inter-chip interconnect, which they give for all links of a chip together, one way). GPUs: NVIDIA's data
sheets of the SXM modules and of L4 (dense bf16 FLOP/s; NVLink, PCIe for L4, one way: half of the bidirectional figure).
The sheets of H100, H200 and L4 state bf16 with 2:4 sparsity, 1,979, 1,979 and 242 TFLOP/s: dense is half of that. The
sheet of A100 states 312 dense.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
NETWORK_RATE = 50e9  # bytes per second and GPU between nodes: one 400 Gbit/s adapter for each


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: peak bf16 FLOP/s; hbm: bytes of memory, 0 = not stated; hbm_rate: bytes per second from it.
      link_rate: bytes per second that it sends over all its links together.
      torus: dimensions of the torus that these links form; 1 = every chip reaches every other at the full rate.
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float
    torus: int = 1

    @property
    def axis_rate(self) -> float:
        """Bytes per second that a chip sends along one dimension of the torus, in both directions together."""
        return self.link_rate / self.torus


TPUS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, torus=3),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, torus=2),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, torus=3),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 448e9, torus=2),
}
GPUS = {
    "a100": Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9),
    "h100": Chip("H100 80 GB", 989e12, 80e9, 3350e9, 450e9),
    "h200": Chip("H200 141 GB", 989e12, 141e9, 4800e9, 450e9),
    "l4": Chip("L4 24 GB", 121e12, 24e9, 300e9, 32e9),
}
CPU = Chip("CPU", 0.0, 0.0, 0.0, 0.0)

_KINDS = {  # a part of `jax.Device.device_kind`, in lower case
    "v6": TPUS["v6e"], "v5 lite": TPUS["v5e"], "v5e": TPUS["v5e"], "v5": TPUS["v5p"], "v4": TPUS["v4"],
    "a100": GPUS["a100"], "h100": GPUS["h100"], "h200": GPUS["h200"], "nvidia l4": GPUS["l4"],
}  # fmt: skip
_OTHERS = ("v4 lite", "h100 pcie", "h100 nvl", "h200 nvl", "l40")  # these have other rates


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that a JAX device is, or None if its rates are not in this table."""
    kind = device_kind.lower()
    if any(name in kind for name in _OTHERS):
        return None
    return next((chip for name, chip in _KINDS.items() if name in kind), None)
