"""What a model is trained for: what is measured of it on a batch, what is minimised, and what is reported.

The same functions serve a microbatch in a training step, all microbatches of a step at once, and a whole held-out set.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.lm_head import STATISTICS
from jaxdpo.logprobs import candidate_lengths, sequence_logps, token_statistics
from jaxdpo.losses import LossSpec, RunningMean
from jaxdpo.losses.metrics import mean_metrics, preference_metrics, unpaired_metrics
from jaxdpo.losses.reward_metrics import reward_metrics
from jaxdpo.models import Decoder
from jaxdpo.rewards import candidate_rewards
from jaxdpo.types import Array, Batch

Scalars = Mapping[str, Any]
"""Options of the objective by name; they are traced, so sweeping them does not recompile."""
Metrics = dict[str, jax.Array]

EXTREMES = {"min_reward": (jnp.minimum, jnp.inf), "max_reward": (jnp.maximum, -jnp.inf)}
"""Metrics that are not means over groups: how two of them make one, and what an empty group has."""


class Counts(NamedTuple):
    """What a whole step holds, known from its batches."""

    groups: Array
    """float32 scalar."""
    mean_length: Array
    """float32 scalar: tokens of a group's best completion, on average."""


class Outputs(NamedTuple):
    """What a model says of every completion: `[..., groups, candidates]` each."""

    values: Array
    """Log-probs, nats; of a reward model, rewards."""
    statistics: dict[str, Array]
    """Sums over tokens of whatever else the task asks for, by name in `jaxdpo.lm_head.STATISTICS`."""


class GroupData(NamedTuple):
    """What a loss reads besides the model's outputs: `[..., groups, candidates]` each, unless said otherwise."""

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
    margin: Array | None = None
    """`[..., groups]` as `Batch.margin`."""


class Task(NamedTuple):
    """What a model is trained for."""

    loss: LossSpec
    """What is minimised."""
    measure: Callable[[dict, Batch, Scalars], Outputs]
    """`(params, batch, scalars) -> outputs`, differentiable in the parameters."""
    metrics: Callable[[Outputs, GroupData, Counts, Scalars], Metrics]
    """`(outputs, data, counts, scalars) -> metrics of every group`, `[..., groups]` each; 0 for empty ones."""


def step_counts(batches: Sequence[Batch]) -> Counts:
    """The counts of a step's host batches."""
    groups = sum(int(batch.group_mask.sum()) for batch in batches)
    tokens = 0
    for batch in batches:
        of_groups, candidates = batch.candidate_mask.shape[1:]
        tokens += int(((batch.slot_owner < of_groups * candidates) & (batch.slot_owner % candidates == 0)).sum())
    return Counts(np.float32(groups), np.float32(tokens / max(groups, 1)))


def statistics_of(loss: LossSpec) -> tuple[str, ...]:
    """What a loss asks of the LM head besides log-probs: names in `jaxdpo.lm_head.STATISTICS`."""
    return tuple(name for name in loss.data if name in STATISTICS)


def preference_task(decoder: Decoder, loss: LossSpec) -> Task:
    """A policy that learns from completions which are compared, or judged one by one."""

    def metrics(policy: Outputs, data: GroupData, counts: Counts, scalars: Scalars) -> Metrics:
        del counts
        common = {"beta": scalars["beta"], "where": data.where}
        if data.label is not None:
            return unpaired_metrics(policy.values, data.ref_logps, label=data.label[..., 0], **common)
        return preference_metrics(policy.values, data.ref_logps, lengths=data.lengths, ranks=data.ranks, **common)

    return Task(loss, _policy(decoder, statistics_of(loss)), metrics)


_OF_TOKENS = {"mean_token_accuracy": "correct", "entropy": "entropy"}
"""Metrics of imitation -> the statistic that they are the mean of."""


def imitation_task(decoder: Decoder, loss: LossSpec) -> Task:
    """A policy that learns single completions by heart; reports TRL's means over their tokens."""

    def metrics(policy: Outputs, data: GroupData, counts: Counts, scalars: Scalars) -> Metrics:
        del data, scalars
        tokens = jnp.maximum(counts.mean_length, 1)  # so the mean over groups is the mean over tokens
        return {name: policy.statistics[of][..., 0] / tokens for name, of in _OF_TOKENS.items()}

    return Task(loss, _policy(decoder, tuple(_OF_TOKENS.values())), metrics)


def reward_task(decoder: Decoder, loss: LossSpec) -> Task:
    """A reward model that learns which completions are better."""

    def measure(params: dict, batch: Batch, scalars: Scalars) -> Outputs:
        del scalars
        return Outputs(candidate_rewards(decoder, params, batch), {})

    def metrics(outputs: Outputs, data: GroupData, counts: Counts, scalars: Scalars) -> Metrics:
        del counts, scalars
        return reward_metrics(outputs.values, ranks=data.ranks, where=data.where)

    return Task(loss, measure, metrics)


