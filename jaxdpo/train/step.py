"""One optimizer step as pure functions: a one-microbatch step, or accumulate and apply.

A loss is a sum over groups divided by the number of groups in the whole step, so gradients add up over microbatches
and the result does not depend on how the groups were packed. The one-microbatch program holds no accumulator.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdpo.logprobs import sequence_logps, token_logps
from jaxdpo.losses import LossSpec, preference_metrics
from jaxdpo.models import Decoder
from jaxdpo.train.state import TrainState
from jaxdpo.types import Array, Batch, InputError

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Means over the groups of a step or of an evaluation, under TRL's names."""


class Microbatch(NamedTuple):
    """What one forward and backward pass reads."""

    batch: Batch
    """Preference trees."""
    ref_logps: Array
    """`[rows, slots]` float32 log-probs of the reference."""


class Accumulator(NamedTuple):
    """Gradients and metrics summed over the microbatches of a step so far."""

    grads: dict
    """Like the parameters."""
    metrics: dict[str, jax.Array]
    """One scalar for each of `METRICS`."""


class StepPrograms(NamedTuple):
    """The compiled train-step programs; `scalars` are traced, so sweeping them does not recompile."""

    step: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]
    """`(state, microbatch, groups, scalars) -> (state, metrics, group losses)`; donates the state."""
    init: Callable[[dict], Accumulator]
    """`(params) -> zeros` laid out like the parameters."""
    accumulate: Callable[..., tuple[Accumulator, jax.Array]]
    """`(params, accumulator, microbatch, groups, scalars) -> (accumulator, group losses)`; donates the accumulator."""
    apply: Callable[[TrainState, Accumulator], tuple[TrainState, dict[str, jax.Array]]]
    """`(state, accumulator) -> (state, metrics)`; donates the state."""


def group_metrics(
    loss: LossSpec, policy: Array, reference: Array, where: Array, scalars: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Loss and TRL-named metrics per group, from `[..., candidates]` log-probs: arrays `[...]`, 0 for empty groups."""
    options = {name: scalars[name] for name in loss.options}
    losses = loss.fn(policy, reference, where=where, **options)
    return {"loss": losses, **preference_metrics(policy, reference, beta=scalars["beta"], where=where)}


def make_programs(
    decoder: Decoder, loss: LossSpec, optimizer: optax.GradientTransformation, shardings: TrainState
) -> StepPrograms:
    """Builds the train-step programs of a model, a loss and an optimizer.

    Args:
      decoder: the model.
      loss: a row of `LOSSES`; its gradients are a sum over groups (`coupling` is "none").
      optimizer: any Optax transformation.
      shardings: where each array of the state lives, `jax.tree.map(lambda x: x.sharding, state)`; it stays there.
    Returns:
      The programs, jitted; call them under `jax.set_mesh`.
    Raises:
      InputError: for a loss whose groups depend on each other: its gradients would not add up over microbatches.
    """
    if loss.coupling != "none":
        raise InputError(f"the loss has coupling {loss.coupling!r}; allowed: 'none'; its groups must not interact")

    def objective(params: dict, microbatch: Microbatch, groups: Array, scalars: Mapping[str, Any]) -> tuple:
        batch = microbatch.batch
        policy = sequence_logps(token_logps(decoder, params, batch), batch)  # [rows, groups, candidates]
        reference = sequence_logps(microbatch.ref_logps, batch)  # [rows, groups, candidates]
        values = group_metrics(loss, policy, reference, batch.candidate_mask, scalars)  # of [rows, groups]
        metrics = {name: values[name].sum() / groups for name in METRICS}
        return metrics["loss"], (metrics, values["loss"])

    gradient = jax.grad(objective, has_aux=True)

    def update(state: TrainState, grads: dict) -> tuple[TrainState, jax.Array]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), optax.tree.norm(grads)

    anywhere: Any = None  # scalars: wherever the compiler leaves them

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def step(state: TrainState, microbatch: Microbatch, groups: Array, scalars: Mapping[str, Any]) -> tuple:
        grads, (metrics, losses) = gradient(state.params, microbatch, groups, scalars)
        state, grad_norm = update(state, grads)
        return state, metrics | {"grad_norm": grad_norm}, losses

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=(Accumulator(shardings.params, anywhere), None))
    def accumulate(
        params: dict, accumulator: Accumulator, microbatch: Microbatch, groups: Array, scalars: Mapping[str, Any]
    ) -> tuple[Accumulator, jax.Array]:
        grads, (metrics, losses) = gradient(params, microbatch, groups, scalars)
        return jax.tree.map(jnp.add, accumulator, Accumulator(grads, metrics)), losses

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def apply(state: TrainState, accumulator: Accumulator) -> tuple[TrainState, dict[str, jax.Array]]:
        state, grad_norm = update(state, accumulator.grads)
        return state, accumulator.metrics | {"grad_norm": grad_norm}

    def init(params: dict) -> Accumulator:
        grads = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), params)
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(grads)), jnp.float32)
        return Accumulator(grads, {name: jnp.zeros((), dtype) for name in METRICS})

    return StepPrograms(step=step, init=init, accumulate=accumulate, apply=apply)


def run_step(
    programs: StepPrograms, state: TrainState, microbatches: list[Microbatch], groups: int, scalars: Mapping[str, Any]
) -> tuple[TrainState, dict[str, float], list[Array]]:
    """One optimizer step over its microbatches: the new state, metrics as floats, losses `[rows, groups]` of each."""
    count = jnp.float32(groups)
    if len(microbatches) == 1:
        state, metrics, losses = programs.step(state, microbatches[0], count, scalars)
        per_group = [losses]
    else:
        accumulator = programs.init(state.params)
        per_group = []
        for microbatch in microbatches:
            accumulator, losses = programs.accumulate(state.params, accumulator, microbatch, count, scalars)
            per_group.append(losses)
        state, metrics = programs.apply(state, accumulator)
    return state, {name: shortest(value) for name, value in metrics.items()}, jax.device_get(per_group)


def shortest(value: Array) -> float:
    """A scalar as the shortest decimal that stands for it in its own precision: 5e-06, not 4.999999873689376e-06."""
    return float(str(np.asarray(value)[()]))
