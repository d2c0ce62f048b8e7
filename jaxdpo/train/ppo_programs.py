"""What PPO compiles: a policy with a value head on its own states, measured at every token, and its updates.

Policy and values share one body: a second model for the values would need as many parameters, gradients and moments
again, and a second pass over every completion. The head is one direction and an offset, and begins at 0 everywhere.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdpo.logprobs import slot_statistics
from jaxdpo.losses import ppo_policy_loss, ppo_value_loss
from jaxdpo.losses.policy_gradient import MAX_LOG_RATIO
from jaxdpo.models import Decoder
from jaxdpo.reference import LogpProgram, make_logp_program
from jaxdpo.sharding import constrain, named_sharding, place, replicated
from jaxdpo.train.state import KLPenalty, PPOState, init_state
from jaxdpo.types import Array, Batch

Scalars = Mapping[str, Any]
"""`cliprange`, `cliprange_value` and `vf_coef`; traced."""


class TokenOutputs(NamedTuple):
    """What a policy with a value head says of every scored token: `[rows, slots]` each, 0 in empty slots."""

    logps: jax.Array
    """Log-prob of the token, nats."""
    values: jax.Array
    """Predicted return of the prefix that the token continues."""
    entropy: jax.Array
    """Of the prediction, nats; without gradient."""


class PPOMicrobatch(NamedTuple):
    """What one forward and backward pass reads; the arrays are float32 `[rows, slots]`."""

    batch: Batch
    """Completions as groups of one candidate."""
    logps: Array
    """Under the policy that sampled, nats."""
    values: Array
    """Predicted returns, then."""
    advantages: Array
    returns: Array


class PPOPrograms(NamedTuple):
    """The compiled functions; `scalars` are traced, so sweeping them does not recompile."""

    measure: Callable[[dict, Batch], TokenOutputs]
    """`(params, batch) -> outputs`, of the policy with its value head."""
    reference: LogpProgram
    """`(params, batch)`: `make_logp_program`; the parameters are those of the decoder alone."""
    init: Callable[[dict], dict]
    """`(params) -> gradients` of zero, laid out like the parameters."""
    accumulate: Callable[[dict, dict, PPOMicrobatch, Array, Scalars], tuple[dict, dict[str, jax.Array]]]
    """`(params, grads, microbatch, tokens of the update, scalars) -> (grads, sums over tokens)`; donates `grads`."""
    apply: Callable[[PPOState, dict], tuple[PPOState, jax.Array]]
    """`(state, grads) -> (state, gradient norm)`; donates the state."""


def init_value_head(decoder: Decoder, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A head that says 0 of every prefix: `kernel`, `[embed]`, and `bias`, a scalar; float32."""
    kernel = np.zeros(decoder.config.embed_dim, np.float32)
    sharding = named_sharding(mesh, ("embed",), kernel.shape)
    return {"kernel": place(kernel, sharding), "bias": place(np.zeros((), np.float32), replicated(mesh))}


def init_ppo_state(
    decoder: Decoder, params: dict, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, kl_coef: float
) -> PPOState:
    """State before the first update.

    Args:
      decoder: the policy, with an LM head.
      params: its parameters, on the mesh; the first update donates them, so the reference needs a copy of its own.
      optimizer: any Optax transformation.
      mesh: where the rest goes.
      kl_coef: strength of the KL penalty in the first step.
    """
    both = {"policy": params, "value": init_value_head(decoder, mesh)}
    start = init_state(both, optimizer, mesh)
    penalty = KLPenalty(place(np.asarray(kl_coef, np.float32), replicated(mesh)))
    return PPOState(start.step, start.params, start.opt_state, penalty)


