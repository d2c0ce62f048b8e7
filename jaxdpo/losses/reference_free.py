r"""Preference losses without a reference policy: the policy's own log-probabilities are the reward.

Nothing holds the policy near its start but the loss's own shape. SimPO and AlphaPO compare means over tokens, so that
long answers are not punished for their length, and ask for a margin; CPO and ORPO add supervised fine-tuning on the
chosen answer. All take summed log-probabilities `[..., 2]`, chosen then rejected, and the number of tokens of each:

>>> import jax, jax.numpy as jnp
>>> from jaxdpo.losses import simpo_loss
>>> logps, lengths = jnp.array([[-30.0, -20.0], [-20.0, -20.0]]), jnp.array([[30, 10], [20, 20]])
>>> print(simpo_loss(logps, lengths=lengths, beta=2.0, simpo_gamma=1.0).round(2))  # per token: -1 and -2, -1 and -1
[0.31 1.31]

The margin that the losses ask for is a reward, so `simpo_gamma` is in nats times `beta`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, check_pair, option, smoothing_option
from jaxdpo.losses._scores import Wide, candidate, per_token, subtract
from jaxdpo.losses.likelihood import sft_loss
from jaxdpo.losses.preference import dpo_loss

MAX_POWER = 40.0
"""AlphaPO's powers are clamped to e^±40, the square of which still is a float32. With `alphapo_alpha=0.25` that is
reached at a mean log-probability of -160 per token; a uniform draw from 150 thousand tokens has -12."""
MAX_MEAN_LOGP = -1e-7
"""ORPO's odds are infinite at a mean log-probability of 0, so `log(1 - p)` is clamped to its value here, -16."""


