"""DPO: a language model is its own reward model, so preferences train it by plain maximum likelihood.

A policy that is optimal for a reward under a KL penalty of strength `beta` reveals that reward up to a constant of the
prompt: `r = beta * (log policy - log reference)`. The constant is the same for all answers to one prompt, so it
cancels in Bradley-Terry, and the preference likelihood becomes a function of log-probabilities alone.

Inputs are summed log-probabilities of whole completions, in nats, with a trailing axis of candidates, best first:
`[..., candidates]`, in a jaxdpo batch `[rows, groups, candidates]`. Losses come back per group, not reduced:

>>> import jax, jax.numpy as jnp
>>> from jaxdpo.losses import dpo_loss, implicit_rewards
>>> ref_logps = jnp.array([[-40.0, -42.0], [-31.0, -20.0]])  # two prompts, each with a chosen and a rejected answer
>>> policy_logps = ref_logps + jnp.array([[10.0, -10.0], [0.0, 0.0]])  # the first prompt has been learnt
>>> print(implicit_rewards(policy_logps, ref_logps, beta=0.1))
[[ 1. -1.]
 [ 0.  0.]]
>>> print(dpo_loss(policy_logps, ref_logps, beta=0.1).round(4))
[0.1269 0.6931]

The gradient raises the chosen and lowers the rejected log-probability, more where the implicit rewards are wrong:

>>> print(jax.grad(lambda logps: dpo_loss(logps, ref_logps, beta=0.1).sum())(policy_logps).round(4))
[[-0.0119  0.0119]
 [-0.05    0.05  ]]
"""

import math

import jax
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays, option
from jaxdpo.losses.reward import bradley_terry_loss


def implicit_rewards(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    """The reward for which the policy is optimal, up to a constant of the prompt: `beta * (policy - reference)`.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion under the policy, nats.
      ref_logps: same shape, under the reference policy. None: reference-free, a reference that finds every completion
        equally likely. It is an argument without default, so that no reference is left out by accident.
      beta: strength of the KL penalty, above 0; may be traced, so a sweep compiles once.
      where: `[..., candidates]` bool, which candidates exist. The rest return 0 and get zero gradient.
    Returns:
      `[..., candidates]` rewards in nats times beta, at least float32.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 5 without its partition function.
    Example:
      >>> import jax.numpy as jnp
      >>> print(implicit_rewards(jnp.array([-3.0, -5.0]), jnp.array([-4.0, -4.0]), beta=0.5))
      [ 0.5 -0.5]
      >>> print(implicit_rewards(jnp.array([-3.0, -5.0]), None, beta=0.5))
      [-1.5 -2.5]
    """
    arrays = {"policy_logps": policy_logps} | ({} if ref_logps is None else {"ref_logps": ref_logps})
    (policy, *reference), _ = candidate_arrays(where, 1, **arrays)
    log_ratio = policy - reference[0] if reference else policy  # [..., candidates]
    return option("beta", beta, "above 0, such as 0.1", lambda b: 0 < b < math.inf, policy.dtype) * log_ratio


def dpo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Direct Preference Optimization: Bradley-Terry on the implicit rewards of a chosen and a rejected completion.

    .. math:: -\log σ\big(β (\log π_w - \log π^{ref}_w) - β (\log π_l - \log π^{ref}_l)\big)

    `log 2` where policy and reference agree. For more than two ranked candidates use `plackett_luce_dpo_loss`.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO), may be traced. Above 0 the
        loss is least at a finite difference of rewards.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7; label smoothing: Mitchell 2023,
      https://ericmitchell.ai/cdpo.pdf, Eq. 3.
    Example:
      >>> import jax.numpy as jnp
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(f"{dpo_loss(logps, logps):.4f}")  # log 2: the policy is its reference
      0.6931
      >>> print(f"{dpo_loss(logps, None, beta=0.1):.4f}")  # -log sigmoid(0.1 * 3)
      0.5544
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)  # [..., 2]
    return bradley_terry_loss(rewards, label_smoothing=label_smoothing, where=where)  # [...]
