"""Meshes and policies of recomputation, those first that should take the least time of all that should fit."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jaxdpo.models import TransformerConfig, abstract_params
from jaxdpo.plan.analytic import estimate, keys_of
from jaxdpo.plan.job import Job, Placed, place
from jaxdpo.plan.roofline import Rates, Roofline
from jaxdpo.sharding import MESH_AXES, make_mesh, mesh_sizes, num_slices
from jaxdpo.train.memory import CHOSEN, USABLE, USABLE_ELSEWHERE, layout_bytes
from jaxdpo.types import InputError

WIDEST = 16
"""Devices that share a row, by heads or by length, at most: what they exchange grows with their number."""
BLOCK = 128
"""Tokens that a device has of a row at least."""


class Candidate(NamedTuple):
    """One way to do the job, by estimates."""

    placed: Placed
    roofline: Roofline
    fits: bool

    @property
    def memory(self) -> int:
        """Bytes of a device."""
        return self.placed.state + self.placed.activations

    @property
    def order(self) -> tuple:
        """What fits first, then by time, then by what is exchanged; what does not fit by memory."""
        if not self.fits:
            return True, self.memory
        return False, self.roofline.step, sum(self.roofline.seconds.values()), self.memory


def candidates(job: Job, rates: Rates, remat: str | None) -> list[Candidate]:
    """All ways to do a job that its options leave open, the best first.

    Args:
      job: with the mesh that is asked for, `auto` for any.
      rates: of a device.
      remat: the policy that is asked for; None for any.
    Raises:
      InputError: for a mesh that the devices, the model or the rows do not allow.
    """
    platform = job.devices[0].platform
    usable = USABLE.get(platform, USABLE_ELSEWHERE) * job.usable
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(job.decoder)))
    policies = CHOSEN if remat is None else (remat,)
    keys = keys_of(job)
    found = []
    for mesh in _meshes(job):
        first = place(job, mesh, policies[0])
        for policy in policies:
            decoder = dataclasses.replace(first.decoder, remat=policy)
            placed = first._replace(decoder=decoder, activations=layout_bytes(decoder, first.layout, mesh))
            fits = placed.state + placed.activations <= usable
            found.append(Candidate(placed, estimate(placed, size, keys, rates), fits))
    return sorted(found, key=lambda candidate: candidate.order)


def _meshes(job: Job) -> Iterator[jax.sharding.Mesh]:
    if job.config.mesh != "auto":
        try:
            yield make_mesh(job.devices, **mesh_sizes(job.config.mesh))
        except InputError as error:
            raise InputError(f"--mesh: {error}") from None
        return
    for sizes in sensible(job.decoder.config, len(job.devices), num_slices(job.devices), job.length):
        yield make_mesh(job.devices, **sizes)


def sensible(config: TransformerConfig, devices: int, slices: int, length: int) -> Iterator[dict[str, int]]:
    """Sizes of meshes that the model and the rows can be split over.

    >>> config = TransformerConfig("llama", 64, 6, 1, 2, 2, 4, 8, 64)
    >>> for sizes in sensible(config, 4, 1, 128):
    ...     print(*sizes.values())
    1 2 2 1
    2 2 1 1
    2 1 2 1
    4 1 1 1
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    shared = [size for size in divisors if size <= WIDEST]
    for data, tensor, context in itertools.product(divisors, shared, shared):
        fsdp, rest = divmod(devices, data * tensor * context)
        whole = (config.num_heads, config.mlp_dim, config.vocab_size)
        if rest or data % slices or fsdp < 1 or any(size % tensor for size in whole):
            continue
        if config.embed_dim % (fsdp * context) or (context > 1 and length % (BLOCK * context)):
            continue
        yield dict(zip(MESH_AXES, (data, fsdp, tensor, context), strict=True))
