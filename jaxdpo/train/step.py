"""One optimizer step as pure functions: a one-microbatch step, or accumulate and apply.

The loss of a step is the mean over its groups. Where groups do not depend on each other, gradients add up over
microbatches. Where they do, the log-probs of all microbatches come first, the loss is differentiated with respect to
them, and one vector-Jacobian product per microbatch takes that gradient to the parameters (gradient caching, Gao et
al. 2021, https://arxiv.org/abs/2101.06983). Either way the result does not depend on how the groups were packed. The
one-microbatch program holds no accumulator.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdpo.losses import RunningMean
from jaxdpo.processes import fetch
from jaxdpo.sharding import place
from jaxdpo.train.objective import (
    Counts,
    GroupData,
    Metrics,
    Outputs,
    Scalars,
    Task,
    group_data,
    group_losses,
    joined_groups,
    joined_totals,
    mean_totals,
    shared_state,
    split_groups,
    totals,
)
from jaxdpo.train.state import TrainState
from jaxdpo.types import Array, Batch

AT_ONCE = 8
"""Microbatches that one call of a program adds up. What the program needs besides its gradients is allocated once per
call, and on CPUs fresh memory is a cost that shows."""
MICROBATCHES = "microbatches"
"""What the loop over them is called in a compiled program: how often it goes round is known when it runs."""
FAMILIES = ("loss", "rewards", "logps")
"""What a row of metrics begins with."""


class Microbatch(NamedTuple):
    """What one forward and backward pass reads."""

    batch: Batch
    """Preference trees."""
    ref_logps: Array | None
    """`[rows, slots]` float32 log-probs of the reference; None without one."""


class Coupled(NamedTuple):
    """What several microbatches need besides where their groups depend on each other."""

    forward: Callable[..., tuple[Outputs, GroupData]]
    """`(params, microbatch, scalars) -> (outputs, data)`."""
    couple: Callable[..., tuple[jax.Array, RunningMean | None, Metrics, jax.Array]]
    """`(outputs, data, counts, running mean, scalars) -> (gradient of the loss by the values, running mean, totals of
    metrics, group losses)`, all of the step's groups: `[groups, candidates]` and `[groups]`."""
    pull: Callable[..., dict]
    """`(params, grads, batch, gradient by its values, scalars) -> grads`; donates the gradients."""


class StepPrograms(NamedTuple):
    """The compiled train-step programs; `scalars` are traced, so sweeping them does not recompile."""

    step: Callable[..., tuple[TrainState, Metrics, jax.Array]]
    """`(state, microbatch, counts, scalars) -> (state, metrics, group losses)`; donates the state."""
    init: Callable[[dict], dict]
    """`(params) -> gradients` of zero, laid out like the parameters."""
    accumulate: Callable[..., tuple[dict, Metrics, jax.Array]]
    """`(params, grads, microbatches, number, counts, scalars) -> (grads, totals of metrics, group losses)` of the first
    `number` of the `AT_ONCE` microbatches, which have one shape; the totals and losses are `[AT_ONCE, ...]`. Donates
    `grads`."""
    apply: Callable[..., tuple[TrainState, Metrics]]
    """`(state, grads, totals of metrics, counts) -> (state, metrics)`; donates the state."""
    coupled: Coupled | None
    """In place of `accumulate`, for a loss whose groups depend on each other; None for others."""


def make_programs(task: Task, optimizer: optax.GradientTransformation, shardings: TrainState) -> StepPrograms:
    """Builds the train-step programs of a task and an optimizer.

    Args:
      task: the model, what it is trained for and what is reported, such as `preference_task(decoder, loss)`.
      optimizer: any Optax transformation.
      shardings: where each array of the state lives, `jax.tree.map(lambda x: x.sharding, state)`; it stays there.
    Returns:
      The programs, jitted; call them under `jax.set_mesh`.
    """

    def value(outputs: Outputs, data: GroupData, counts: Counts, running: Any, scalars: Scalars) -> tuple:
        shared, running = shared_state(task.loss, outputs, data, counts, running, scalars)
        losses = group_losses(task.loss, outputs, data, scalars, shared)  # [..., groups]
        metrics = {"loss": losses, **task.metrics(jax.lax.stop_gradient(outputs), data, counts, scalars)}
        metrics = totals(metrics, data.where)
        return metrics["loss"] / counts.groups, (metrics, losses, running)

    def objective(params: dict, microbatch: Microbatch, counts: Counts, running: Any, scalars: Scalars) -> tuple:
        outputs = task.measure(params, microbatch.batch, scalars)
        return value(outputs, group_data(*microbatch, scalars), counts, running, scalars)

    def update(state: TrainState, grads: dict, metrics: Metrics, counts: Counts) -> tuple[TrainState, Metrics]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        means = mean_totals(metrics, counts.groups) | {"grad_norm": optax.tree.norm(grads)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), means

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def step(state: TrainState, microbatch: Microbatch, counts: Counts, scalars: Scalars) -> tuple:
        gradient = jax.grad(objective, has_aux=True)
        grads, (metrics, losses, running) = gradient(state.params, microbatch, counts, state.running, scalars)
        return *update(state._replace(running=running), grads, metrics, counts), losses

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=(shardings.params, None, None))
    def accumulate(
        params: dict, grads: dict, microbatches: Sequence[Microbatch], number: int, counts: Counts, scalars: Scalars
    ) -> tuple:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *microbatches)

        def add(i: jax.Array, sums: tuple) -> tuple:
            grads, reports = sums
            microbatch = jax.tree.map(lambda x: x[i], stacked)
            more, (*report, _) = jax.grad(objective, has_aux=True)(params, microbatch, counts, None, scalars)
            reports = jax.tree.map(lambda of_all, x: of_all.at[i].set(x), reports, report)
            return jax.tree.map(jnp.add, grads, more), reports

        *report, _ = jax.eval_shape(objective, params, microbatches[0], counts, None, scalars)[1]
        nothing = jax.tree.map(lambda x: jnp.zeros((len(microbatches), *x.shape), x.dtype), report)
        with jax.named_scope(MICROBATCHES):
            grads, (metrics, losses) = jax.lax.fori_loop(0, number, add, (grads, nothing))
        return grads, metrics, losses  # [AT_ONCE, ...] metrics and losses

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def apply(state: TrainState, grads: dict, metrics: Metrics, counts: Counts) -> tuple[TrainState, Metrics]:
        return update(state, grads, metrics, counts)

    def init(params: dict) -> dict:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), params)

    coupled = None
    if task.loss.coupling in ("statistic", "sort"):
        coupled = _couple(value, task.measure, shardings)
    return StepPrograms(step, init, accumulate, apply, coupled)


