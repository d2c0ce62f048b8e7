r"""The theory behind DPO over finite sets of responses, where everything can be computed.

A policy that maximises reward under a KL penalty is the reference tilted by the reward,
`log pi*(y) = log ref(y) + r(y) / beta - log Z`. Read backwards, a policy is the optimum of a reward,
`r = beta * (log pi - log ref) + beta * log Z`, and all rewards that differ by a function of the prompt alone share it:

>>> import jax.numpy as jnp
>>> from jaxdpo.theory import log_partition_function, optimal_policy, project_reward, reward_of_policy
>>> rewards, ref_logps = jnp.log(jnp.array([2.0, 1.0])), jnp.log(jnp.array([0.5, 0.5]))
>>> policy_logps = optimal_policy(ref_logps, rewards, beta=1.0)
>>> print(jnp.exp(policy_logps).round(4))
[0.6667 0.3333]
>>> print(jnp.exp(log_partition_function(ref_logps, rewards, beta=1.0)))  # (2 + 1) / 2
1.5

Each such class of rewards has one member whose partition function is 1, the one that DPO fits:

>>> print((project_reward(rewards, ref_logps, beta=1.0) - rewards).round(4))  # -log 1.5
[-0.4055 -0.4055]
>>> print(reward_of_policy(policy_logps, ref_logps, beta=1.0).round(4))  # the same, from the policy
[ 0.2877 -0.4055]

Arrays are `[..., responses]`, policies log-probabilities in nats. `where` says which responses exist; the others are as
good as not there. Equations are numbered as in Rafailov et al. 2023, https://arxiv.org/abs/2305.18290. Every function
raises InputError (a ValueError) if shapes differ or an option is out of range. For preferences that no reward explains
there is `von_neumann_winner`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, check_pair, explain
from jaxdpo.losses.preference import implicit_rewards
from jaxdpo.types import InputError


def log_partition_function(
    ref_logps: ArrayLike, rewards: ArrayLike, *, beta: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """`log Z = log sum_y ref(y) exp(r(y) / beta)`, which makes the optimal policy sum to 1 (Sec. 4).

    Args:
      ref_logps: `[..., responses]` float, log-probabilities under the reference policy, nats; -inf for impossible.
      rewards: same shape.
      beta: strength of the KL penalty, above 0; may be traced.
      where: `[..., responses]` bool, which responses exist. Sets of none return 0.
    Returns:
      `[...]` nats, at least float32.
    """
    (ref, rewards), exists = candidate_arrays(where, 1, ref_logps=ref_logps, rewards=rewards)
    log_z = jax.nn.logsumexp(ref + rewards / beta_option(beta, ref.dtype), axis=-1, where=exists)  # [...]
    return jnp.where(exists.any(axis=-1), log_z, 0)


def optimal_policy(
    ref_logps: ArrayLike, rewards: ArrayLike, *, beta: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """The policy that maximises `kl_constrained_objective`: `log ref + r / beta - log Z` (Eq. 4).

    Args:
      ref_logps, rewards, beta, where: as in `log_partition_function`.
    Returns:
      `[..., responses]` log-probabilities in nats, at least float32; -inf for responses that do not exist.
    """
    log_z = log_partition_function(ref_logps, rewards, beta=beta, where=where)
    (ref, rewards), exists = candidate_arrays(where, 1, ref_logps=ref_logps, rewards=rewards)
    return jnp.where(exists, ref + rewards / beta_option(beta, ref.dtype) - log_z[..., None], -jnp.inf)


def reward_of_policy(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike,
    *,
    beta: ArrayLike,
    log_partition: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The reward for which a policy is optimal and that has a given partition function (Eq. 5).

    Args:
      policy_logps: `[..., responses]` float, log-probabilities in nats, finite.
      ref_logps: same shape, under the reference policy.
      beta: strength of the KL penalty, above 0; may be traced.
      log_partition: `[...]` nats or a scalar. At 0 the reward is `implicit_rewards`, which `project_reward` keeps.
      where: `[..., responses]` bool, which responses exist. The rest return 0.
    Returns:
      `[..., responses]` rewards, at least float32.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    _, exists = candidate_arrays(where, 1, policy_logps=policy_logps)
    log_z = jnp.asarray(log_partition, rewards.dtype)
    with explain(f"log_partition has shape {log_z.shape}; allowed: () or {rewards.shape[:-1]}; pass one per prompt"):
        chex.assert_shape(log_z, rewards.shape[:-1] if log_z.ndim else ())
    log_z = jnp.broadcast_to(log_z, rewards.shape[:-1])
    return jnp.where(exists, rewards + beta_option(beta, rewards.dtype) * log_z[..., None], 0)


def project_reward(
    rewards: ArrayLike, ref_logps: ArrayLike, *, beta: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """`f(r; ref, beta) = r - beta * log Z`: of all rewards equivalent to `r` the one of partition function 1 (Eq. 8).

    Args:
      rewards, ref_logps, beta, where: as in `log_partition_function`.
    Returns:
      `[..., responses]` rewards, at least float32; 0 for responses that do not exist.
    """
    log_z = log_partition_function(ref_logps, rewards, beta=beta, where=where)
    (rewards,), exists = candidate_arrays(where, 1, rewards=rewards)
    return jnp.where(exists, rewards - beta_option(beta, log_z.dtype) * log_z[..., None], 0)


def equivalent_rewards(
    first: ArrayLike, second: ArrayLike, *, atol: float = 1e-5, where: ArrayLike | None = None
) -> jax.Array:
    """Whether two rewards differ by a function of the prompt alone, which preferences cannot tell (Definition 1).

    Args:
      first, second: `[..., responses]` float, of one shape.
      atol: by how much any difference may be off the middle of all.
      where: `[..., responses]` bool, which responses exist.
    Returns:
      `[...]` bool.
    """
    (first, second), exists = candidate_arrays(where, 1, first=first, second=second)
    gap = first - second  # [..., responses]
    spread = gap.max(axis=-1, where=exists, initial=-jnp.inf) - gap.min(axis=-1, where=exists, initial=jnp.inf)
    return spread <= 2 * atol  # [...], -inf where no response exists


def kl_constrained_objective(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike,
    rewards: ArrayLike,
    *,
    beta: ArrayLike,
    where: ArrayLike | None = None,
) -> jax.Array:
    """`E_policy[r] - beta * KL(policy || ref)`, what reinforcement learning from preferences maximises (Eq. 3).

    Args:
      policy_logps: `[..., responses]` float, log-probabilities in nats; -inf for impossible.
      ref_logps, rewards, beta, where: as in `log_partition_function`; finite where the policy is.
    Returns:
      `[...]`, at least float32. At most `beta * log Z`, which `optimal_policy` reaches.
    """
    (policy, reward), exists = candidate_arrays(where, 1, policy_logps=policy_logps, rewards=rewards)
    exists &= policy > -jnp.inf  # what cannot happen costs 0, not 0 * inf
    penalty = implicit_rewards(policy_logps, ref_logps, beta=beta, where=exists)
    return jnp.where(exists, jnp.exp(policy) * (reward - penalty), 0).sum(axis=-1)  # [...]


def dpo_gradient_weight(
    policy_logps: ArrayLike, ref_logps: ArrayLike, *, beta: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """`sigmoid(r_rejected - r_chosen)`: how wrong the implicit rewards are, and how much the pair moves them (Sec. 4).

    Args:
      policy_logps, ref_logps, beta, where: as in `jaxdpo.losses.dpo_loss`.
    Returns:
      `[...]` in (0, 1), at least float32; 0 for pairs that are not complete.
    Example:
      >>> policy, ref = jnp.log(jnp.array([0.3, 0.7])), jnp.log(jnp.array([0.4, 0.6]))
      >>> print(f"{dpo_gradient_weight(policy, ref, beta=1.0):.3f}")
      0.609
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta=beta, where=where)
    check_pair(rewards)
    _, exists = candidate_arrays(where, 2, policy_logps=rewards)
    return jnp.where(exists.all(axis=-1), jax.nn.sigmoid(rewards[..., 1] - rewards[..., 0]), 0)


