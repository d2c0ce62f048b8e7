"""Where arrays live: the mesh, the one table from logical axes to mesh axes, and shardings derived from it.

This is the only file that names mesh axes. Parameters and activations carry logical axis names; `AXIS_RULES` says which
mesh axes each is split over. `data` and `fsdp` split the rows of a batch and `context` their length; `fsdp` and
`context` split parameters along `embed` as well, `tensor` along heads, mlp and vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils

from jaxdpo.types import InputError

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,  # activations: rows
    "length": "context",  # activations: tokens of a row
    "slots": (*BATCH_AXES, "context"),  # activations: lists of scored tokens, one for each device
    "vocab": "tensor",
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "positions": None,
    "words": None,  # an encoder's vocabulary: no head shares it, and RoBERTa's 50265 is odd
    "token_types": None,
    "pooled": None,
    "labels": None,
}
"""Logical axis -> mesh axis. None: replicated."""

WHERE_IT_DIVIDES = frozenset({"kv_heads"})
"""Logical axes that are replicated over a mesh axis that does not divide them: key/value heads may be fewer."""


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    *,
    data: int | None = None,
    fsdp: int | None = None,
    tensor: int = 1,
    context: int = 1,
) -> jax.sharding.Mesh:
    """Mesh of axes `(data, fsdp, tensor, context)` over the devices, all on `fsdp` unless told otherwise.

    Args:
      devices: the devices to use; all of this process's platform by default.
      data: copies of the parameters; by default as many as the other axes leave, which is one for each slice without
        `fsdp`. The only axis that goes over several slices.
      fsdp: groups of rows that share one copy of the parameters; by default as many as the other axes leave of a slice.
      tensor: devices that share one row's heads, mlp and vocabulary.
      context: devices that share one row's length, and one copy of the parameters with those of `fsdp`.
    Raises:
      InputError: if the sizes do not divide the number of devices, all are given and leave some of them out, or `data`
        is not a multiple of the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    stated = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    sizes = {axis: size for axis, size in stated.items() if size is not None}
    taken = math.prod(sizes.values())
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "one device"
    if min(sizes.values()) < 1 or len(devices) % taken:
        raise InputError(
            f"{text} does not divide {len(devices)} devices; "
            f"allowed: divisors of {len(devices)}, {_divisors(len(devices))}"
        )
    if len(sizes) == len(stated) and taken != len(devices):
        raise InputError(f"{text} takes {taken} of {len(devices)} devices; allowed: all of them")
    if fsdp is None:
        fsdp = max(1, len(devices) // taken // (num_slices(devices) if data is None else 1))
    grid = _grid(devices, (len(devices) // (fsdp * tensor * context), fsdp, tensor, context))
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that devices belong to, which a network connects; 1 on other platforms."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"} or {0})


def _grid(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of a mesh; on TPUs neighbours in the mesh are neighbours in a slice."""
    if num_slices(devices) > 1:
        slices = num_slices(devices)
        if shape[0] % slices:
            raise InputError(
                f"data={shape[0]} on {slices} slices; allowed: multiples of {slices}, so that nothing but gradients "
                "passes between slices"
            )
        inside, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * len(shape[1:]))
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def mesh_sizes(text: str) -> dict[str, int]:
    """What `make_mesh` is to be called with: the sizes by axis of a text such as "fsdp=4,tensor=2".

    Raises:
      InputError: for anything else than different axes with whole numbers of at least 1.
    """
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {axis.strip(): size.strip() for axis, _, size in parts}
    numbers = all(size.isascii() and size.isdecimal() and int(size) for size in sizes.values())
    if not numbers or len(sizes) < len(parts) or not set(sizes) <= set(MESH_AXES):
        raise InputError(
            f"got {text!r}; allowed: auto, or sizes of {', '.join(MESH_AXES)}, each axis once, as fsdp=4,tensor=2; "
            "the product of the sizes has to divide the number of devices"
        )
    return {axis: int(size) for axis, size in sizes.items()}


def mesh_summary(mesh: jax.sharding.Mesh) -> str:
    """The devices and the axes that are more than one wide, for people."""
    axes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return f"{mesh.size} device(s)" + (f", {','.join(axes)}" if axes else "")


def tokens_apart(mesh: jax.sharding.Mesh) -> int:
    """Number of devices that the tokens of a batch are split over: its rows, and their length."""
    return batch_size_multiple(mesh) * mesh.shape[AXIS_RULES["length"]]


def batch_size_multiple(mesh: AnyMesh) -> int:
    """Number of devices that the rows of a batch are split over; rows must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def partition_spec(logical_axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh) -> jax.P:
    """The mesh axes of an array of `shape` with these logical axes; a name that `AXIS_RULES` lacks is a KeyError."""

    def of(name: str | None, size: int) -> str | tuple[str, ...] | None:
        axes = None if name is None else AXIS_RULES[name]
        return None if name in WHERE_IT_DIVIDES and size % _size(axes, mesh) else axes

    return jax.P(*map(of, logical_axes, shape))


def _size(axes: str | tuple[str, ...] | None, mesh: AnyMesh) -> int:
    """Number of devices along mesh axes."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def named_sharding(
    mesh: jax.sharding.Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]
) -> jax.sharding.NamedSharding:
    """Sharding of an array of `shape`; refuses a size that its mesh axes do not divide, naming sizes that do."""
    spec = partition_spec(logical_axes, shape, mesh)
    for name, axes, size in zip(logical_axes, spec, shape, strict=True):
        if size % _size(axes, mesh):
            raise InputError(
                f"{name}={size} is not divisible by the {axes!r} axis of {_size(axes, mesh)} devices; "
                f"allowed: {_divisors(size)}; use a mesh with one of these sizes"
            )
    return jax.sharding.NamedSharding(mesh, spec)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Sharding of an array that every device holds whole."""
    return jax.sharding.NamedSharding(mesh, jax.P())


def length_multiple(mesh: jax.sharding.Mesh) -> int:
    """What row lengths have to be a multiple of: blocks of 128 for each of the devices that share a row."""
    apart = mesh.shape[AXIS_RULES["length"]]
    return 128 * apart if apart > 1 else 1


def rows_apart() -> int:
    """Number of devices that rows are split over inside jit: `batch_size_multiple` of the mesh that is set, or 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_size_multiple(mesh)


def lengths_apart() -> int:
    """Number of devices that the length of a row is split over inside jit; row lengths must be a multiple of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS_RULES["length"]]


def vocab_apart() -> int:
    """Number of devices that the vocabulary is split over inside jit."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS_RULES["vocab"]]


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Keeps an activation on its mesh axes inside jit; does nothing where no mesh is set.

    Without it XLA loses the batch axis after the embedding gather (measured: twice the temporaries, 14 all-reduces
    for 6).
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition_spec(logical_axes, x.shape, mesh))


def map_heads(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Attention on each device's own queries and heads, for code that XLA cannot split by itself.

    Args:
      attend: `(q [rows, queries, heads, head_dim], k [rows, length, kv_heads, head_dim], v, of_rows, first) -> as q`,
        where `of_rows` is a pytree of arrays whose first axis is rows and `first` the index of the first query.
    Returns:
      `(q, k, v, of_rows) -> as q` of whole arrays: the function itself, from query 0, without a mesh. Key/value heads
      that the mesh does not divide are repeated until it does.
    """

    def mapped(q: jax.Array, k: jax.Array, v: jax.Array, of_rows: Any) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return attend(q, k, v, of_rows, jnp.zeros((), jnp.int32))
        parts = mesh.shape[AXIS_RULES["heads"]]
        if k.shape[2] % parts:
            k, v = (jnp.repeat(x, parts // math.gcd(k.shape[2], parts), axis=2) for x in (k, v))

        def local(q: jax.Array, k: jax.Array, v: jax.Array, of_rows: Any) -> jax.Array:
            return attend(q, k, v, of_rows, jax.lax.axis_index(AXIS_RULES["length"]) * q.shape[1])

        queries = partition_spec(("batch", "length", "heads", None), q.shape, mesh)
        keys = partition_spec(("batch", None, "heads", None), k.shape, mesh)
        specs = (queries, keys, keys, partition_spec(("batch",), k.shape[:1], mesh))
        return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, of_rows)

    return mapped


def place(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array where a sharding says, None: on one device; of a host array, each process places its own parts."""
    if sharding is None or isinstance(array, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # `device_put` would compare the whole array with those of the other processes first.
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def place_batch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts host arrays on the mesh, their first axis (rows) split over the batch axes."""
    rows = jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))
    return jax.tree.map(functools.partial(place, sharding=rows), tree)


def placed_shapes(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """What `place_batch` makes of host arrays, as shapes: for programs that are compiled and not run."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
