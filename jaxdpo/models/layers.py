"""The parts of a Transformer block as Flax NNX modules; every parameter names its logical axes.

Parameters are float32 masters. A layer computes in the dtype of its input and casts its parameters at use; norms and
rotary angles are at least float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxdpo.models.attention import Attend
from jaxdpo.models.config import ModelConfig, Rope
from jaxdpo.models.matmul import linear, multiply_few
from jaxdpo.sharding import constrain, lengths_apart

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def make_param(config: ModelConfig, axes: tuple[str, ...], init: jax.nn.initializers.Initializer, rngs: nnx.Rngs):
    """A float32 parameter of logical axes `axes`, sized by `config.axis_sizes`."""
    shape = tuple(config.axis_sizes[axis] for axis in axes)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


class Norm(nnx.Module):
    """RMSNorm (scale only), or LayerNorm (scale and bias), over the embed axis."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.scale = make_param(config, ("embed",), jax.nn.initializers.ones, rngs)
        centred = config.norm == "layernorm"
        self.bias = make_param(config, ("embed",), jax.nn.initializers.zeros, rngs) if centred else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[rows, length, embed]` -> same shape and dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.bias is not None:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        wide = wide * self.scale[...][None, None]
        if self.bias is not None:
            wide = wide + self.bias[...][None, None]
        return wide.astype(x.dtype)


class Projection(nnx.Module):
    """A linear map from the last axes of its input to `outputs`, with or without bias."""

    def __init__(
        self,
        config: ModelConfig,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        self.contracted = len(inputs)
        self.transposed = False
        """Whether the kernel is `[*outputs, *inputs]`, see `decoding`."""
        self.kernel = make_param(config, inputs + outputs, jax.nn.initializers.normal(config.init_std), rngs)
        self.bias = make_param(config, outputs, jax.nn.initializers.zeros, rngs) if bias else None

    def __call__(self, x: jax.Array, multiplied: jnp.dtype) -> jax.Array:
        """`[rows, length, *inputs]` -> `[rows, length, *outputs]`, same dtype; products of numbers of `multiplied`."""
        kernel, contracted = self.kernel[...], self.contracted
        outputs = kernel.shape[:-contracted] if self.transposed else kernel.shape[contracted:]
        # Two-dimensional: XLA's CPU takes twice as long for the gradient of a product over rows and length. Devices
        # that share a row would have to gather it for that.
        tokens = x.shape[:2] if lengths_apart() > 1 else (x.shape[0] * x.shape[1],)
        flat = x.reshape(*tokens, -1)  # [..., inputs]
        if self.transposed:
            flat = multiply_few(flat, kernel.reshape(-1, flat.shape[-1]), multiplied).astype(x.dtype)
        else:
            flat = linear(flat, kernel.reshape(flat.shape[-1], -1), multiplied)
        x = flat.reshape(*x.shape[:2], *outputs)
        x = x if self.bias is None else x + self.bias[...].astype(x.dtype)[None, None]
        return checkpoint_name(x, "projection")


class Attention(nnx.Module):
    """Self-attention with grouped key/value heads and optional rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        project = functools.partial(Projection, config, bias=config.attention_bias, rngs=rngs)
        self.q = project(("embed",), ("heads", "head_dim"))
        self.k = project(("embed",), ("kv_heads", "head_dim"))
        self.v = project(("embed",), ("kv_heads", "head_dim"))
        self.o = project(("heads", "head_dim"), ("embed",))

    def __call__(self, x: jax.Array, attend: Attend, angles: jax.Array | None, multiplied: jnp.dtype) -> jax.Array:
        """`x` `[rows, length, embed]`, `angles` `[rows, length, head_dim / 2]` -> shape of `x`."""
        q, k, v = (
            project(x, multiplied) for project in (self.q, self.k, self.v)
        )  # [rows, length, heads or kv_heads, head_dim]
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q = constrain(q, "batch", "length", "heads", None)
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))  # of the whole row, for every query
        return self.o(attend(q, k, v), multiplied)  # [rows, length, embed]


class MLP(nnx.Module):
    """The feed-forward layer, gated (Shazeer 2020, https://arxiv.org/abs/2002.05202) or plain."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        project = functools.partial(Projection, config, bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation
        self.gate = project(("embed",), ("mlp",)) if config.gated_mlp else None
        self.up = project(("embed",), ("mlp",))
        self.down = project(("mlp",), ("embed",))

    def __call__(self, x: jax.Array, multiplied: jnp.dtype) -> jax.Array:
        """`[rows, length, embed]` -> same shape and dtype."""
        activation, wide = ACTIVATIONS[self.activation], self.up(x, multiplied)
        wide = activation(wide) if self.gate is None else activation(self.gate(x, multiplied)) * wide
        return self.down(constrain(wide, "batch", "length", "mlp"), multiplied)


class Block(nnx.Module):
    """Attention, then the feed-forward layer, each on a normed input and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, attend: Attend, angles: jax.Array | None, multiplied: jnp.dtype) -> jax.Array:
        """As `Attention`: `[rows, length, embed]` -> same shape and dtype."""
        x = x + self.attention(self.attention_norm(x), attend, angles, multiplied)
        return x + self.mlp(self.mlp_norm(x), multiplied)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of features, float64 `[head_dim / 2]`; see `Rope` for the kinds."""
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        periods = rope.original_positions * frequencies / (2 * np.pi)  # turns within the original context
        keep = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0, 1)  # 1: short wavelength, kept; 0: long, stretched
        return frequencies * (keep + (1 - keep) / rope.factor)
    return frequencies


def rope_angles(rope: Rope, head_dim: int, positions: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Angles `[rows, length, head_dim / 2]` in radians, at least float32: bfloat16 rounds position 257 to 256."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim), wide)
    return positions.astype(wide)[..., None] * frequencies[None, None]


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns feature i together with feature i + head_dim/2 by angle i, the pairing of Hugging Face checkpoints.

    Args:
      x: `[rows, length, heads, head_dim]`.
      angles: `[rows, length, head_dim / 2]` radians.
    Returns:
      `[rows, length, heads, head_dim]`, dtype of `x`.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]  # [rows, length, 1, head_dim / 2]
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
