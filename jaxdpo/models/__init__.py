"""Decoder-only Transformers whose parameters are a plain nested dict.

A `Decoder` is the static half of a model: hashable, closed over by jit. The other half, `params`, is a nested dict of
arrays, and everything that happens to it (grad, Optax, Orbax) is a pure function of a dict:

  decoder = make_decoder(config, compute_dtype="bfloat16")
  params = init_params(decoder, jax.random.key(0), mesh)
  logits = jax.jit(decoder.logits)(params, tokens)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models.abstract import abstract_arrays, abstract_module
from jaxdpo.models.attention import attention, tree_mask
from jaxdpo.models.config import EncoderConfig, ModelConfig, Rope, TransformerConfig
from jaxdpo.models.forms import ATTENTION
from jaxdpo.models.matmul import COMPUTE_DTYPES, check_compute_dtype, full_precision
from jaxdpo.models.remat import REMAT
from jaxdpo.models.transformer import Transformer
from jaxdpo.sharding import constrain
from jaxdpo.types import Array, Batch, InputError

__all__ = [
    "COMPUTE_DTYPES",
    "Decoder",
    "EncoderConfig",
    "ModelConfig",
    "Rope",
    "TransformerConfig",
    "abstract_params",
    "attention",
    "full_precision",
    "init_params",
    "logical_axes",
    "make_decoder",
    "tree_mask",
]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model without its parameters; make one with `make_decoder`.

    Attributes:
      config: what it computes.
      compute_dtype: what activations are; parameters are cast to it at use.
      attention: the form that attention is computed in, a key of `models.forms.ATTENTION`; all give the same numbers.
      remat: what a layer keeps for the backward pass, a key of `models.remat.REMAT`.
      product_dtype: what the factors of matrix products with weights are rounded to, where not to the compute dtype:
        bfloat16 products of float32 activations are the fastest on CPUs that have them.
    """

    config: TransformerConfig
    compute_dtype: str
    attention: str = "dense"
    remat: str = "full"
    product_dtype: str | None = None

    @property
    def multiplied_dtype(self) -> jnp.dtype:
        """What the factors of matrix products are rounded to."""
        return jnp.dtype(self.product_dtype or self.compute_dtype)

    def hidden(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """States of every token of packed preference trees, after the final norm.

        Args:
          params: as from `init_params` or `load_hf`.
          batch: only `tokens`, `positions`, `group` and `candidate` are read, each int `[rows, length]`.
        Returns:
          `[rows, length, embed]` in the compute dtype; arbitrary finite numbers at padding.
        """
        return self._hidden(params, batch.tokens, batch.positions, batch.group, batch.candidate)

    def head(self, params: dict[str, Any]) -> jax.Array:
        """The LM head, `[vocab, embed]` in the dtype of the parameters; the token embedding itself where it is tied."""
        return self._merge(params).head_kernel()

    def score(self, params: dict[str, Any]) -> jax.Array:
        """The score head, `[embed]`, at least float32: rewards are differences of near numbers."""
        return self._merge(params).score_kernel().astype(jnp.promote_types(self.compute_dtype, jnp.float32))

    def logits(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Next-token logits of plain left-to-right texts, for use and for comparison with other implementations.

        Args:
          params: as from `init_params` or `load_hf`.
          tokens: int `[rows, length]`, no padding.
        Returns:
          `[rows, length, vocab]`, at least float32.
        Raises:
          InputError: if `length` exceeds the model's positions.
        """
        rows, length = tokens.shape
        if length > self.config.max_positions:
            raise InputError(
                f"tokens have length {length}; allowed: up to the model's {self.config.max_positions} positions; "
                f"shorten them"
            )
        positions = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
        one = jnp.ones_like(positions)
        states = self._hidden(params, tokens, positions, one, one)  # [rows, length, embed]
        dtype = jnp.dtype(self.compute_dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        head = self.head(params).astype(dtype)
        logits = jnp.einsum(
            "rle,ve->rlv", states, head, preferred_element_type=wide, precision=full_precision(dtype)
        )  # [rows, length, vocab]
        return constrain(logits, "batch", None, "vocab")

    def _hidden(
        self, params: dict[str, Any], tokens: Array, positions: Array, group: Array, candidate: Array
    ) -> jax.Array:
        """States after the final norm, `[rows, length, embed]`; the arguments are those fields of a batch."""
        form = ATTENTION[self.attention]
        prepared = form.prepare(positions, group, candidate, window=self.config.sliding_window)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return form.attend(q, k, v, prepared)

        return self._merge(params).hidden(
            tokens,
            positions,
            attend,
            dtype=jnp.dtype(self.compute_dtype),
            multiplied=self.multiplied_dtype,
            remat=self.remat,
        )

    def _merge(self, params: dict[str, Any]) -> Transformer:
        return nnx.merge(abstract_module(Transformer, self.config)[0], params)


def make_decoder(
    config: TransformerConfig, *, compute_dtype: str = "float32", attention: str = "dense", remat: str = "full"
) -> Decoder:
    """The static half of a model.

    Args:
      config: what it computes.
      compute_dtype: "float32", "bfloat16", or "float64" (needs jax's x64 mode).
      attention: the form that attention is computed in, a key of `models.forms.ATTENTION`.
      remat: what a layer keeps for the backward pass, a key of `models.remat.REMAT`.
    Raises:
      InputError: for another dtype, form or policy.
    """
    if attention not in ATTENTION:
        raise InputError(f"attention is {attention!r}; allowed: {', '.join(ATTENTION)}")
    if remat not in REMAT:
        raise InputError(f"remat is {remat!r}; allowed: {', '.join(REMAT)}")
    check_compute_dtype(compute_dtype)
    return Decoder(config, compute_dtype, attention, remat)


def logical_axes(decoder: Decoder) -> dict[str, Any]:
    """Nested dict shaped like the parameters: the tuple of logical axis names of each, see `sharding.AXIS_RULES`."""
    return abstract_module(Transformer, decoder.config)[1]


def abstract_params(decoder: Decoder, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """Shapes of the parameters, and where each lives on a mesh, without allocating any.

    Args:
      decoder: the model.
      mesh: from `sharding.make_mesh`; None for no placement.
    Returns:
      Nested dict of float32 `jax.ShapeDtypeStruct`, with `NamedSharding`s if a mesh is given.
    Raises:
      InputError: if the mesh does not divide a size; names sizes that do.
    """
    return abstract_arrays(Transformer, decoder.config, mesh)


def init_params(decoder: Decoder, key: jax.Array, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """Fresh parameters, float32, created where they live: no device ever holds more than its part.

    Args:
      decoder: the model.
      key: from `jax.random.key`.
      mesh: as in `abstract_params`.
    Returns:
      Nested dict of arrays.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(decoder, mesh))
    init = functools.partial(_init, decoder.config)
    return jax.jit(init, out_shardings=None if mesh is None else shardings)(key)


def _init(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    # Placement comes from jit's out_shardings; Flax would look the logical names up in a mesh that the caller has set.
    with nnx.use_eager_sharding(False), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))
