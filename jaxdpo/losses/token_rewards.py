r"""What a completion earned, token by token: its score at the last token, and at every token what leaving the reference
costs.

.. math:: r_t = -c \,(\log π(y_t) - \log π^{ref}(y_t)) + [t = T]\; s(x, y)

Summed over the tokens, that is the reward of which `jaxdpo.optimal_policy` with `beta = c` is the optimum. Arrays are
`[..., tokens]`, completions stand at the left, padding behind them:

>>> import jax.numpy as jnp
>>> real = jnp.array([[True, True, True], [True, False, False]])
>>> logps, ref_logps = jnp.zeros((2, 3)), jnp.array([[-1.0, 0.0, 1.0], [-2.0, 0.0, 0.0]])
>>> print(token_rewards(jnp.array([5.0, 7.0]), logps, ref_logps, kl_coef=0.5, where=real))
[[-0.5  0.   5.5]
 [ 6.   0.   0. ]]

The coefficient is fixed, or follows a target for the divergence (`next_kl_coef`).
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import explain, option, token_arrays

MAX_KL_ERROR = 0.2
"""By how much of itself the divergence counts as off its target at most, so that one step changes the coefficient
little."""


def token_rewards(
    scores: ArrayLike,
    logps: ArrayLike,
    ref_logps: ArrayLike,
    *,
    kl_coef: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Reward of every token: the score at the last real one, less the KL penalty of each.

    Args:
      scores: `[...]` float, of whole completions.
      logps: `[..., tokens]` float, log-probability of each sampled token under the policy that sampled, nats.
      ref_logps: same shape, under the reference.
      kl_coef: strength of the penalty, at least 0; may be traced.
      where: `[..., tokens]` bool, which tokens are real: true up to the last of a completion. The rest are 0.
    Returns:
      `[..., tokens]`, at least float32. A completion without tokens has no place for its score.
    Raises:
      InputError: (a ValueError) if shapes differ or `kl_coef` is out of range; the message states the value.
    References:
      Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, Eq. 2.
    """
    (policy, reference), real = token_arrays(where, logps=logps, ref_logps=ref_logps)
    kl_coef = option("kl_coef", kl_coef, "at least 0, such as 0.05", lambda c: 0 <= c < math.inf, policy.dtype)
    scores = jnp.asarray(scores, policy.dtype)
    with explain(
        f"scores have shape {scores.shape}, logps {policy.shape}; allowed: {policy.shape[:-1]}; pass one score for "
        "each completion"
    ):
        chex.assert_shape(scores, policy.shape[:-1])
    following = jnp.concatenate([real[..., 1:], jnp.zeros_like(real[..., :1])], axis=-1)
    return jnp.where(real & ~following, scores[..., None], 0) - kl_coef * (policy - reference)


def whiten(values: ArrayLike, *, shift_mean: bool = True, where: ArrayLike | None = None) -> jax.Array:
    """Numbers of tokens, scaled to variance 1 over all that are real.

    Args:
      values: `[..., tokens]` float.
      shift_mean: whether to shift them to mean 0 too; otherwise their mean stays what it is.
      where: `[..., tokens]` bool, which tokens are real. The rest are 0.
    Returns:
      `[..., tokens]`, at least float32; 0 where all are alike.
    Raises:
      InputError: (a ValueError) if shapes differ.
    Example:
      >>> print(whiten(jnp.array([1.0, 5.0])), whiten(jnp.array([1.0, 5.0]), shift_mean=False))
      [-1.  1.] [2. 4.]
    """
    (values,), real = token_arrays(where, values=values)
    count = jnp.maximum(real.sum(), 1)
    mean = values.sum() / count
    variance = jnp.where(real, (values - mean) ** 2, 0).sum() / count
    white = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(real, white if shift_mean else white + mean, 0)


def next_kl_coef(
    kl_coef: ArrayLike, kl: ArrayLike, *, target: ArrayLike, horizon: ArrayLike = 10000, completions: ArrayLike
) -> jax.Array:
    """The coefficient of the KL penalty after a step: raised where the policy is further away than wanted.

    Args:
      kl_coef: the one of the step.
      kl: the step's estimate of KL(policy || reference) of a completion, nats.
      target: what it should be, above 0.
      horizon: completions after which an error of `MAX_KL_ERROR` or more has changed the coefficient by its own size
        times that error, above 0.
      completions: of the step.
    Returns:
      A scalar, at least float32.
    Raises:
      InputError: (a ValueError) if `target` or `horizon` is out of range; the message states the value.
    References:
      Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, Sec. 2.2.
    Example:
      >>> print(next_kl_coef(0.1, kl=9.0, target=6.0, horizon=1000, completions=50))  # 0.1 * (1 + 0.2 * 50 / 1000)
      0.101
    """
    kl_coef = jnp.asarray(kl_coef)
    dtype = jnp.promote_types(kl_coef.dtype, jnp.float32)
    target = option("target", target, "above 0, such as 6", lambda t: 0 < t < math.inf, dtype)
    horizon = option("horizon", horizon, "above 0, such as 10000", lambda h: 0 < h < math.inf, dtype)
    error = jnp.clip(jnp.asarray(kl, dtype) / target - 1, -MAX_KL_ERROR, MAX_KL_ERROR)
    return kl_coef.astype(dtype) * (1 + error * jnp.asarray(completions, dtype) / horizon)
