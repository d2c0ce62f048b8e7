"""Bradley-Terry: the likelihood that the better of two rewarded answers was preferred.

The model says `P(chosen beats rejected) = sigmoid(r_chosen - r_rejected)`, so only the difference of rewards matters.
It trains reward models directly, and DPO is the same loss on implicit rewards (`jaxdpo.losses.preference`). Rewards
have a trailing axis of two candidates, best first; the loss comes back per group, not reduced:

>>> import jax, jax.numpy as jnp
>>> from jaxdpo.losses import bradley_terry_loss
>>> rewards = jnp.array([[2.0, 0.0], [0.0, 2.0], [7.0, 7.0]])  # right, wrong, undecided
>>> print(bradley_terry_loss(rewards).round(4))
[0.1269 2.1269 0.6931]

Candidates that `where` marks as absent may hold anything; a pair that is not complete has no loss and no gradient:

>>> rewards, exists = jnp.array([[2.0, 0.0], [1.0, jnp.nan]]), jnp.array([[True, True], [True, False]])
>>> print(jax.grad(lambda r: bradley_terry_loss(r, where=exists).sum())(rewards).round(4))
[[-0.1192  0.1192]
 [ 0.      0.    ]]
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays, check_pair, explain, option, smoothing_option


def bradley_terry_loss(
    rewards: ArrayLike,
    *,
    margin: ArrayLike | None = None,
    center_rewards_coefficient: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Negative log-likelihood of the observed preference under Bradley-Terry.

    With `m = r_chosen - r_rejected - margin`, a label that is flipped with probability `ε` costs

    .. math:: -(1-ε) \log σ(m) - ε \log σ(-m) + c \cdot (r_{chosen} + r_{rejected})^2

    For more than two ranked candidates use `plackett_luce_loss`, which equals this loss for two.

    Args:
      rewards: `[..., 2]` float, chosen then rejected.
      margin: `[...]` float, by how much the chosen reward should exceed the rejected one; None: 0.
      center_rewards_coefficient: `c`, weight of the squared sum, which pulls the rewards towards mean 0; at least 0,
        may be traced.
      label_smoothing: probability in [0, 0.5) that a label is flipped, may be traced. Above 0 the loss is least at a
        finite `m`.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if there are not two candidates, shapes differ, or an option is out of range.
    References:
      Bradley and Terry 1952, https://doi.org/10.2307/2334029; margin: Touvron et al. 2023,
      https://arxiv.org/abs/2307.09288, Eq. 2; centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244.
    Example:
      >>> print(f"{bradley_terry_loss(jnp.array([5.0, 5.0])):.4f}")  # log 2: no preference yet
      0.6931
      >>> loss = bradley_terry_loss(jnp.array([3.0, 1.0]), margin=2.0, center_rewards_coefficient=0.01)
      >>> print(f"{loss:.4f}")  # log 2 + 0.01 * (3 + 1)**2
      0.8531
    """
    (rewards,), exists = candidate_arrays(where, 2, rewards=rewards)
    check_pair(rewards)
    centering = option(
        "center_rewards_coefficient",
        center_rewards_coefficient,
        "0 or more, such as 0.01",
        lambda c: 0 <= c < math.inf,
        rewards.dtype,
    )
    label_smoothing = smoothing_option(label_smoothing, rewards.dtype)
    counts = exists.all(axis=-1)  # [...]
    logit = rewards[..., 0] - rewards[..., 1]  # [...]
    if margin is not None:
        margin = jnp.asarray(margin, rewards.dtype)
        with explain(
            f"margin has shape {margin.shape}, rewards {rewards.shape}; allowed: {logit.shape}; pass one per pair"
        ):
            chex.assert_equal_shape([margin, logit])
        logit -= jnp.where(counts, margin, 0)
    # log σ(-m) = log σ(m) - m turns the cross-entropy into one log-sigmoid and a line: finite at any finite logit.
    loss = -jax.nn.log_sigmoid(logit) + label_smoothing * logit + centering * rewards.sum(axis=-1) ** 2
    return jnp.where(counts, loss, 0)
