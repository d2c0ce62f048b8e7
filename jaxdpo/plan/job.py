"""The work that is planned: what a run would do in one step, with pairs of a stated size in place of data.

Everything that a run chooses, such as precision, attention, rows, microbatches and loss, is chosen here by the same
functions. What is not known without data is assumed: all prompts are equally long, and so are all completions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxdpo.config import DPOConfig, PlanConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.layout import Fill, choose_capacity, fill_of
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import microbatches
from jaxdpo.losses import LossSpec
from jaxdpo.models import Decoder, TransformerConfig, abstract_params, make_decoder
from jaxdpo.sharding import batch_size_multiple, length_multiple, tokens_apart
from jaxdpo.train.choose import choose_loss, scalars_of
from jaxdpo.train.defaults import choose_microbatch_tokens, default_attention, default_dtype, precision
from jaxdpo.train.forecast import layout_costs
from jaxdpo.train.memory import layout_bytes, state_bytes
from jaxdpo.train.optimizer import make_optimizer
from jaxdpo.types import Batch, InputError, Origin


class Job(NamedTuple):
    """A step that is planned for, on any mesh of the devices."""

    config: DPOConfig
    """Of a run that would do it."""
    decoder: Decoder
    """As far as it does not depend on the mesh."""
    devices: Sequence[jax.Device]
    dataset: TokenizedDataset
    """The pairs of one step."""
    loss: LossSpec
    scalars: dict[str, Any]
    optimizer: optax.GradientTransformation
    usable: float
    """Bytes of a device's memory that programs may take."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return max(self.config.lengths_of_rows or (0,))


class Placed(NamedTuple):
    """A job on a mesh: what a run would hold and do there, by its own estimates."""

    mesh: jax.sharding.Mesh
    decoder: Decoder
    layout: Layout
    batches: list[Batch]
    """Host batches of the step's microbatches."""
    state: int
    """`state_bytes` of a device."""
    activations: int
    """`layout_bytes` of a device."""

    @property
    def tokens(self) -> int:
        """Tokens of all microbatches, padding and empty rows included."""
        return sum(batch.tokens.size for batch in self.batches)

    @property
    def fill(self) -> Fill:
        """How much of that is data."""
        return fill_of(self.batches)


def make_job(plan: PlanConfig, architecture: TransformerConfig, devices: Sequence[jax.Device], usable: float) -> Job:
    """What `jaxdpo dpo` would do in a step.

    Args:
      plan: the options.
      architecture: of the model.
      devices: to compile for.
      usable: bytes of a device's memory that programs may take.
    Raises:
      InputError: for pairs that do not fit a row or the model's positions.
    """
    dtype = plan.dtype or default_dtype(devices)
    compute_dtype, product_dtype = precision(dtype, devices)
    attention = plan.attention or default_attention(devices, architecture)
    decoder = make_decoder(architecture, compute_dtype=compute_dtype, attention=attention)
    decoder = dataclasses.replace(decoder, product_dtype=product_dtype)
    path = plan.prompt_tokens + plan.completion_tokens
    if path > architecture.max_positions:
        raise InputError(
            f"--prompt-tokens {plan.prompt_tokens} and --completion-tokens {plan.completion_tokens} are {path}; "
            f"allowed: the model's {architecture.max_positions} positions"
        )
    config = DPOConfig(
        model=plan.model,
        data="pairs of a stated size",
        output_dir="nowhere",
        batch_size=plan.batch_size,
        dtype=dtype,
        row_lengths=str(plan.length),
        microbatch_tokens=plan.microbatch_tokens,
        mesh=plan.mesh,
    )
    dataset = _pairs(plan)
    loss = choose_loss(config, [dataset])
    return Job(config, decoder, devices, dataset, loss, scalars_of(config), make_optimizer(config), usable)


def place(job: Job, mesh: jax.sharding.Mesh, remat: str) -> Placed:
    """The job on one mesh, laid out as a run would.

    Raises:
      InputError: if the mesh does not divide the model or the length of rows.
    """
    decoder = dataclasses.replace(job.decoder, remat=remat)
    lengths, everything = job.config.lengths_of_rows, np.arange(len(job.dataset))
    limit = choose_microbatch_tokens(job.config.microbatch_tokens, [job.dataset], job.devices, lengths)
    layout = choose_capacity(
        [job.dataset],
        [everything],
        max_microbatch_tokens=limit * tokens_apart(mesh),
        row_multiple=batch_size_multiple(mesh),
        length_multiple=length_multiple(mesh),
        row_lengths=lengths,
        costs=layout_costs(decoder),
    )
    batches = microbatches(job.dataset, everything, layout)
    params = abstract_params(decoder, mesh)
    state = state_bytes(params, job.optimizer, accumulates=len(batches) > 1)
    return Placed(mesh, decoder, layout, batches, state, layout_bytes(decoder, layout, mesh))


def _pairs(plan: PlanConfig) -> TokenizedDataset:
    """A step's pairs, of zeros."""
    prompt, completion = (np.zeros(size, np.int32) for size in (plan.prompt_tokens, plan.completion_tokens))
    origins = (Origin("--batch-size", place, "row") for place in range(1, plan.batch_size + 1))
    groups = [TokenizedGroup(prompt, (completion, completion), False, (False, False), origin) for origin in origins]
    return TokenizedDataset.of(groups)


def shard_bytes(tree: Any) -> int:
    """What each device holds of placed arrays, or of their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
