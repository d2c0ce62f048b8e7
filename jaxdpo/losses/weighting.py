r"""Two corrections that go with any loss on log-probabilities: where the data is off-policy, and where it is long.

Preference data was written by other models. `wpo_weights` says how much a pair looks like what the policy itself would
have written; multiply any loss by it. A completion that is longer than its rival has a tail that the rival lacks, and
its length alone moves the loss. `length_desensitized_logps` counts the tail less; give any loss its sums, of policy
and reference alike:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import length_desensitized_logps, wpo_weights
>>> token_logps = jnp.array([[-1.0, -2.0, -4.0, -4.0], [-3.0, -3.0, 0.0, 0.0]])  # 4 and 2 tokens
>>> print(length_desensitized_logps(token_logps, lengths=jnp.array([4, 2]), ld_alpha=0.5))
[-7. -6.]
>>> print(wpo_weights(jnp.array([-11.0, -6.0]), log_sum_sq_probs=jnp.array([-7.0, -6.0]), lengths=jnp.array([4, 2])))
0.36787945
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays, explain, option

MAX_LOG_WEIGHT = 40.0
"""WPO's weights are clamped to e^±40, the square of which still is a float32. A policy's own samples have log-weights
of at most 0 on average (Jensen's inequality), so 40 is far outside what a model and its data give."""


def wpo_weights(
    policy_logps: ArrayLike, *, log_sum_sq_probs: ArrayLike, lengths: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    r"""WPO: how likely the policy finds a group's completions, compared with what it would write itself.

    .. math:: \prod_{y} \exp\Big(\frac{1}{n} \sum_t \big(\log π(y_t) - \log \sum_v π(v)^2\big)\Big)

    The sum over the vocabulary is the probability that the policy gives its own sample, on average. The weight is a
    constant: no gradient goes through it. It is not clamped at 1, as in TRL 1.16, only to e^±40 (`MAX_LOG_WEIGHT`), so
    that it stays finite.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, nats.
      log_sum_sq_probs: same shape, summed over the tokens of each completion: log of the sum of squared probabilities
        over the vocabulary.
      lengths: same shape, number of tokens of each completion.
      where: `[..., candidates]` bool, which candidates exist; the rest are left out of the product.
    Returns:
      `[...]` weights above 0, at least float32; 1 for groups without a candidate. Multiply a loss by them.
    Raises:
      InputError: (a ValueError) if shapes differ.
    References:
      Zhou et al. 2024, https://arxiv.org/abs/2406.11827 (sampled alignment).
    Example:
      >>> print(wpo_weights(jnp.array([-4.0]), log_sum_sq_probs=jnp.array([-4.0]), lengths=jnp.array([2])))
      1.0
    """
    (policy, own, tokens), _ = candidate_arrays(
        where, 1, policy_logps=policy_logps, log_sum_sq_probs=log_sum_sq_probs, lengths=lengths
    )
    log_weight = ((policy - own) / jnp.maximum(tokens, 1)).sum(axis=-1)  # [...], absent candidates are 0 - 0
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(log_weight, -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT)))


def length_desensitized_logps(
    token_logps: ArrayLike, *, lengths: ArrayLike, ld_alpha: ArrayLike = 0.5, where: ArrayLike | None = None
) -> jax.Array:
    """LD-DPO: log-probabilities of completions in which tokens behind the shortest one's length count less.

    Use it for policy and reference, then any loss. A loss that divides by lengths still divides by the full ones, as
    IPO does in TRL.

    Args:
      token_logps: `[..., candidates, tokens]` float, log-probability of each token, nats; anything behind the last.
      lengths: `[..., candidates]` number of tokens of each completion.
      ld_alpha: what tokens of the tail count, in [0, 1], may be traced; 1 is the plain sum.
      where: `[..., candidates]` bool, which candidates exist. The rest return 0, get zero gradient, and shorten
        nothing.
    Returns:
      `[..., candidates]` nats, at least float32.
    Raises:
      InputError: (a ValueError) if shapes do not fit or `ld_alpha` is out of range; the message states the value.
    References:
      Liu et al. 2024, https://arxiv.org/abs/2409.06411.
    Example:
      >>> token_logps = jnp.array([[-1.0, -2.0], [-3.0, 0.0]])
      >>> print(length_desensitized_logps(token_logps, lengths=jnp.array([2, 1]), ld_alpha=0.0))
      [-1. -3.]
    """
    token_logps = jnp.asarray(token_logps)
    (number,), exists = candidate_arrays(where, 1, lengths=lengths)
    with explain(
        f"token_logps has shape {token_logps.shape}, lengths {number.shape}; allowed: [..., candidates, tokens] and "
        "[..., candidates]"
    ):
        chex.assert_shape(token_logps, (*number.shape, ...))
        chex.assert_rank(token_logps, number.ndim + 1)
    dtype = jnp.float64 if token_logps.dtype == jnp.float64 else jnp.float32
    ld_alpha = option("ld_alpha", ld_alpha, "0 to 1, such as 0.5", lambda a: 0 <= a <= 1, dtype)
    place = jnp.arange(token_logps.shape[-1], dtype=number.dtype)  # [tokens]
    place = jnp.broadcast_to(place, token_logps.shape)  # [..., candidates, tokens]
    shared = jnp.where(exists, number, jnp.inf).min(axis=-1, keepdims=True)[..., None]  # [..., 1, 1]
    weight = jnp.where(place < shared, jnp.ones((), dtype), ld_alpha)
    real = exists[..., None] & (place < number[..., None])
    return (weight * jnp.where(real, token_logps.astype(dtype), 0)).sum(axis=-1)
