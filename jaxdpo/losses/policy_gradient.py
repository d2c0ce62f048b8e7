r"""What Proximal Policy Optimization is made of: clipped losses, advantages, estimates of the KL divergence, entropy.

Everything is per token, with a trailing axis of time, `[..., tokens]`, and not reduced. `where` says which tokens are
real; completions stand at the left, padding behind them:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import generalized_advantages, ppo_policy_loss
>>> rewards = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # a judge's word at the last token
>>> real = jnp.array([[True, True, True], [True, False, False]])
>>> advantages, returns = generalized_advantages(rewards, jnp.full((2, 3), 0.5), gae_lambda=1.0, where=real)
>>> print(advantages)
[[0.5 0.5 0.5]
 [0.5 0.  0. ]]
>>> gains = jnp.log(jnp.array([[2.0, 2.0, 0.5], [2.0, 2.0, 2.0]]))  # ratios are 2, beyond 1 + 0.25, and 0.5
>>> print(ppo_policy_loss(gains, jnp.zeros((2, 3)), advantages, clip_range=0.25, where=real))
[[-0.625 -0.625 -0.25 ]
 [-0.625  0.     0.   ]]

The defaults are those of TRL's PPO, whose names are `cliprange`, `cliprange_value`, `gamma` and `lam`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import option, token_arrays

MAX_LOG_RATIO = 40.0
"""Probability ratios are clamped to e^40, the square of which still is a float32; a token at it has no gradient
through the ratio. Clipping at 1 ± 0.2 has long ended PPO's interest in it."""


