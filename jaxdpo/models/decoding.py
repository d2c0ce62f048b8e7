"""Forward passes that keep keys and values: of prompts at once, and of their samples token by token.

The samples of a prompt share its keys and values, which are stored once and read once for all of them; each sample has
its own behind. The modules are those of training. Their weights are laid out anew, once, by `decoding_params`: a step
reads all of them for a handful of tokens, so what it costs is how fast they come out of memory.

Axes: `prompts`; `samples`, of each of them; `length`, of prompts with padding behind; `capacity`, for sampled tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models import Decoder, logical_axes
from jaxdpo.models.abstract import abstract_module
from jaxdpo.models.attention import Attend, cached_attention
from jaxdpo.models.config import TransformerConfig
from jaxdpo.models.forms import ATTENTION
from jaxdpo.models.layers import Projection
from jaxdpo.models.matmul import multiply_few
from jaxdpo.models.transformer import Transformer
from jaxdpo.sharding import constrain

KeysValues = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values of every layer."""


class DecodingParams(NamedTuple):
    """Parameters as decoding reads them."""

    layers: tuple[dict[str, Any], ...]
    """Of each block, kernels `[outputs, inputs]`."""
    others: dict[str, Any]
    """Embeddings and the final norm."""
    head: jax.Array
    """`[vocab, embed]`."""


class PromptCache(NamedTuple):
    """What samples read of their prompts."""

    layers: KeysValues
    """Keys are `[prompts, kv_heads, head_dim, length]`, values have the last two axes exchanged."""
    lengths: jax.Array
    """int `[prompts]`: tokens of each prompt."""


