"""The train state: all that a step reads and writes as one pytree, born on its shards."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdpo.losses import LossSpec, RunningMean
from jaxdpo.sharding import place, replicated


class TrainState(NamedTuple):
    """What a step reads and writes, and what a checkpoint holds."""

    step: jax.Array
    """int32 scalar: optimizer updates done."""
    params: dict
    """Nested dict of float32 master parameters."""
    opt_state: optax.OptState
    """What the optimizer remembers."""
    running: RunningMean | None = None
    """What the loss carries from step to step; None for most."""
    ref_params: dict | None = None
    """The reference's parameters where it follows the policy; None where it stays what it was."""

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Where it lives."""
        return jax.tree.leaves(self.params)[0].sharding.mesh


class KLPenalty(NamedTuple):
    """How PPO is kept near its reference."""

    coef: jax.Array
    """float32 scalar: the strength in the next step."""


class PPOState(NamedTuple):
    """What a step of PPO reads and writes, and what a checkpoint holds."""

    step: jax.Array
    """int32 scalar: optimizer updates done, several in each step of PPO."""
    params: dict
    """`policy`, the parameters of a decoder, and `value`, those of its value head."""
    opt_state: optax.OptState
    """What the optimizer remembers."""
    penalty: KLPenalty

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Where it lives."""
        return jax.tree.leaves(self.params)[0].sharding.mesh


def init_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    loss: LossSpec | None = None,
    moving_reference: bool = False,
) -> TrainState:
    """State before the first update; optimizer moments are laid out like the parameters they belong to.

    `jax.jit(optimizer.init)` alone would put all moments on one device: zeros do not depend on the data.

    Args:
      params: on the mesh.
      optimizer: any Optax transformation.
      mesh: where the rest goes.
      loss: what is trained, if it may carry a running mean.
      moving_reference: whether to keep a copy of the parameters as a reference that will follow them.
    """
    opt_shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer, mesh).opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    running = None
    if loss is not None and loss.running is not None:
        running = RunningMean(
            *(place(np.zeros((), jnp.result_type(float)), replicated(mesh)) for _ in RunningMean._fields)
        )
    ref_params = jax.tree.map(jnp.copy, params) if moving_reference else None
    step = place(np.zeros((), np.int32), replicated(mesh))
    return TrainState(step, params, opt_state, running, ref_params)


def abstract_state(params: dict, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and placement of `init_state`'s result for most losses: nothing is allocated, and no device need be there.

    Args:
      params: on the mesh; shapes with their shardings will do, `models.abstract_params`.
      optimizer: any Optax transformation.
      mesh: where the rest goes.
    """

    def placed(leaf: Any, sharding: jax.sharding.NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        placed,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda leaf: placed(leaf, replicated(mesh)),
    )
    params = jax.tree.map(lambda x: placed(x, x.sharding), params)
    return TrainState(placed(jax.ShapeDtypeStruct((), jnp.int32), replicated(mesh)), params, opt_state)


def move_reference(state: TrainState, mixup: jax.Array | float) -> TrainState:
    """The state whose reference has gone the part `mixup` of the way to its policy; 1: all of it. Donates the state.

    References:
      Gorbatovski et al. 2024, "Learn your reference model for real good alignment" (TR-DPO),
      https://arxiv.org/abs/2404.09656: its soft update, and at 1 its hard update.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)  # else the compiler's own, and every program compiles anew
    return jax.jit(_moved, donate_argnums=0, out_shardings=shardings)(state, mixup)


def _moved(state: TrainState, mixup: jax.Array | float) -> TrainState:
    mixed = jax.tree.map(lambda ref, policy: mixup * policy + (1 - mixup) * ref, state.ref_params, state.params)
    return state._replace(ref_params=mixed)
