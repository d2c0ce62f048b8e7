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

The other losses here replace the likelihood by something else that falls with the margin
`m = beta * (s_chosen - s_rejected)`, where `s` is the score of a log-ratio: itself, or under another penalty than the
reverse KL divergence what `jaxdpo.losses.divergences` offers. Losses that divide by lengths are in
`jaxdpo.losses.length_normalized`, losses that pin each reward in `jaxdpo.losses.pointwise`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, option, smoothing_option
from jaxdpo.losses._scores import pair_logits
from jaxdpo.losses.divergences import MAX_EXPONENT, reverse_kl


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
    return beta_option(beta, policy.dtype) * log_ratio


def dpo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Direct Preference Optimization: Bradley-Terry on the implicit rewards of a chosen and a rejected completion.

    .. math:: -(1-ε) \log σ(m) - ε \log σ(-m), \quad m = β (s_w - s_l)

    with `s` the log-ratio `log policy - log reference` and no smoothing by default. `log 2` where policy and reference
    agree. For more than two ranked candidates use `plackett_luce_dpo_loss`. TRL 1.x ignores the smoothing here.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO), may be traced. Above 0 the
        loss is least at a finite difference of rewards.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7; label smoothing: Mitchell 2023,
      https://ericmitchell.ai/cdpo.pdf, Eq. 3; divergences: Wang et al. 2023, https://arxiv.org/abs/2309.16240.
    Example:
      >>> import jax.numpy as jnp
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(f"{dpo_loss(logps, logps):.4f}")  # log 2: the policy is its reference
      0.6931
      >>> print(f"{dpo_loss(logps, None, beta=0.1):.4f}")  # -log sigmoid(0.1 * 3)
      0.5544
    """
    logit, counts = pair_logits(policy_logps, ref_logps, beta=beta, divergence=divergence, where=where)  # [...]
    # log σ(-m) = log σ(m) - m turns the cross-entropy into one soft-plus and a line: finite at any finite margin.
    loss = jax.nn.softplus(-logit) + smoothing_option(label_smoothing, logit.dtype) * logit
    return jnp.where(counts, loss, 0)


def hinge_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""SLiC and RSO: a support vector machine on the implicit rewards, `max(0, 1 - m)`.

    Pairs whose margin is 1 or more have no loss and no gradient, so they are not pushed apart any further.
    Reference-free it is SLiC's calibration loss with its margin scaled to 1. The loss is 1 where policy and reference
    agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: one over the log-ratio margin that is asked for, above 0; may be traced. RSO advises 0.05.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425; Liu et al. 2023 (RSO),
      https://arxiv.org/abs/2309.06657.
    Example:
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(f"{hinge_loss(logps, None, beta=0.1):.4f}")  # 1 - 0.1 * 3
      0.7000
    """
    logit, counts = pair_logits(policy_logps, ref_logps, beta=beta, divergence=divergence, where=where)  # [...]
    return jnp.where(counts, jax.nn.relu(1 - logit), 0)


def robust_dpo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.1,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""DPO that labels flipped at a known rate do not bias.

    .. math:: \frac{-(1-ε) \log σ(m) + ε \log σ(-m)}{1 - 2ε}

    Its expectation over flips of probability `ε` is the DPO loss on the true labels; the price is variance, and that
    the loss is not bounded from below: well-separated pairs earn `-m ε / (1 - 2ε)`. `label_smoothing` of `dpo_loss` is
    biased and bounded. `log 2` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      label_smoothing: the probability in [0, 0.5) that a label was flipped, may be traced. At 0 it is `dpo_loss`.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409.
    Example:
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(f"{robust_dpo_loss(logps, None, label_smoothing=0.25):.4f}")  # -log sigmoid(0.3) - 0.3 / 2
      0.4044
    """
    logit, counts = pair_logits(policy_logps, ref_logps, beta=beta, divergence=divergence, where=where)  # [...]
    flipped = smoothing_option(label_smoothing, logit.dtype)
    # As in `dpo_loss`; with log σ(-m) = log σ(m) - m the division cancels but for the line.
    return jnp.where(counts, jax.nn.softplus(-logit) - flipped / (1 - 2 * flipped) * logit, 0)


def discopop_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    discopop_tau: ArrayLike = 0.05,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""DiscoPOP, the log-ratio modulated loss that a language model discovered.

    .. math:: -\log σ(m) \, (1 - σ(m / τ)) + e^{-m} \, σ(m / τ)

    Logistic where the order is wrong, exponential where it is right, and not convex between: at `τ = 0.05` it has a
    local minimum at a margin of -0.12. The exponential part is one exponent, since `e^-m` alone overflows (in TRL it
    does); for `τ` above 1 that exponent grows with `-m`, and it is clamped at 80. `(log 2 + 1) / 2` where policy and
    reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: scale of the margin, above 0; may be traced. The paper uses 0.05.
      discopop_tau: temperature of the blend, above 0; may be traced.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Lu et al. 2024, https://arxiv.org/abs/2406.08414, Eq. 5.
    Example:
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(f"{discopop_loss(logps, logps):.4f}")  # (log 2 + 1) / 2
      0.8466
    """
    logit, counts = pair_logits(policy_logps, ref_logps, beta=beta, divergence=divergence, where=where)  # [...]
    tau = option("discopop_tau", discopop_tau, "above 0, such as 0.05", lambda t: 0 < t < math.inf, logit.dtype)
    logistic = jax.nn.softplus(-logit) * jax.nn.sigmoid(-logit / tau)
    exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(logit / tau) - logit, MAX_EXPONENT))
    return jnp.where(counts, logistic + exponential, 0)
