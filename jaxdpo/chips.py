"""Published rates of accelerators: what a step's time and a run's utilisation are held against.

Figures are of one chip as its vendor states them, dense bfloat16, no sparsity: Cloud TPU documentation
(https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and NVIDIA's data sheets. It states links in both
directions together; here is half of that. v4's links are those of Jouppi et al. 2023, https://arxiv.org/abs/2304.01433,
50 GB/s each; its share of the network is not published, and is taken to be that of v5p. A chip of TPU7x is two devices
to jax; the others are one.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: what people call it; of a TPU also the first part of a topology, as in `v5e:4x4`.
      device_kinds: `jax.Device.device_kind` of it, in lower case.
      flops: bfloat16 matrix products, FLOP/s.
      memory_bytes: of its HBM.
      memory_bandwidth: of its HBM, bytes/s.
      link_bandwidth: of all its links to neighbours together, one way, bytes/s: ICI, or NVLink.
      network_bandwidth: its share of its host's network, one way, bytes/s: DCN.
      devices: of jax on each chip.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    devices: int = 1


GIB, GB, GBIT = 2.0**30, 1e9, 1e9 / 8

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", ("tpu v4",), 275e12, 32 * GIB, 1200 * GB, 2400 * GBIT, 50 * GBIT),
        Chip("v5e", ("tpu v5 lite", "tpu v5e"), 197e12, 16 * GIB, 819 * GB, 1600 * GBIT, 25 * GBIT),
        Chip("v5p", ("tpu v5", "tpu v5p"), 459e12, 95 * GIB, 2765 * GB, 4800 * GBIT, 50 * GBIT),
        Chip("v6e", ("tpu v6 lite", "tpu v6e"), 918e12, 32 * GIB, 1638 * GB, 3200 * GBIT, 100 * GBIT),
        Chip("tpu7x", ("tpu7x", "tpu v7x"), 2307e12, 192 * GIB, 7380 * GB, 4800 * GBIT, 100 * GBIT, devices=2),
        Chip("a100", ("nvidia a100-sxm4-80gb",), 312e12, 80 * GB, 2039 * GB, 300 * GB, 200 * GBIT),
        Chip("h100", ("nvidia h100 80gb hbm3", "nvidia h100"), 989e12, 80 * GB, 3350 * GB, 450 * GB, 400 * GBIT),
        Chip("h200", ("nvidia h200",), 989e12, 141 * GB, 4800 * GB, 450 * GB, 400 * GBIT),
        Chip("b200", ("nvidia b200",), 2250e12, 180 * GB, 8000 * GB, 900 * GB, 400 * GBIT),
    )
}
"""By name."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one whose rates are not in `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device_kind.lower() in chip.device_kinds), None)
