"""TPU slices by name, as libtpu and Cloud TPU call them, and what one of their devices is.

The shapes are those that Cloud TPU's documentation lists
(https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). No jax is imported before devices are asked for.
"""

import importlib.util
import math
from typing import Any

from jaxdpo.chips import CHIPS, Chip
from jaxdpo.options import nearest
from jaxdpo.types import InputError

LOCAL = "local"
"""In place of a topology: the devices of this machine."""

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SLICES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": (*_CUBES, "16x16x16", "16x16x24"),
    "v6e": _FLAT,
    "tpu7x": _CUBES,
}
"""Chip -> the shapes of its slices, in chips."""

USABLE_GIB = {"v4": 15.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
"""What libtpu lets programs use of each device's memory: the limit that its error names for a program that is too large
(libtpu 0.0.42.1). The rest is its own. It describes a chip of v4 as two devices."""

INSTALL = "pip install 'jaxdpo[tpu]', or in a clone pip install -e '.[tpu]'"


def check_topology(name: str) -> None:
    """InputError for a name that is not `local` or `CHIP:SHAPE`; says which exist."""
    if name == LOCAL:
        return
    chip, _, shape = name.partition(":")
    if chip not in SLICES:
        near = nearest(chip, list(SLICES), cutoff=0.6)
        meant = f"did you mean {near}? " if near else ""
        raise InputError(
            f"--topology {name!r} names no TPU; {meant}allowed: {LOCAL}, or CHIP:SHAPE with one of "
            f"{', '.join(SLICES)}, as v5e:4x4"
        )
    if shape not in SLICES[chip]:
        raise InputError(f"--topology {name!r}: {chip} has no slice {shape!r}; allowed: {', '.join(SLICES[chip])}")


def check_compiler(name: str) -> None:
    """InputError where a topology needs libtpu and it is not installed."""
    if name != LOCAL and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name} needs libtpu, the TPU compiler, which runs on any Linux machine; install it: {INSTALL}"
        )


def chips_of(name: str) -> tuple[Chip, int]:
    """The chip of a topology, and how many there are in a slice."""
    chip, _, shape = name.partition(":")
    return CHIPS[chip], math.prod(map(int, shape.split("x")))


def slice_devices(name: str, slices: int) -> list[Any]:
    """Devices of a topology to compile for; nothing can run on them.

    Raises:
      InputError: where libtpu refuses the topology.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    chip, _, shape = name.partition(":")
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology {name}: this libtpu does not know it ({reason}); allowed: others of {chip}, "
            f"{', '.join(SLICES[chip])}; a newer libtpu may know it: {INSTALL}"
        ) from error