def _couple(value: Callable[..., tuple], measure: Callable[..., Outputs], shardings: TrainState) -> Coupled:
    """Programs that differentiate `value` by the values of the whole step, and those by the parameters."""

    @jax.jit
    def couple(outputs: Outputs, data: GroupData, counts: Counts, running: Any, scalars: Scalars) -> tuple:
        def of_values(values: jax.Array) -> tuple:
            return value(outputs._replace(values=values), data, counts, running, scalars)

        cotangent, (metrics, losses, after) = jax.grad(of_values, has_aux=True)(outputs.values)
        return cotangent, after, metrics, losses

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=shardings.params)
    def pull(params: dict, grads: dict, batch: Batch, cotangent: jax.Array, scalars: Scalars) -> dict:
        def inner(params: dict) -> jax.Array:
            return (cotangent * measure(params, batch, scalars).values).sum()

        return jax.tree.map(jnp.add, grads, jax.grad(inner)(params))

    @jax.jit
    def forward(params: dict, microbatch: Microbatch, scalars: Scalars) -> tuple[Outputs, GroupData]:
        return measure(params, microbatch.batch, scalars), group_data(*microbatch, scalars)

    return Coupled(forward, couple, pull)


def run_step(
    programs: StepPrograms, state: TrainState, microbatches: Sequence[Microbatch], counts: Counts, scalars: Scalars
) -> tuple[TrainState, dict[str, float], list[Array]]:
    """One optimizer step over its microbatches.

    Args:
      programs: from `make_programs`.
      state: donated.
      microbatches: all of the step, on the mesh.
      counts: of the whole step, `step_counts` of its host batches.
      scalars: options of the loss by name; `beta` always.
    Returns:
      The new state, metrics as floats, and the losses `[rows, groups]` of each microbatch.
    """
    if len(microbatches) == 1:
        state, metrics, losses = programs.step(state, microbatches[0], counts, scalars)
        return state, as_floats(metrics), fetch([losses])
    grads = programs.init(state.params)
    if programs.coupled is None:
        calls = []
        for numbers in _calls(microbatches):
            of_call = [microbatches[i] for i in numbers]
            filled = of_call + of_call[-1:] * (AT_ONCE - len(of_call))
            grads, *report = programs.accumulate(state.params, grads, filled, len(numbers), counts, scalars)
            calls.append((numbers, report))
        reports = {}
        for numbers, report in fetch(calls):
            for n, i in enumerate(numbers):
                reports[i] = jax.tree.map(operator.itemgetter(n), report)
        in_order = [reports[i] for i in range(len(microbatches))]
        sums, per_group = joined_totals([metrics for metrics, _ in in_order]), [losses for _, losses in in_order]
    else:
        forward, couple, pull = programs.coupled
        measured = fetch([forward(state.params, microbatch, scalars) for microbatch in microbatches])
        masks = [data.where.any(axis=-1) for _, data in measured]
        # Of the groups alone: their number is the same in every step, that of rows and microbatches is not.
        outputs, data = joined_groups(measured, masks)
        cotangent, running, sums, losses = couple(outputs, data, counts, state.running, scalars)
        cotangents, per_group = (split_groups(np.asarray(of_groups), masks) for of_groups in (cotangent, losses))
        for microbatch, of_rows in zip(microbatches, cotangents, strict=True):
            cotangent = place(of_rows, microbatch.batch.candidate_mask.sharding)
            grads = pull(state.params, grads, microbatch.batch, cotangent, scalars)
        state = state._replace(running=running)
    state, metrics = programs.apply(state, grads, sums, counts)
    return state, as_floats(metrics), per_group


def _calls(microbatches: Sequence[Microbatch]) -> Iterator[Sequence[int]]:
    """The numbers of the microbatches of each call: of one shape, `AT_ONCE` at most."""
    by_shape: dict[tuple, list[int]] = {}
    for i, microbatch in enumerate(microbatches):
        by_shape.setdefault(tuple(x.shape for x in jax.tree.leaves(microbatch)), []).append(i)
    for numbers in by_shape.values():
        yield from (numbers[first : first + AT_ONCE] for first in range(0, len(numbers), AT_ONCE))


def as_floats(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Metrics for people: `loss` first, then `rewards/`, `logps/` and the rest, by name (jit sorts a dict's keys)."""

    def place(name: str) -> tuple[int, str]:
        family = name.split("/")[0]
        return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)), name

    return {name: shortest(metrics[name]) for name in sorted(metrics, key=place)}


def shortest(value: Array) -> float:
    """A scalar as the shortest decimal that stands for it in its own precision: 5e-06, not 4.999999873689376e-06."""
    return float(str(np.asarray(value)[()]))
