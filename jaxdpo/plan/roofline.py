"""From what a step does to the least time that it can take: the slowest of four things, each at its full rate.

A bound, not a forecast: products, memory and links are taken to overlap entirely and to run at their datasheet rates.

>>> rates = Rates(flops=100.0, memory=10.0, ici=5.0, dcn=1.0)
>>> roofline(Costs(200.0, 10.0, (Collective("all-gather", "ici", 15.0, 1.0),)), rates)
Roofline(seconds={'compute': 2.0, 'memory': 1.0, 'ici': 3.0, 'dcn': 0.0}, bound='ici')
"""

from typing import NamedTuple

from jaxdpo.chips import Chip
from jaxdpo.plan.costs import Collective, Costs

__all__ = ["Collective", "Costs", "Rates", "Roofline", "roofline", "tpu_rates"]

FLOAT32_PASSES = 6
"""Products of bfloat16 that a TPU makes one full-precision product of float32 of."""


class Rates(NamedTuple):
    """Of one device; None where it is not known, which leaves that out of the bound."""

    flops: float
    """FLOP/s of matrix products in the dtype of the run."""
    memory: float | None
    """Bytes/s of its main memory."""
    ici: float | None
    """Bytes/s that it sends to its neighbours: all links of a device at once."""
    dcn: float | None
    """Bytes/s that it sends over the network."""


class Roofline(NamedTuple):
    """The least time of a step."""

    seconds: dict[str, float]
    """`compute`, `memory`, `ici` and `dcn`, those whose rate is known."""
    bound: str
    """The one that takes longest."""

    @property
    def step(self) -> float:
        """Seconds of the longest one."""
        return self.seconds[self.bound]


def tpu_rates(chip: Chip, devices: int, dtype: str) -> Rates:
    """Rates of one of the devices that a chip is to the compiler."""
    passes = FLOAT32_PASSES if dtype == "float32" else 1
    whole = (chip.flops / passes, chip.memory_bandwidth, chip.link_bandwidth, chip.network_bandwidth)
    return Rates(*(rate / devices for rate in whole))


def roofline(costs: Costs, rates: Rates) -> Roofline:
    """The least time of what each device does."""
    work = {
        "compute": (costs.flops, rates.flops),
        "memory": (costs.bytes, rates.memory),
        "ici": (costs.network_bytes("ici"), rates.ici),
        "dcn": (costs.network_bytes("dcn"), rates.dcn),
    }
    seconds = {name: amount / rate for name, (amount, rate) in work.items() if rate}
    return Roofline(seconds, max(seconds, key=lambda name: seconds[name]))