def measure_tokens(decoder: Decoder, params: dict, batch: Batch) -> TokenOutputs:
    """What the policy and its value head say of every scored token, in one forward pass.

    Args:
      decoder: the policy; static under jit.
      params: `policy` and `value`.
      batch: completions as groups of one candidate.
    """
    hidden = constrain(decoder.hidden(params["policy"], batch), "batch", None, None)  # [rows, length, embed]
    logps, statistics = slot_statistics(decoder, params["policy"], hidden, batch, ("entropy",))
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    kernel = constrain(params["value"]["kernel"], None).astype(wide)  # [embed], gathered over fsdp
    # A sum of products, as for rewards: accelerators would round a matrix product to bfloat16 or TF32.
    everywhere = (hidden.astype(wide) * kernel[None, None]).sum(axis=-1) + params["value"]["bias"]  # [rows, length]
    values = jnp.take_along_axis(everywhere, jnp.asarray(batch.slot_source), axis=1)  # [rows, slots]
    return TokenOutputs(logps, jnp.where(scored(batch), values, 0), statistics["entropy"])


def scored(batch: Batch) -> jax.Array:
    """bool `[rows, slots]`: which slots score a token."""
    groups, candidates = batch.candidate_mask.shape[1:]
    return jnp.asarray(batch.slot_owner) < groups * candidates


def make_ppo_programs(decoder: Decoder, optimizer: optax.GradientTransformation, shardings: PPOState) -> PPOPrograms:
    """Builds the programs of a policy and an optimizer.

    Args:
      decoder: the policy, with an LM head.
      optimizer: any Optax transformation.
      shardings: where each array of the state lives, `jax.tree.map(lambda x: x.sharding, state)`; it stays there.
    Returns:
      The programs, jitted; call them under `jax.set_mesh`.
    """

    def objective(params: dict, microbatch: PPOMicrobatch, tokens: Array, scalars: Scalars) -> tuple:
        outputs, real = measure_tokens(decoder, params, microbatch.batch), scored(microbatch.batch)
        clip, clip_value = scalars["cliprange"], scalars["cliprange_value"]
        of_policy = ppo_policy_loss(
            outputs.logps, microbatch.logps, microbatch.advantages, clip_range=clip, where=real
        )  # [rows, slots]
        of_values = ppo_value_loss(
            outputs.values, microbatch.values, microbatch.returns, clip_range=clip_value, where=real
        )
        loss = of_policy.sum() + scalars["vf_coef"] * of_values.sum()
        sums = {"loss/policy_avg": of_policy.sum(), "loss/value_avg": of_values.sum()}
        return loss / tokens, sums | _followed(jax.lax.stop_gradient(outputs), microbatch, real, scalars)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=(shardings.params, None))
    def accumulate(params: dict, grads: dict, microbatch: PPOMicrobatch, tokens: Array, scalars: Scalars) -> tuple:
        more, sums = jax.grad(objective, has_aux=True)(params, microbatch, tokens, scalars)
        return jax.tree.map(jnp.add, grads, more), sums

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def apply(state: PPOState, grads: dict) -> tuple[PPOState, jax.Array]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), optax.tree.norm(grads)

    def init(params: dict) -> dict:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, device=p.sharding), params)

    measure = jax.jit(functools.partial(measure_tokens, decoder))
    return PPOPrograms(measure, make_logp_program(decoder), init, accumulate, apply)


def _followed(outputs: TokenOutputs, microbatch: PPOMicrobatch, real: jax.Array, scalars: Scalars) -> dict:
    """Sums over tokens of how far policy and values have gone from those that sampled."""
    log_ratio = outputs.logps - microbatch.logps
    ratio = jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))
    clip, clip_value = scalars["cliprange"], scalars["cliprange_value"]
    clipped = microbatch.advantages * (ratio - jnp.clip(ratio, 1 - clip, 1 + clip)) > 0  # the loss is that of the clip
    limited = microbatch.values + jnp.clip(outputs.values - microbatch.values, -clip_value, clip_value)
    value_clipped = (limited - microbatch.returns) ** 2 > (outputs.values - microbatch.returns) ** 2
    of_tokens = {
        "policy/approxkl_avg": log_ratio**2 / 2,
        "policy/clipfrac_avg": clipped,
        "policy/entropy_avg": outputs.entropy,
        "val/clipfrac_avg": value_clipped,
        "val/ratio": ratio,
    }
    return {name: jnp.where(real, value, 0).sum() for name, value in of_tokens.items()}
