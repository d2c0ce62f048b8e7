"""Encoders with a classifier's head: bidirectional, post-norm, one vector of logits for each text.

As with decoders, an `Encoder` is the static half, closed over by jit, and `params` a nested dict of arrays. The layers
are those of decoders; what differs is how a block puts them together, who sees whom, and the head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models.abstract import abstract_arrays, abstract_module
from jaxdpo.models.attention import Attend, attention
from jaxdpo.models.config import EncoderConfig
from jaxdpo.models.layers import MLP, Attention, Norm, Projection, make_param
from jaxdpo.models.matmul import check_compute_dtype, wide_dtype
from jaxdpo.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A classifier without its parameters; make one with `make_encoder`.

    Attributes:
      config: what it computes.
      compute_dtype: what activations are; parameters are cast to it at use. The head is at least float32.
    """

    config: EncoderConfig
    compute_dtype: str

    def logits(self, params: dict[str, Any], tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Logits of texts, which neither padding nor the other rows change.

        Args:
          params: as from `hf.load_encoder`.
          tokens: int `[rows, length]`, padded at the end with any ids; `length` at most `max_positions`.
          lengths: int `[rows]` tokens of each text; 0 for a row without one.
        Returns:
          `[rows, labels]`, at least float32; arbitrary finite numbers for a row without text.
        """
        module = nnx.merge(abstract_module(EncoderClassifier, self.config)[0], params)
        return module(tokens, lengths, jnp.dtype(self.compute_dtype))

    def abstract_params(self, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
        """Shapes of the parameters, and where each lives on a mesh; as `models.abstract_params` of a decoder."""
        return abstract_arrays(EncoderClassifier, self.config, mesh)


def make_encoder(config: EncoderConfig, *, compute_dtype: str = "float32") -> Encoder:
    """The static half of a classifier; `compute_dtype` as in `models.make_decoder`."""
    check_compute_dtype(compute_dtype)
    return Encoder(config, compute_dtype)


class EncoderBlock(nnx.Module):
    """Attention, then the feed-forward layer; each is added to its input and the sum normed."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = Norm(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_norm = Norm(config, rngs=rngs)

    def __call__(self, x: jax.Array, attend: Attend) -> jax.Array:
        """`[rows, length, embed]` -> same shape and dtype."""
        x = self.attention_norm(x + self.attention(x, attend, None, x.dtype))
        return self.mlp_norm(x + self.mlp(x, x.dtype))


class EncoderClassifier(nnx.Module):
    """Parameters `tokens`, `positions`, `token_types`, `embedding_norm`, `blocks` (first axis `layers`), and those of
    the head, `pooler` and `labels`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = jax.nn.initializers.normal(config.init_std)
        self.tokens = make_param(config, ("words", "embed"), normal, rngs)
        self.positions = make_param(config, ("positions", "embed"), normal, rngs)
        self.token_types = make_param(config, ("token_types", "embed"), normal, rngs)
        self.embedding_norm = Norm(config, rngs=rngs)
        stack = nnx.transform_metadata(
            lambda key: EncoderBlock(config, rngs=key), in_axes=0, out_axes=0, partition="layers"
        )
        self.blocks = jax.vmap(stack)(rngs.split(config.num_layers))
        self.pooler = Projection(config, ("embed",), ("pooled",), bias=True, rngs=rngs)
        self.labels = Projection(config, ("pooled",), ("labels",), bias=True, rngs=rngs)

    def __call__(self, tokens: jax.Array, lengths: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """As `Encoder.logits`."""
        length, wide = tokens.shape[1], wide_dtype(dtype)
        first = self.config.position_offset
        x = self.tokens[...][tokens] + self.positions[...][None, first : first + length]  # [rows, length, embed]
        x = self.embedding_norm((x + self.token_types[...][None, :1]).astype(wide)).astype(dtype)
        x = constrain(x, "batch", None, None)
        seen = (jnp.arange(length)[None] < lengths[:, None])[:, None]  # [rows, 1, key]
        attend = functools.partial(attention, mask=seen)

        def layer(x: jax.Array, block: EncoderBlock) -> tuple[jax.Array, None]:
            return constrain(block(x, attend), "batch", None, None), None

        x, _ = jax.lax.scan(layer, x, self.blocks)
        # Of the first token, which stands for the text; differences of near logits are rewards.
        pooled = jnp.tanh(self.pooler(x[:, :1].astype(wide), wide))  # [rows, 1, pooled]
        return constrain(self.labels(pooled, wide)[:, 0], "batch", None)
