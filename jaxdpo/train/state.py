"""The train state: step, parameters and optimizer state as one pytree, born on its shards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdpo.sharding import replicated


class TrainState(NamedTuple):
    """What a step reads and writes, and what a checkpoint holds."""

    step: jax.Array
    """int32 scalar: optimizer updates done."""
    params: dict
    """Nested dict of float32 master parameters."""
    opt_state: optax.OptState
    """What the optimizer remembers."""


def init_state(params: dict, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """State before the first update; optimizer moments are laid out like the parameters they belong to.

    `jax.jit(optimizer.init)` alone would put all moments on one device: zeros do not depend on the data.
    """
    shardings = jax.tree.map(lambda x: x.sharding, params)
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)), params, opt_state)