def dpo_gradient(
    policy_logps: ArrayLike, ref_logps: ArrayLike, *, beta: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
    """Gradient of `dpo_loss` by the log-probabilities of the policy: `beta * dpo_gradient_weight * (-1, 1)` (A.4).

    Args:
      policy_logps, ref_logps, beta, where: as in `jaxdpo.losses.dpo_loss`.
    Returns:
      `[..., 2]`, at least float32; 0 for pairs that are not complete.
    """
    weight = dpo_gradient_weight(policy_logps, ref_logps, beta=beta, where=where)  # [...]
    return beta_option(beta, weight.dtype) * jnp.stack([-weight, weight], axis=-1)


def von_neumann_winner(preferences: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mixture of responses that is preferred to every response with probability 1/2 or more.

    Where preferences go in circles no reward explains them and no response beats all others, but such a mixture exists:
    the maximin strategy of the game in which the preferred response wins. A response that beats all others has all of
    the weight. Of several winners it is one that uses as many responses as possible.

    Args:
      preferences: `[..., responses, responses]` float in [0, 1], how likely the first is preferred to the second; the
        two directions sum to 1, and 1/2 is a tie. Anything else is an InputError, unless it is traced.
      where: `[..., responses]` bool, which responses exist.
    Returns:
      `[..., responses]` probabilities, at least float32; 0 for responses that do not exist. No response is preferred to
      the mixture by more than 1e-5 in float32 and 1e-13 in float64. Reverse-mode gradients do not exist.
    References:
      Dudík et al. 2015, https://arxiv.org/abs/1502.06362; for language models: Munos et al. 2023,
      https://arxiv.org/abs/2312.00886. Solver: Mehrotra 1992, https://doi.org/10.1137/0802028.
    Example:
      >>> rock_paper_scissors = jnp.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
      >>> print(von_neumann_winner(rock_paper_scissors).round(4))
      [0.3333 0.3333 0.3333]
    """
    wins = jnp.asarray(preferences)
    wins = wins.astype(jnp.promote_types(wins.dtype, jnp.float32))
    with explain(f"preferences have shape {wins.shape}; allowed: [..., responses, responses]; pass a square matrix"):
        chex.assert_axis_dimension_gt(wins, -2, 0)
        chex.assert_axis_dimension(wins, -1, wins.shape[-2])
    _, exists = candidate_arrays(where, 1, preferences=wins[..., 0])
    one, other = exists[..., None], exists[..., None, :]  # [..., responses, 1], [..., 1, responses]
    wins = jnp.where(
        one & other, wins, 0.5 * one + 0.5 * ~other
    )  # [..., responses, responses], those absent always lose
    off = jnp.abs(wins + wins.mT - 1)
    if not isinstance(wins, jax.core.Tracer) and not ((off < 1e-5) & (wins >= 0)).all():
        raise InputError(
            f"preferences go down to {wins.min():.6g}, two directions miss 1 by {off.max():.6g}; allowed: 0, and 1e-5; "
            "pass p[i, j], how likely i is preferred to j, with 1/2 on the diagonal"
        )
    mixture = jnp.where(exists, jnp.vectorize(_maximin, signature="(n,n)->(n)")(wins - wins.mT), 0)
    return mixture / jnp.maximum(mixture.sum(axis=-1, keepdims=True), jnp.finfo(mixture.dtype).tiny)


def _maximin(payoff: jax.Array) -> jax.Array:
    """A mixture `p` with `p @ payoff >= 0` in an antisymmetric game `[n, n]`.

    Follows `p * slack = gap / n` to a gap of 0 by Mehrotra's predictor and corrector, in some 15 steps. `sum(p)` stays
    1, since all gains cancel, and `slack = p @ payoff + gap` positive, so no answer to `p` gains more than the gap.
    """
    n, eps = payoff.shape[0], jnp.finfo(payoff.dtype).eps
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # accelerators round more by default

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        p, slack, gap, count = state

        def direction(kept: ArrayLike, curvature: ArrayLike) -> tuple[jax.Array, ...]:
            """Towards the fraction `kept` of the gap: changes of p and slack, and how far both stay positive."""
            target = (kept * gap / n - curvature) / p - slack + (1 - kept) * gap
            dp = jnp.linalg.solve(payoff.T + jnp.diag(slack / p), target)
            dslack = product(dp, payoff) - (1 - kept) * gap
            return dp, dslack, 1 / jnp.maximum(jnp.maximum(-dp / p, -dslack / slack).max(), 1)

        dp, dslack, reach = direction(0, 0)
        kept = (1 - reach) ** 3
        dp, dslack, reach = direction(kept, dp * dslack)
        share = 0.99 * reach
        return p + share * dp, slack + share * dslack, gap * (1 - share * (1 - kept)), count + 1

    p, gap = jnp.full(n, 1 / n, payoff.dtype), jnp.asarray(2, payoff.dtype)
    start: tuple[jax.Array, ...] = (p, product(p, payoff) + gap, gap, jnp.asarray(0))
    return jax.lax.while_loop(lambda state: (state[2] > 16 * eps) & (state[3] < 100), step, start)[0]
