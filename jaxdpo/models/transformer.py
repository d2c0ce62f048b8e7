"""The decoder-only Transformer as a Flax NNX module: embedding, a scanned stack of blocks, a final norm, a head."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdpo.models.attention import Attend
from jaxdpo.models.config import TransformerConfig
from jaxdpo.models.layers import Block, Norm, make_param, rope_angles
from jaxdpo.models.remat import with_remat
from jaxdpo.sharding import constrain


class Transformer(nnx.Module):
    """Parameters `tokens`, `positions` if learned, `blocks` (first axis `layers`), `final_norm`, and those of the head.

    An LM head has `head`, or nothing where it is tied to `tokens`; a score head has `score`.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = jax.nn.initializers.normal(config.init_std)
        self.tokens = make_param(config, ("vocab", "embed"), normal, rngs)
        self.positions = None if config.rope else make_param(config, ("positions", "embed"), normal, rngs)
        stack = nnx.transform_metadata(lambda key: Block(config, rngs=key), in_axes=0, out_axes=0, partition="layers")
        self.blocks = jax.vmap(stack)(rngs.split(config.num_layers))
        self.final_norm = Norm(config, rngs=rngs)
        # A tied head reuses `tokens`: a second name for the same Param is refused by NNX's tree mode.
        untied = config.head == "lm" and not config.tie_embeddings
        self.head = make_param(config, ("vocab", "embed"), normal, rngs) if untied else None
        self.score = make_param(config, ("embed",), normal, rngs) if config.head == "score" else None

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        dtype: jnp.dtype,
        multiplied: jnp.dtype,
        remat: str,
    ) -> jax.Array:
        """States after the final norm.

        Args:
          tokens: int `[rows, length]`.
          positions: int `[rows, length]`, each below `max_positions`.
          attend: attention over these rows.
          dtype: of activations.
          multiplied: what the factors of matrix products are rounded to.
          remat: a key of `REMAT`.
        Returns:
          `[rows, length, embed]` in `dtype`.
        """
        x, angles = self.embed(tokens, positions, dtype)
        x = constrain(x, "batch", "length", None)

        def layer(x: jax.Array, block: Block) -> tuple[jax.Array, None]:
            return constrain(block(x, attend, angles, multiplied), "batch", "length", None), None

        x, _ = jax.lax.scan(with_remat(layer, remat), x, self.blocks)  # 30 layers compile as one
        return self.final_norm(x)

    def embed(self, tokens: jax.Array, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """What the first block reads of int `[rows, length]`: `[rows, length, embed]` in `dtype`, and rotary angles."""
        x = self.tokens[...][tokens].astype(dtype)  # [rows, length, embed]
        if self.positions is not None:
            x = x + self.positions[...][positions].astype(dtype)
        rope = self.config.rope
        angles = None if rope is None else rope_angles(rope, self.config.head_dim, positions, dtype)
        return x, angles

    def head_kernel(self) -> jax.Array:
        """The LM head `[vocab, embed]`, float32: the token embedding where tied."""
        if self.config.head != "lm":
            raise ValueError(f"the model has a {self.config.head} head; allowed: an LM head")
        return self.tokens[...] if self.head is None else self.head[...]

    def score_kernel(self) -> jax.Array:
        """The score head `[embed]`, float32."""
        if self.score is None:
            raise ValueError(f"the model has an {self.config.head} head; allowed: a score head")
        return self.score[...]
