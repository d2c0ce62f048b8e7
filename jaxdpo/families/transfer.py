"""Moving weights between a checkpoint and the parameters by a family's table, one tensor at a time."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxdpo.families.table import Config, Family, Index, Table, Weight
from jaxdpo.models import Decoder, ModelConfig, abstract_params
from jaxdpo.processes import fetch
from jaxdpo.types import InputError


class Tensors(Protocol):
    """A checkpoint on disk."""

    where: str
    """What to call it in messages."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor's shape."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """A block of a tensor."""


def load_params(
    family: Family, decoder: Decoder, tensors: Tensors, mesh: jax.sharding.Mesh | None = None
) -> dict[str, Any]:
    """Parameters from a checkpoint, float32, each device's part read straight to it.

    Args:
      family: whose table to read by.
      decoder: the model.
      tensors: the checkpoint.
      mesh: as in `models.abstract_params`.
    Returns:
      Nested dict of arrays.
    Raises:
      InputError: for a tensor that is unknown, missing, there twice or of the wrong shape; names it.
    """
    return fill_params(family, decoder.config, abstract_params(decoder, mesh), tensors)


def fill_params(table: Table[Config], config: Config, abstract: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The same for any model: parameters of the shapes, and at the places, of `abstract`."""
    names = match(table, config, tensors)
    params: dict[str, Any] = {}
    for weight in table.weights(config):
        layers = range(config.num_layers) if weight.stacked else [0]
        stored = [names[weight.name.format(layer=layer)] for layer in layers]
        for part, path in enumerate(weight.paths):
            *parents, last = path.split("/")
            leaf = _descend(abstract, parents)[last]
            read = _reader(weight, config, part, stored, tensors)
            _descend(params, parents, create=True)[last] = _place(leaf, read)
    return params


def match(table: Table[Config], config: Config, tensors: Tensors) -> dict[str, str]:
    """Name in the table -> name in the checkpoint, for every tensor of the table; InputError as in `load_params`."""
    shapes = table_shapes(table, config)
    found: dict[str, str] = {}
    for stored in tensors.shapes:
        name = stored if stored in shapes else table.prefix + stored
        if name not in shapes:
            if any(re.fullmatch(pattern, stored) for pattern in table.ignored):
                continue
            raise InputError(
                f"{tensors.where}: unknown tensor {stored!r}; a {config.model_type} model with these sizes has "
                f"{len(shapes)} tensors, {next(iter(shapes))!r} the first; is config.json of this checkpoint?"
            )
        if name in found:
            raise InputError(f"{tensors.where}: tensor {name!r} is there twice, also as {stored!r}; remove one")
        found[name] = stored
    missing = [name for name in shapes if name not in found]
    if missing:
        raise InputError(
            f"{tensors.where}: missing tensor {missing[0]!r} ({len(missing)} of {len(shapes)} are missing); "
            f"download the checkpoint again"
        )
    for name, stored in found.items():
        if tuple(tensors.shapes[stored]) != shapes[name]:
            raise InputError(
                f"{tensors.where}: tensor {stored!r} has shape {tuple(tensors.shapes[stored])}; "
                f"allowed: {shapes[name]}, by the sizes in config.json"
            )
    return found


def table_shapes(table: Table[Config], config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration has, in the order of export."""
    return {name: weight.shape(config) for weight, _, name in _rows(table, config)}


def export_tensors(family: Family, decoder: Decoder, params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint by name, one at a time on the host, in the order of `table_shapes`.

    Of parameters that several processes hold, each has to go through all of it.
    """
    config = decoder.config
    for weight, layer, name in _rows(family, config):
        parts = []
        for path in weight.paths:
            *parents, last = path.split("/")
            param = _descend(params, parents)[last]
            if weight.stacked:
                param = jax.lax.dynamic_index_in_dim(param, layer, keepdims=False)
            parts.append(fetch(param))
        yield name, weight.to_tensor(config, parts)


def split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in shards of at most `limit` bytes; a tensor larger than that is a shard of its own.

    Example:
      >>> split_shards({"a": 3, "b": 4, "c": 9, "d": 1}, limit=8)
      [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _rows(table: Table[Config], config: Config) -> Iterator[tuple[Weight, int, str]]:
    for weight in table.weights(config):
        for layer in range(config.num_layers) if weight.stacked else (0,):
            yield weight, layer, weight.name.format(layer=layer)


def _reader(
    weight: Weight, config: ModelConfig, part: int, stored: list[str], tensors: Tensors
) -> Callable[[Index], np.ndarray]:
    """Function from a block of the (stacked) parameter to its float32 values."""

    def read(index: Index) -> np.ndarray:
        layers, index = (index[0], index[1:]) if weight.stacked else (slice(0, 1), index)
        out = np.empty([layers.stop - layers.start, *(cut.stop - cut.start for cut in index)], np.float32)
        for row, name in enumerate(stored[layers]):
            out[row] = weight.to_param(config, part, index, functools.partial(tensors.read, name))
        return out if weight.stacked else out[0]

    return read


def _place(leaf: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """The array of one parameter; a block that several devices hold is read once."""
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block(index: Index | None) -> np.ndarray:
        whole = (slice(None),) * len(leaf.shape)
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index or whole, leaf.shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = read(tuple(slice(*bound) for bound in bounds))
        return blocks[bounds]

    if leaf.sharding is None:
        return jax.device_put(block(None))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)


def _descend(tree: dict[str, Any], keys: list[str], *, create: bool = False) -> dict[str, Any]:
    for key in keys:
        tree = tree.setdefault(key, {}) if create else tree[key]
    return tree
