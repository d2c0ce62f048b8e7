"""What a loss reads of a batch: the policy's sums over every completion, and what the data says of them.

The same functions serve a microbatch in a training step, all microbatches of a step at once, and a whole held-out set.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.logprobs import STATISTICS, candidate_lengths, sequence_logps, token_statistics
from jaxdpo.losses import LossSpec, RunningMean
from jaxdpo.losses.metrics import preference_metrics, unpaired_metrics
from jaxdpo.models import Decoder
from jaxdpo.types import Array, Batch

Scalars = Mapping[str, Any]
"""Options of the objective by name; they are traced, so sweeping them does not recompile."""


class Counts(NamedTuple):
    """What a whole step holds, known from its batches."""

    groups: Array
    """float32 scalar."""
    mean_length: Array
    """float32 scalar: tokens of a group's best completion, on average."""


class Sums(NamedTuple):
    """What a policy says of every completion: `[..., groups, candidates]` each, nats."""

    logps: Array
    """Log-probs."""
    statistics: dict[str, Array]
    """Sums over tokens of what the loss asks for besides, by name in `jaxdpo.logprobs.STATISTICS`."""


class GroupData(NamedTuple):
    """What a loss reads besides the policy: `[..., groups, candidates]` each."""

    ref_logps: Array | None
    """Log-probs of the reference, nats; None without one."""
    where: Array
    """bool: which candidates exist."""
    lengths: Array
    """Scored tokens."""
    ranks: Array
    """As `Batch.rank`."""
    label: Array | None
    """As `Batch.label`."""


def step_counts(batches: Sequence[Batch]) -> Counts:
    """The counts of a step's host batches."""
    groups = sum(int(batch.group_mask.sum()) for batch in batches)
    tokens = 0
    for batch in batches:
        of_groups, candidates = batch.candidate_mask.shape[1:]
        tokens += int(((batch.slot_owner < of_groups * candidates) & (batch.slot_owner % candidates == 0)).sum())
    return Counts(np.float32(groups), np.float32(tokens / max(groups, 1)))


def statistics_of(loss: LossSpec) -> tuple[str, ...]:
    """What a loss asks of the LM head besides log-probs: names in `jaxdpo.logprobs.STATISTICS`."""
    return tuple(name for name in loss.data if name in STATISTICS)


def policy_sums(decoder: Decoder, params: dict, batch: Batch, loss: LossSpec, scalars: Scalars) -> Sums:
    """One forward pass over a batch, with what the loss asks for."""
    tokens, others = token_statistics(decoder, params, batch, statistics_of(loss))
    logps = sequence_logps(tokens, batch, tail_weight=scalars.get("ld_alpha"))
    return Sums(logps, {name: sequence_logps(value, batch) for name, value in others.items()})


def group_data(batch: Batch, ref_logps: Array | None, scalars: Scalars) -> GroupData:
    """What a loss reads of a batch and of the reference's log-probs `[rows, slots]`."""
    reference = None if ref_logps is None else sequence_logps(ref_logps, batch, tail_weight=scalars.get("ld_alpha"))
    return GroupData(reference, batch.candidate_mask, candidate_lengths(batch), batch.rank, batch.label)


def group_losses(
    loss: LossSpec, policy: Sums, data: GroupData, scalars: Scalars, shared: Mapping[str, Any] | None = None
) -> jax.Array:
    """The loss of every group, `[..., groups]`; 0 for empty ones.

    Args:
      loss: what to compute.
      policy: of the groups.
      data: of the groups.
      scalars: options by name; those that the loss does not name are left out.
      shared: what a coupled loss takes of the whole step: `mean_length` or `baseline`; by default these groups are all.
    """
    label = None if data.label is None else data.label[..., 0]  # of the completion, not of its partner
    available = {"lengths": data.lengths, "ranks": data.ranks, "label": label, **policy.statistics}
    arrays = {name: available[name] for name in loss.data}
    options = {name: scalars[name] for name in loss.options if name in scalars}
    return loss.fn(policy.logps, data.ref_logps, where=data.where, **arrays, **options, **(shared or {}))


def group_metrics(policy: Sums, data: GroupData, scalars: Scalars) -> dict[str, jax.Array]:
    """TRL-named metrics of every group, `[..., groups]` each; 0 for empty ones. `mean_metrics` takes their sums."""
    common = {"beta": scalars["beta"], "where": data.where}
    if data.label is not None:
        return unpaired_metrics(policy.logps, data.ref_logps, label=data.label[..., 0], **common)
    return preference_metrics(policy.logps, data.ref_logps, lengths=data.lengths, ranks=data.ranks, **common)


def shared_state(
    loss: LossSpec, policy: Sums, data: GroupData, counts: Counts, running: RunningMean | None, scalars: Scalars
) -> tuple[dict[str, Any], RunningMean | None]:
    """What a coupled loss takes of the whole step (see `group_losses`), and the running mean after it."""
    if loss.coupling == "denominator":
        return {"mean_length": counts.mean_length}, running
    if loss.running is None:
        return {}, running
    logps = jax.lax.stop_gradient(policy.logps)
    running = loss.running(running, logps, data.ref_logps, where=data.where, beta=scalars["beta"])
    return {"baseline": running.mean}, running