def _policy(decoder: Decoder, statistics: Sequence[str]) -> Callable[[dict, Batch, Scalars], Outputs]:
    def measure(params: dict, batch: Batch, scalars: Scalars) -> Outputs:
        tokens, others = token_statistics(decoder, params, batch, statistics)
        logps = sequence_logps(tokens, batch, tail_weight=scalars.get("ld_alpha"))
        return Outputs(logps, {name: sequence_logps(value, batch) for name, value in others.items()})

    return measure


def group_data(batch: Batch, ref_logps: Array | None, scalars: Scalars) -> GroupData:
    """What a loss reads of a batch and of the reference's log-probs `[rows, slots]`."""
    reference = None if ref_logps is None else sequence_logps(ref_logps, batch, tail_weight=scalars.get("ld_alpha"))
    lengths = candidate_lengths(batch)
    return GroupData(reference, batch.candidate_mask, lengths, batch.rank, batch.label, batch.margin)


def joined_groups(parts: Sequence[Any], masks: Sequence[Array]) -> Any:
    """What several microbatches hold of their groups, as one, on the host: their rows may be of any length and number.

    Args:
      parts: of each a pytree of NumPy arrays `[rows, groups, ...]`.
      masks: of each bool `[rows, groups]`: which groups exist.
    Returns:
      The pytree of arrays `[groups of the step, ...]`, in the order of the microbatches.
    """
    return jax.tree.map(
        lambda *arrays: np.concatenate([array[mask] for array, mask in zip(arrays, masks, strict=True)]), *parts
    )


def split_groups(of_groups: np.ndarray, masks: Sequence[Array]) -> list[np.ndarray]:
    """The inverse of `joined_groups`: of each microbatch `[rows, groups, ...]`, 0 for groups that do not exist."""
    ends = np.cumsum([mask.sum() for mask in masks])
    out = [np.zeros((*mask.shape, *of_groups.shape[1:]), of_groups.dtype) for mask in masks]
    for array, mask, part in zip(out, masks, np.split(of_groups, ends[:-1]), strict=True):
        array[mask] = part
    return out


def group_losses(
    loss: LossSpec, outputs: Outputs, data: GroupData, scalars: Scalars, shared: Mapping[str, Any] | None = None
) -> jax.Array:
    """The loss of every group, `[..., groups]`; 0 for empty ones.

    Args:
      loss: what to compute.
      outputs: of the model on the groups.
      data: of the groups.
      scalars: options by name; those that the loss does not name are left out.
      shared: what a coupled loss takes of the whole step: `mean_length` or `baseline`; by default these groups are all.
    """
    label = None if data.label is None else data.label[..., 0]  # of the completion, not of its partner
    of_data = {"lengths": data.lengths, "ranks": data.ranks, "label": label, "margin": data.margin}
    available = {**of_data, **outputs.statistics}
    arrays = {name: available[name] for name in loss.data}
    options = {name: scalars[name] for name in loss.options if name in scalars}
    return loss.fn(outputs.values, data.ref_logps, where=data.where, **arrays, **options, **(shared or {}))


def shared_state(
    loss: LossSpec, outputs: Outputs, data: GroupData, counts: Counts, running: RunningMean | None, scalars: Scalars
) -> tuple[dict[str, Any], RunningMean | None]:
    """What a coupled loss takes of the whole step (see `group_losses`), and the running mean after it."""
    if loss.coupling == "denominator":
        return {"mean_length": counts.mean_length}, running
    if loss.running is None:
        return {}, running
    values = jax.lax.stop_gradient(outputs.values)
    running = loss.running(running, values, data.ref_logps, where=data.where, beta=scalars["beta"])
    return {"baseline": running.mean}, running


def totals(metrics: Metrics, where: Array) -> Metrics:
    """Sums over the groups of metrics `[..., groups]`, and the extremes among them; `where` is of the candidates."""
    exists = where.any(axis=-1)  # [..., groups]

    def total(name: str, value: jax.Array) -> jax.Array:
        if name not in EXTREMES:
            return value.sum()
        extreme, of_none = EXTREMES[name]
        return extreme.reduce(jnp.where(exists, value, of_none), axis=None)

    return {name: total(name, value) for name, value in metrics.items()}


def joined_totals(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The totals of several microbatches as those of one."""
    joined = dict(parts[0])
    for part in parts[1:]:
        joined = {name: EXTREMES.get(name, (np.add,))[0](value, part[name]) for name, value in joined.items()}
    return joined


def mean_totals(sums: Mapping[str, Array], groups: Array) -> Metrics:
    """What is reported of the totals of a step, or of a whole set, of so many groups."""
    extremes = {name: jnp.asarray(value) for name, value in sums.items() if name in EXTREMES}
    return mean_metrics({name: value for name, value in sums.items() if name not in EXTREMES}, groups) | extremes