def _pairs(
    policy_logps: ArrayLike, lengths: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probs, lengths of at least 1, and which candidates count, `[..., 2]` each."""
    (policy, tokens), exists = candidate_arrays(where, 2, policy_logps=policy_logps, lengths=lengths)
    check_pair(policy)
    return policy, jnp.maximum(tokens, 1), exists


def _difference(x: jax.Array) -> jax.Array:
    return x[..., 0] - x[..., 1]  # [...], chosen minus rejected


def _mean_difference(policy: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean log-prob per token of the chosen minus that of the rejected completion, `[...]`."""
    means = per_token(Wide(policy, jnp.zeros_like(policy)), tokens)
    return subtract(candidate(means, 0), candidate(means, 1))


def _logistic(logit: jax.Array, label_smoothing: ArrayLike, exists: jax.Array) -> jax.Array:
    """Cross-entropy of a preference, `[...]`, where the chosen completion wins with odds `e^logit`."""
    loss = jax.nn.softplus(-logit) + smoothing_option(label_smoothing, logit.dtype) * logit
    return jnp.where(exists.all(axis=-1), loss, 0)


def simpo_loss(
    policy_logps: ArrayLike,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    simpo_gamma: ArrayLike = 0.5,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""SimPO: Bradley-Terry on the mean log-probability per token, with a margin.

    .. math:: -\log σ\big(β (\log π_w / n_w - \log π_l / n_l) - γ\big)

    The margin is in nats times beta, as in TRL and the paper's equation; the paper tunes the ratio `γ / β`.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      lengths: same shape, number of tokens of each completion.
      beta: scale of the rewards, above 0, may be traced. The default is TRL's; the paper advises 2 to 2.5.
      simpo_gamma: by how much the chosen reward should exceed the rejected one, may be traced; the paper advises 0.3
        to 1.6.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Meng et al. 2024, https://arxiv.org/abs/2405.14734, Eq. 6.
    Example:
      >>> loss = simpo_loss(jnp.array([-30.0, -20.0]), lengths=jnp.array([30, 10]), beta=2.0, simpo_gamma=2.0)
      >>> print(f"{loss:.4f}")  # log 2: the margin is met, no more
      0.6931
    """
    policy, tokens, exists = _pairs(policy_logps, lengths, where)
    gamma = option("simpo_gamma", simpo_gamma, "any finite number, such as 0.5", math.isfinite, policy.dtype)
    return _logistic(
        beta_option(beta, policy.dtype) * _mean_difference(policy, tokens) - gamma, label_smoothing, exists
    )


def alphapo_loss(
    policy_logps: ArrayLike,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    simpo_gamma: ArrayLike = 0.5,
    alphapo_alpha: ArrayLike = 0.25,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""AlphaPO: SimPO with a reward that is bent, so that chosen answers lose less probability.

    .. math:: -\log σ(β (r_w - r_l) - γ), \quad r = (1 - p^{-α}) / α, \quad p = π^{1 / n}

    As `α` goes to 0 the reward goes to `log p` and the loss to `simpo_loss`. `p^{-α}` is clamped to e^±40, see
    `MAX_POWER`: beyond it a completion has no gradient. TRL calls the option `alpha`.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      lengths: same shape, number of tokens of each completion.
      beta: scale of the rewards, above 0, may be traced; as in `simpo_loss`.
      simpo_gamma: margin, may be traced; as in `simpo_loss`.
      alphapo_alpha: bend of the reward, any number, may be traced; the paper advises 0.1 to 0.25, and 0 is SimPO.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Gupta et al. 2025, https://arxiv.org/abs/2501.03884.
    Example:
      >>> loss = alphapo_loss(jnp.array([-1.0, 0.0]), lengths=jnp.ones(2), beta=1.0, simpo_gamma=0.0, alphapo_alpha=1.0)
      >>> print(jnp.log(jnp.expm1(loss)).round(4), jnp.e - 1)  # minus the rewards' difference, 1 - e and 1 - 1
      1.7183 1.718281828459045
    """
    policy, tokens, exists = _pairs(policy_logps, lengths, where)
    gamma = option("simpo_gamma", simpo_gamma, "any finite number, such as 0.5", math.isfinite, policy.dtype)
    alpha = option("alphapo_alpha", alphapo_alpha, "any finite number, such as 0.25", math.isfinite, policy.dtype)
    powers = jnp.clip(-alpha * policy / tokens, -MAX_POWER, MAX_POWER)  # [..., 2], log p^-α
    difference = _mean_difference(policy, tokens)  # [...]
    clamped = (jnp.abs(powers) == MAX_POWER).any(axis=-1)
    half_gap = jnp.where(clamped, -_difference(powers), alpha * difference) / 2
    # e^a - e^b = 2 e^((a + b) / 2) sinh((a - b) / 2) keeps its digits where a is near b, and so where alpha is near 0.
    bent = 2 * jnp.exp(powers.mean(axis=-1)) * jnp.sinh(half_gap) / jnp.where(alpha == 0, 1, alpha)
    rewards = beta_option(beta, policy.dtype) * jnp.where(alpha == 0, difference, bent)  # [...], chosen minus rejected
    return _logistic(rewards - gamma, label_smoothing, exists)


def cpo_loss(
    policy_logps: ArrayLike,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    cpo_alpha: ArrayLike = 1.0,
    mean_length: ArrayLike | None = None,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Contrastive Preference Optimization: reference-free DPO, and supervised fine-tuning on the chosen answer.

    .. math:: -\log σ\big(β (\log π_w - \log π_l)\big) - α \log π_w / \overline{n_w}

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      lengths: same shape, number of tokens of each completion.
      beta: scale of the rewards, above 0, may be traced.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced.
      cpo_alpha: weight of `sft_loss`, at least 0, may be traced.
      mean_length: mean number of tokens of the chosen completions of the step, see `sft_loss`.
      axis_name: axis over which the groups are split, see `sft_loss`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Xu et al. 2024, https://arxiv.org/abs/2401.08417, Eq. 3 for the first term.
    Example:
      >>> loss = cpo_loss(jnp.array([-6.0, -6.0]), lengths=jnp.array([3, 4]))
      >>> print(f"{loss:.4f}")  # log 2 + 6 / 3
      2.6931
    """
    policy, tokens, exists = _pairs(policy_logps, lengths, where)
    alpha = option("cpo_alpha", cpo_alpha, "0 or more, such as 1", lambda a: 0 <= a < math.inf, policy.dtype)
    preference = dpo_loss(policy, None, beta=beta, label_smoothing=label_smoothing, where=exists)
    likelihood = sft_loss(policy, lengths=tokens, mean_length=mean_length, axis_name=axis_name, where=exists)
    return preference + alpha * likelihood


def orpo_loss(
    policy_logps: ArrayLike,
    *,
    lengths: ArrayLike,
    beta: ArrayLike = 0.1,
    mean_length: ArrayLike | None = None,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""ORPO: supervised fine-tuning on the chosen answer, and the log odds ratio of chosen over rejected.

    .. math:: -\log π_w / \overline{n_w} - β \log σ\Big(\log \frac{p_w}{1 - p_w} - \log \frac{p_l}{1 - p_l}\Big),
        \quad p = π^{1 / n}

    `log(1 - p)` is clamped where the mean log-probability is above -1e-7, see `MAX_MEAN_LOGP`: at 0 the odds are
    infinite. TRL's trainer fine-tunes on the prompt's tokens too; here, as in `sft_loss`, only completions count.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      lengths: same shape, number of tokens of each completion.
      beta: weight of the odds ratio, above 0, may be traced; the paper's lambda.
      mean_length: mean number of tokens of the chosen completions of the step, see `sft_loss`.
      axis_name: axis over which the groups are split, see `sft_loss`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Hong et al. 2024, https://arxiv.org/abs/2403.07691, Eq. 6 and 7.
    Example:
      >>> loss = orpo_loss(jnp.array([-6.0, -8.0]), lengths=jnp.array([3, 4]), beta=1.0)
      >>> print(f"{loss:.4f}")  # 6 / 3 + log 2
      2.6931
    """
    policy, tokens, exists = _pairs(policy_logps, lengths, where)
    log_rest = jax.nn.log1mexp(-jnp.minimum(policy / tokens, MAX_MEAN_LOGP))  # [..., 2], log(1 - p)
    log_odds_ratio = _mean_difference(policy, tokens) - _difference(log_rest)  # [...]
    likelihood = sft_loss(policy, lengths=tokens, mean_length=mean_length, axis_name=axis_name, where=exists)
    return likelihood + beta_option(beta, policy.dtype) * _logistic(log_odds_ratio, 0.0, exists)
