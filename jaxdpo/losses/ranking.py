"""Plackett-Luce: the likelihood of a whole ranking, for any number of candidates.

The model ranks by drawing the best candidate in proportion to `exp(reward)`, then the best of the rest, and so on.
Each draw is a Bradley-Terry duel: the candidate that was drawn against the soft maximum (log-sum-exp) of all those
ranked below it. With two candidates there is one duel, and Plackett-Luce is Bradley-Terry.

Candidates stand best first on the trailing axis. Rankings of different lengths share one array; `where` says which
candidates exist, and the others are as good as not there:

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import plackett_luce_loss
>>> rewards = jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, jnp.nan]])
>>> exists = jnp.array([[True, True, True], [True, True, False]])
>>> print(plackett_luce_loss(rewards, where=exists).round(2))  # log 3!, -log sigmoid(2)
[1.79 0.13]
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import candidate_arrays
from jaxdpo.losses.preference import implicit_rewards


def plackett_luce_loss(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Negative log-likelihood of the observed ranking under Plackett-Luce.

    .. math:: -\log \prod_k \frac{e^{r_k}}{\sum_{j \ge k} e^{r_j}} = -\sum_k \log σ(r_k - \log \sum_{j > k} e^{r_j})

    A sum, not a mean, over the duels of a ranking, so it is a log-probability: over all orders of the same candidates
    the probabilities sum to 1, and longer rankings weigh more.

    Args:
      rewards: `[..., candidates]` float, best first.
      where: `[..., candidates]` bool, which candidates exist; those that do not may stand anywhere. Groups of fewer
        than two return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ.
    References:
      Plackett 1975, https://doi.org/10.2307/2346567; Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 18.
    Example:
      >>> print(f"{plackett_luce_loss(jnp.zeros(4)):.4f}")  # log 4!: all orders are equally likely
      3.1781
    """
    (rewards,), exists = candidate_arrays(where, 2, rewards=rewards)
    gap = rewards[..., None, :] - rewards[..., None]  # [..., k, j], r_j - r_k
    below = jnp.triu(exists[..., None, :] & exists[..., None], k=1)  # [..., k, j], both exist and j is ranked below k
    # All pairs of a few candidates, not one cumulative log-sum-exp of rewards: for three tied at 1e4 in float32 that is
    # off by 1e-4, this by 1e-7.
    soft_max = jax.nn.logsumexp(gap, axis=-1, where=below)  # [..., k], -inf where no candidate is below
    return jax.nn.softplus(soft_max).sum(axis=-1)  # [...], softplus(x) = -log σ(-x), which is 0 at -inf


def plackett_luce_dpo_loss(
    policy_logps: ArrayLike, ref_logps: ArrayLike | None, *, beta: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    """DPO for rankings: Plackett-Luce on the implicit rewards. Equals `dpo_loss` for two candidates.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced; `log K!` for K candidates where policy and reference agree.
    Raises:
      InputError: (a ValueError) if shapes differ or `beta` is out of range; the message states the value.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Appendix A.3, Eq. 20.
    Example:
      >>> logps = jnp.array([-12.0, -15.0, -11.0])
      >>> print(f"{plackett_luce_dpo_loss(logps, logps):.4f}")  # log 3!: the policy is its reference
      1.7918
    """
    return plackett_luce_loss(implicit_rewards(policy_logps, ref_logps, beta=beta, where=where), where=where)
