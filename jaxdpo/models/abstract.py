"""A module before it has parameters: its static graph, and the axes, shapes and places of what it will have."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models.config import ModelConfig
from jaxdpo.sharding import named_sharding


@functools.cache
def abstract_module(
    module: Callable[..., nnx.Module], config: ModelConfig
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """The module's static graph, and the logical axes and shapes of its parameters as nested dicts."""
    # Flax would look the logical names up in a mesh that the caller has set.
    with nnx.use_eager_sharding(False), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        graph, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: tuple(p.out_sharding), state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    shapes = jax.tree.map(lambda p: tuple(p.shape), nnx.to_pure_dict(state))
    return graph, nnx.to_pure_dict(axes), shapes


def abstract_arrays(
    module: Callable[..., nnx.Module], config: ModelConfig, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Nested dict of float32 `jax.ShapeDtypeStruct`, with shardings if a mesh is given; see `abstract_params`."""
    _, axes, shapes = abstract_module(module, config)

    def place(names: tuple[str, ...], shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, names, shape)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return jax.tree.map(place, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
