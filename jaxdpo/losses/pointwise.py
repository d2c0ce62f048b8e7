r"""Losses that pin each reward, not only differences of rewards.

DPO is content when the rejected completion loses more probability than the chosen one, and often both lose. The losses
here also look at each implicit reward `r = beta * (log policy - log reference)` alone: against 0, its value at the
reference (NCA, BCO, APO), or against a fixed value (SPPO). So of two pairs with the same margin they can prefer the one
whose chosen completion gained:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses.pointwise import nca_loss
>>> from jaxdpo.losses.preference import dpo_loss
>>> ref_logps = jnp.array([[-40.0, -42.0], [-40.0, -42.0]])
>>> policy_logps = ref_logps + jnp.array([[10.0, -10.0], [-5.0, -25.0]])  # the second pair lost 15 nats on both sides
>>> print(dpo_loss(policy_logps, ref_logps, beta=0.1).round(4))
[0.1269 0.1269]
>>> print(nca_loss(policy_logps, ref_logps, beta=0.1).round(4))
[1.1265 1.2506]

NCA takes any number of candidates, best first, and rankings of different lengths by `where`; the others take pairs.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import best_candidate, candidate_arrays, check_pair, given_targets
from jaxdpo.losses._scores import candidate, candidate_scores, half_inverse, pair_logits, subtract
from jaxdpo.losses.divergences import reverse_kl
from jaxdpo.losses.preference import implicit_rewards


def _pair_rewards(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, beta: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Implicit rewards of chosen and of rejected `[...]`, and bool `[...]`: which pairs are complete."""
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    (rewards,), exists = candidate_arrays(where, 2, rewards=rewards)  # [..., 2]
    check_pair(rewards)
    return rewards[..., 0], rewards[..., 1], exists.all(axis=-1)


def nca_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    targets: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Noise contrastive alignment: tells each completion from a sample of the reference.

    .. math:: -\sum_k \Big(q_k \log σ(r_k) + \frac{1}{K} \log σ(-r_k)\Big), \quad r = β \log π / π^{ref}

    The second term pulls all rewards down and the first those of good completions up, so that the chosen
    log-probability does not fall as it may with DPO. By default `q` is 1 on the best candidate. For two candidates it
    is TRL's `nca_pair`; `2 log 2` where policy and reference agree.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced. The paper uses 0.01.
      targets: `[..., candidates]` float, the distribution `q` over each group instead of the default, such as
        `softmax(scores / temperature)` of a reward model's scores. None: the default.
      where: `[..., candidates]` bool, which candidates exist; `K` is how many. Groups of fewer than two return 0 and
        get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      Chen et al. 2024, https://arxiv.org/abs/2402.05369.
    Example:
      >>> logps = jnp.array([-12.0, -15.0, -11.0])
      >>> print(f"{nca_loss(logps, logps):.4f}")  # 2 log 2: the policy is its reference
      1.3863
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)  # [..., candidates]
    (rewards,), exists = candidate_arrays(where, 2, policy_logps=rewards)
    number = jnp.maximum(exists.sum(axis=-1, keepdims=True), 1).astype(rewards.dtype)  # [..., 1]
    q = best_candidate(exists).astype(rewards.dtype) if targets is None else given_targets(targets, where, rewards)
    losses = q * jax.nn.softplus(-rewards) + jax.nn.softplus(rewards) / number  # [..., candidates]
    return jnp.where(exists, losses, 0).sum(axis=-1)  # [...]


def bco_pair_loss(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    r"""Binary classifier optimization on pairs: chosen is good, rejected is bad, each on its own.

    .. math:: -\log σ(r_w) - \log σ(-r_l), \quad r = β \log π / π^{ref}

    It bounds the DPO loss from above. The paper subtracts a running mean of rewards from both, which TRL's pairs leave
    out, as here; unpaired `bco_loss` has it. `2 log 2` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced. The paper uses 0.01.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or `beta` is out of range.
    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    Example:
      >>> ref_logps = jnp.array([-12.0, -15.0])
      >>> print(f"{bco_pair_loss(ref_logps + jnp.array([20, -20]), ref_logps, beta=0.1):.4f}")  # -2 log sigmoid(2)
      0.2539
    """
    chosen, rejected, counts = _pair_rewards(policy_logps, ref_logps, beta, where)  # [...]
    return jnp.where(counts, jax.nn.softplus(-chosen) + jax.nn.softplus(rejected), 0)


def sppo_hard_loss(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    r"""Self-play preference optimization with hard labels: log-ratios of `1 / (2 beta)` and `-1 / (2 beta)`.

    .. math:: \Big(l_w - \frac{1}{2β}\Big)^2 + \Big(l_l + \frac{1}{2β}\Big)^2, \quad l = \log π / π^{ref}

    The paper's targets are `(P - 1/2) / beta`, where P is how often a completion wins against the policy's samples;
    hard labels set P to 1 and 0. `1 / (2 beta^2)` where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: one over twice the log-ratio that is asked for, above 0; may be traced. The paper uses 0.001.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in squared nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or `beta` is out of range.
    References:
      Wu et al. 2024, https://arxiv.org/abs/2405.00675, Eq. 4.7.
    Example:
      >>> ref_logps = jnp.array([-12.0, -15.0])
      >>> print(sppo_hard_loss(ref_logps + jnp.array([6, -5]), ref_logps, beta=0.1))  # (6 - 5)^2 + (-5 + 5)^2
      1.0
    """
    scores, exists = candidate_scores(policy_logps, ref_logps, reverse_kl, where)  # [..., 2]
    check_pair(scores.value)
    target = half_inverse(beta, scores.value.dtype)
    minus_target = jax.tree.map(jnp.negative, target)
    chosen, rejected = subtract(candidate(scores, 0), target), subtract(candidate(scores, 1), minus_target)  # [...]
    return jnp.where(exists.all(axis=-1), chosen**2 + rejected**2, 0)


def apo_zero_loss(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    r"""Anchored preference optimization, both ways: chosen up, rejected down.

    .. math:: σ(-r_w) + σ(r_l), \quad r = β \log π / π^{ref}

    For data whose chosen completions are better than what the policy writes. Bounded, so pairs far from the anchor 0 on
    either side have little gradient. 1 where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or `beta` is out of range.
    References:
      D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, Eq. 7.
    Example:
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(apo_zero_loss(logps, logps))
      1.0
    """
    chosen, rejected, counts = _pair_rewards(policy_logps, ref_logps, beta, where)  # [...]
    return jnp.where(counts, jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), 0)


def apo_down_loss(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    r"""Anchored preference optimization, downwards: chosen down, rejected further down.

    .. math:: σ(r_w) + σ(r_l - r_w), \quad r = β \log π / π^{ref}

    For data whose chosen completions are worse than what the policy writes. 1 where policy and reference agree.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or `beta` is out of range.
    References:
      D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, Eq. 8.
    Example:
      >>> logps = jnp.array([-12.0, -15.0])
      >>> print(apo_down_loss(logps, logps))
      1.0
    """
    chosen, _, counts = _pair_rewards(policy_logps, ref_logps, beta, where)  # [...]
    margin, _ = pair_logits(policy_logps, ref_logps, beta=beta, divergence=reverse_kl, where=where)  # [...]
    return jnp.where(counts, jax.nn.sigmoid(chosen) + jax.nn.sigmoid(-margin), 0)