def decoding_params(decoder: Decoder, params: dict[str, Any]) -> DecodingParams:
    """Parameters laid out for decoding, where they are on the mesh that is set; to be compiled.

    Layers are apart, because a scan over stacked ones copies every layer before it reads it. Kernels are in the dtype
    of products. On a mesh they are split over `tensor` alone: a step that had to gather the rest would take as long as
    the gathering.

    Args:
      decoder: with an LM head.
      params: as from `init_params` or `load_hf`.
    """
    axes, dtype = logical_axes(decoder), decoder.multiplied_dtype
    contracted = _decoding_graph(decoder.config)[1]

    def place(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
        return constrain(x, *(None if name == "embed" else name for name in names))

    def of_layer(layer: int, path: tuple, stacked: jax.Array, names: tuple[str, ...]) -> jax.Array:
        module, leaf = tuple(part.key for part in path[:-1]), path[-1].key
        x, names = stacked[layer], names[1:]
        if leaf != "kernel":
            return place(x, names)
        inputs = contracted[module]
        order = (*range(inputs, x.ndim), *range(inputs))
        return place(x.transpose(order).astype(dtype), tuple(names[axis] for axis in order))

    def block(layer: int) -> dict[str, Any]:
        of_leaf = functools.partial(of_layer, layer)
        return jax.tree_util.tree_map_with_path(of_leaf, params["blocks"], axes["blocks"])

    layers = tuple(block(layer) for layer in range(decoder.config.num_layers))
    others = {
        name: jax.tree.map(place, part, axes[name]) for name, part in params.items() if name not in ("blocks", "head")
    }
    return DecodingParams(layers, others, place(decoder.head(params).astype(dtype), ("vocab", "embed")))


def prefill(
    decoder: Decoder, params: DecodingParams, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, PromptCache]:
    """Reads prompts.

    Args:
      decoder: the model.
      params: from `decoding_params`.
      tokens: int `[prompts, length]`, whatever behind a prompt's end.
      lengths: int `[prompts]`, at least 1.
    Returns:
      Logits of each prompt's first sampled token, `[prompts, vocab]`, and what its samples read of it.
    """
    prompts, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], (prompts, length))
    form = ATTENTION[decoder.attention]
    group = (positions < lengths[:, None]).astype(jnp.int32)
    prepared = form.prepare(positions, group, jnp.zeros_like(group), window=decoder.config.sliding_window)
    layers = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        layers.append((k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
        return form.attend(q, k, v, prepared)

    states = _states(decoder, params, tokens, positions, lambda layer: attend)  # [prompts, length, embed]
    last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [prompts, embed]
    return _logits(decoder, params, last), PromptCache(tuple(layers), lengths)


def empty_cache(decoder: Decoder, rows: int, capacity: int) -> KeysValues:
    """Room for keys, `[rows, kv_heads, head_dim, capacity]`, and values, with the last two axes exchanged."""
    config = decoder.config

    def zeros(*sizes: int) -> jax.Array:
        x = jnp.zeros((rows, config.num_kv_heads, *sizes), decoder.compute_dtype)
        return constrain(x, "batch", "kv_heads", None, None)

    return tuple((zeros(config.head_dim, capacity), zeros(capacity, config.head_dim)) for _ in range(config.num_layers))


def decode_step(
    decoder: Decoder,
    params: DecodingParams,
    prompt: PromptCache,
    own: KeysValues,
    tokens: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, KeysValues]:
    """Reads one more token of every sample.

    Args:
      decoder: the model.
      params: from `decoding_params`.
      prompt: from `prefill`.
      own: keys and values of the `step` tokens before, of `prompts * samples` rows, as from `empty_cache`.
      tokens: int `[prompts, samples]`.
      step: int, below the capacity of `own`.
    Returns:
      Logits of the next tokens, `[prompts, samples, vocab]`, and `own` with these.
    """
    prompts, samples = tokens.shape
    positions = jnp.broadcast_to((prompt.lengths + step)[:, None], tokens.shape).reshape(-1, 1)
    updated = []

    def of_layer(layer: int) -> Attend:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys = jax.lax.dynamic_update_slice_in_dim(own[layer][0], k.transpose(0, 2, 3, 1), step, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(own[layer][1], v.swapaxes(1, 2), step, axis=2)
            updated.append((keys, values))
            out = cached_attention(
                q.reshape(prompts, samples, *q.shape[2:]),
                prompt.layers[layer],
                updated[layer],
                prompt.lengths,
                step,
                window=decoder.config.sliding_window,
            )
            return out.reshape(q.shape)

        return attend

    states = _states(decoder, params, tokens.reshape(-1, 1), positions, of_layer)  # [prompts * samples, 1, embed]
    logits = _logits(decoder, params, states[:, 0]).reshape(prompts, samples, -1)
    return logits, tuple(updated)


def _states(
    decoder: Decoder,
    params: DecodingParams,
    tokens: jax.Array,
    positions: jax.Array,
    attend_of: Callable[[int], Attend],
) -> jax.Array:
    """States after the final norm, `[rows, length, embed]`; `attend_of` gives the attention of each layer."""
    graph, _ = _decoding_graph(decoder.config)
    head = {} if decoder.config.tie_embeddings else {"head": params.head}
    models = [nnx.merge(graph, {**params.others, **head, "blocks": layer}) for layer in params.layers]
    x, angles = models[0].embed(tokens, positions, jnp.dtype(decoder.compute_dtype))
    for layer, model in enumerate(models):
        x = model.blocks(x, attend_of(layer), angles, decoder.multiplied_dtype)
        x = constrain(x, "batch", None, None)
    return models[0].final_norm(x)


def _logits(decoder: Decoder, params: DecodingParams, states: jax.Array) -> jax.Array:
    """`[rows, embed]` -> `[rows, vocab]`, at least float32."""
    logits = multiply_few(states, params.head, decoder.multiplied_dtype)
    return constrain(logits, "batch", "vocab")


@functools.cache
def _decoding_graph(config: TransformerConfig) -> tuple[nnx.GraphDef, dict[tuple[str, ...], int]]:
    """The module's static graph with its kernels transposed, and how many axes each projection of a block contracts."""
    graph, _, shapes = abstract_module(Transformer, config)
    model = nnx.merge(graph, shapes)
    contracted = {}
    for path, module in nnx.iter_graph(model.blocks):
        if isinstance(module, Projection):
            module.transposed = True
            contracted[path] = module.contracted
    return nnx.split(model)[0], contracted
