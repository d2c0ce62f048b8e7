"""FLOPs and bytes of a step by arithmetic on the model's sizes: to order meshes by, and to hold the compiler's against.

What is computed and what is useful differ: padding, empty rows and what layers compute again are in the former alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.models import TransformerConfig
from jaxdpo.plan.job import Job, Placed
from jaxdpo.plan.roofline import Rates, Roofline
from jaxdpo.sharding import MESH_AXES, num_slices, tokens_apart
from jaxdpo.train.flops import forward_flops, key_flops, layer_flops, slot_flops
from jaxdpo.train.forecast import SKIPPING


class Products(NamedTuple):
    """Matrix products of scores' size that a form of attention computes; two of them are `key_flops`."""

    forward: int
    backward: int
    again: dict[str, int]
    """Of the forward ones, those that the backward pass computes again, by `remat`; none where it is not named."""


ATTENTION: dict[str, Products] = {
    "dense": Products(2, 4, {"projections": 1, "attention": 1, "full": 2}),
    "blockwise": Products(2, 5, {"full": 2}),
    "splash": Products(2, 7, {"projections": 2, "attention": 2, "full": 2}),
}
"""By form: splash's two backward kernels compute scores anew, and its forward kernel is called again."""
KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of each of splash's kernels, by the name that it has in a compiled program."""
HEAD_PASSES = 4
"""Of the LM head over the scored slots: logits, logits again, and two gradients."""


def keys_of(job: Job) -> float:
    """Keys that a query is computed with, on average: those of its group, or of its row."""
    sizes = job.dataset.tokens.astype(np.float64)
    return float(np.square(sizes).sum() / sizes.sum()) if job.decoder.attention in SKIPPING else float(job.length)


def keys_repeated(config: TransformerConfig, mesh: jax.sharding.Mesh) -> int:
    """How many of the devices that share a row's heads compute the same keys and values: all, or each its own."""
    sharing = mesh.size // tokens_apart(mesh)
    return sharing if config.num_kv_heads % sharing else 1


def step_flops(placed: Placed, *, keys: float, scored: float) -> float:
    """What all devices together compute in a step's products.

    Args:
      placed: the job on its mesh.
      keys: that each query is computed with.
      scored: slots that pass the LM head, padding of its chunks included.
    """
    decoder = placed.decoder
    config, remat = decoder.config, decoder.remat
    layers, products = layer_flops(config), ATTENTION[decoder.attention]
    # A layer's last product is not computed again: nothing in the backward pass reads its result.
    last = 2.0 * config.num_layers * config.embed_dim * config.mlp_dim
    again = layers - last if remat in ("attention", "full") else 0.0
    of_keys = 4.0 * config.num_layers * config.embed_dim * config.num_kv_heads * config.head_dim
    repeated = (keys_repeated(config, placed.mesh) - 1) * of_keys * (3 + (again > 0))
    scores = products.forward + products.backward + products.again.get(remat, 0)
    per_token = 3 * layers + again + repeated + scores * keys * key_flops(config) / 2
    return placed.tokens * per_token + HEAD_PASSES * scored * slot_flops(config)


def useful_flops(config: TransformerConfig, *, tokens: int, scored: int, keys: float) -> float:
    """Three forward passes over what is data: nothing twice, no padding."""
    return 3 * forward_flops(config, rows=1, length=tokens, slots=scored, keys=keys)


def exchanged(placed: Placed, parameters: int) -> tuple[float, float]:
    """Bytes that a device sends in a step, within its slice and between slices, about; see the documentation's Devices.

    Args:
      placed: the job on its mesh.
      parameters: of the model.
    """
    decoder, config, microbatches = placed.decoder, placed.decoder.config, len(placed.batches)
    data, fsdp, tensor, context = (placed.mesh.shape[axis] for axis in MESH_AXES)
    slices = num_slices(list(placed.mesh.devices.flat))
    shard, size = fsdp * context, jnp.dtype(decoder.compute_dtype).itemsize
    tokens = placed.tokens / (microbatches * data * shard)
    weights = parameters / tensor * (2 * size + 4) * (shard - 1) / shard
    reduced = 2 * 4 * parameters / (tensor * shard)
    copies = data // slices
    of_tensor = 8 * config.num_layers * tokens * config.embed_dim * size * (tensor - 1) / tensor
    kv_heads = config.num_kv_heads * keys_repeated(config, placed.mesh) / tensor
    keys = 4 * config.num_layers * tokens * kv_heads * config.head_dim * size * (context - 1)
    inside = weights + reduced * (copies - 1) / copies + of_tensor + keys
    return microbatches * inside, microbatches * reduced / copies * (slices - 1) / slices


def estimate(placed: Placed, parameters: int, keys: float, rates: Rates) -> Roofline:
    """The least time of a step by this arithmetic; memory is left out, which only the compiler knows."""
    scored = sum(batch.slot_owner.size for batch in placed.batches)
    flops = step_flops(placed, keys=keys, scored=scored) / placed.mesh.size
    ici, dcn = exchanged(placed, parameters)
    seconds = {"compute": flops / rates.flops}
    seconds |= {name: sent / rate for name, sent, rate in (("ici", ici, rates.ici), ("dcn", dcn, rates.dcn)) if rate}
    return Roofline(seconds, max(seconds, key=lambda name: seconds[name]))