def _clip_range(value: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    return option("clip_range", value, "above 0, such as 0.2", lambda c: 0 < c < math.inf, dtype)


def ppo_policy_loss(
    logps: ArrayLike,
    old_logps: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_range: ArrayLike = 0.2,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""PPO's clipped surrogate: follow the advantage, but no further than a ratio of `1 ± clip_range`.

    .. math:: -\min\big(ρ A, \mathrm{clip}(ρ, 1 - ε, 1 + ε) A\big), \quad ρ = π / π^{old}

    Args:
      logps: `[..., tokens]` float, log-probability of each sampled token under the policy, nats.
      old_logps: same shape, under the policy that sampled; without gradient.
      advantages: same shape, how much better than expected; without gradient. See `generalized_advantages`.
      clip_range: above 0, may be traced.
      where: `[..., tokens]` bool, which tokens are real. The rest return 0 and get zero gradient.
    Returns:
      `[..., tokens]` loss, at least float32, not reduced. Ratios are clamped to e^40, see `MAX_LOG_RATIO`.
    Raises:
      InputError: (a ValueError) if shapes differ or `clip_range` is out of range; the message states the value.
    References:
      Schulman et al. 2017, https://arxiv.org/abs/1707.06347, Eq. 7.
    Example:
      >>> print(ppo_policy_loss(jnp.log(jnp.array([2.0, 2.0])), jnp.zeros(2), jnp.array([1.0, -1.0])))  # one is clipped
      [-1.2  2. ]
    """
    (new, old, gain), real = token_arrays(where, logps=logps, old_logps=old_logps, advantages=advantages)
    clip_range = _clip_range(clip_range, new.dtype)
    old, gain = jax.lax.stop_gradient((old, gain))
    ratio = jnp.exp(jnp.minimum(new - old, MAX_LOG_RATIO))
    return jnp.where(real, -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip_range, 1 + clip_range) * gain), 0)


def ppo_value_loss(
    values: ArrayLike,
    old_values: ArrayLike,
    returns: ArrayLike,
    *,
    clip_range: ArrayLike = 0.2,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""PPO's clipped value loss: regress on the returns, without credit for moving further than `clip_range`.

    .. math:: \tfrac12 \max\big((V - R)^2, (V^{old} + \mathrm{clip}(V - V^{old}, -ε, ε) - R)^2\big)

    Args:
      values: `[..., tokens]` float, predicted return of each prefix.
      old_values: same shape, when the tokens were sampled; without gradient.
      returns: same shape, the targets; without gradient. See `generalized_advantages`.
      clip_range: above 0, in units of the values, may be traced.
      where: `[..., tokens]` bool, which tokens are real. The rest return 0 and get zero gradient.
    Returns:
      `[..., tokens]` loss, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ or `clip_range` is out of range; the message states the value.
    References:
      Schulman et al. 2016, https://arxiv.org/abs/1506.02438, Sec. 5 for the regression; its clipping is that of
      OpenAI's baselines, described in Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, Sec. 3.
    Example:
      >>> loss = ppo_value_loss(jnp.array([0.75]), jnp.array([0.0]), jnp.array([1.0]), clip_range=0.5)
      >>> print(loss)  # 0.5 ** 2 / 2, not 0.25 ** 2 / 2
      [0.125]
    """
    (new, old, target), _ = token_arrays(where, values=values, old_values=old_values, returns=returns)
    clip_range = _clip_range(clip_range, new.dtype)
    old, target = jax.lax.stop_gradient((old, target))
    clipped = old + jnp.clip(new - old, -clip_range, clip_range)
    return jnp.maximum((new - target) ** 2, (clipped - target) ** 2) / 2  # 0 where not real


def generalized_advantages(
    rewards: ArrayLike,
    values: ArrayLike,
    *,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Generalized advantage estimation: surprises in the value of a prefix, summed up with decay.

    .. math:: A_t = \sum_{k \ge 0} (γ λ)^k δ_{t+k}, \quad δ_t = r_t + γ V_{t+1} - V_t

    Args:
      rewards: `[..., tokens]` float, reward that each token earned.
      values: same shape, predicted return of the prefix that the token continues. After the last real token it is 0.
      discount: `γ` in [0, 1], may be traced.
      gae_lambda: `λ` in [0, 1], may be traced; 0 trusts the values, 1 the rewards.
      where: `[..., tokens]` bool, which tokens are real: true up to the last of a completion. The rest are 0.
    Returns:
      Advantages and returns (advantage plus value), both `[..., tokens]`, at least float32. Gradients are not stopped.
    Raises:
      InputError: (a ValueError) if shapes differ or an option is out of range; the message states the value.
    References:
      Schulman et al. 2016, https://arxiv.org/abs/1506.02438, Eq. 16.
    Example:
      >>> advantages, returns = generalized_advantages(jnp.array([0.0, 1.0]), jnp.array([0.25, 0.5]), gae_lambda=0.5)
      >>> print(advantages, returns)  # surprises are 0.25 and 0.5
      [0.5 0.5] [0.75 1.  ]
    """
    (rewards, values), real = token_arrays(where, rewards=rewards, values=values)
    discount = option("discount", discount, "0 to 1, such as 1", lambda d: 0 <= d <= 1, rewards.dtype)
    decay = option("gae_lambda", gae_lambda, "0 to 1, such as 0.95", lambda x: 0 <= x <= 1, rewards.dtype)
    following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    surprise = rewards + discount * following - values  # [..., tokens], 0 where not real

    def earlier(advantage: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        surprise, real = inputs  # [...]
        advantage = jnp.where(real, surprise + discount * decay * advantage, 0)
        return advantage, advantage

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (surprise, real))  # [tokens, ...]
    _, advantages = jax.lax.scan(earlier, jnp.zeros_like(surprise[..., 0]), by_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)  # [..., tokens]
    return advantages, advantages + values


def kl_k1(logps: ArrayLike, ref_logps: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Estimate of KL(policy || reference) from samples of the policy: the log-ratio. Unbiased; of either sign.

    Args:
      logps: `[..., tokens]` float, log-probability of each sampled token under the policy, nats.
      ref_logps: same shape, under the reference.
      where: `[..., tokens]` bool, which tokens are real. The rest return 0 and get zero gradient.
    Returns:
      `[..., tokens]` nats, at least float32.
    Raises:
      InputError: (a ValueError) if shapes differ.
    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html.
    Example:
      >>> print(kl_k1(jnp.array([-1.0]), jnp.array([-3.0])))
      [2.]
    """
    (policy, reference), _ = token_arrays(where, logps=logps, ref_logps=ref_logps)
    return policy - reference


def kl_k2(logps: ArrayLike, ref_logps: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """As `kl_k1`: half the squared log-ratio. Biased, little where the policies are close; never negative.

    Its gradient is an unbiased one of the divergence: `k1` times the gradient of the log-probability.

    Example:
      >>> print(kl_k2(jnp.array([-1.0]), jnp.array([-3.0])))
      [2.]
    """
    return kl_k1(logps, ref_logps, where=where) ** 2 / 2


def kl_k3(logps: ArrayLike, ref_logps: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """As `kl_k1`: `e^-k1 - 1 + k1`. Unbiased and never negative; the power is clamped to e^40 (`MAX_LOG_RATIO`).

    Example:
      >>> print(f"{kl_k3(jnp.array([-1.0]), jnp.array([-3.0])).item():.4f}")  # e**-2 - 1 + 2
      1.1353
    """
    log_ratio = kl_k1(logps, ref_logps, where=where)
    return jnp.expm1(jnp.minimum(-log_ratio, MAX_LOG_RATIO)) + log_ratio


KL_ESTIMATORS: dict[str, Callable[..., jax.Array]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""Estimators of the KL divergence by the names of TRL's `kl_estimator`."""


def entropy(logits: ArrayLike) -> jax.Array:
    """Entropy of a next-token distribution.

    Args:
      logits: `[..., vocab]` float; -inf bars a token, without gradient.
    Returns:
      `[...]` nats, at least float32; `log vocab` where all tokens are equally likely.
    References:
      Williams and Peng 1991, https://doi.org/10.1080/09540099108946587, for its use as a bonus.
    Example:
      >>> print(entropy(jnp.array([0.0, 0.0, -jnp.inf])).round(4))  # log 2
      0.6931
    """
    logits = jnp.asarray(logits)
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    logps = jax.nn.log_softmax(logits.astype(dtype))  # [..., vocab]
    possible = logps > -jnp.inf
    return -jnp.where(possible, jnp.exp(logps) * jnp.where(possible, logps, 0), 0).sum(axis=-1)
