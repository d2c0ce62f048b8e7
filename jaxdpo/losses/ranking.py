r"""Plackett-Luce: the likelihood of a whole ranking, for any number of candidates, with ties and partial observation.

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

Where less than an order was observed, `ranks` says what was: equal ranks are a tie, and candidates below an observed
top k are all `UNRANKED`, the tie at the end. The likelihood is then the sum over all orders that agree:

>>> from jaxdpo.types import UNRANKED
>>> ranks = jnp.array([[0, 0, 1], [0, UNRANKED, UNRANKED], [0, 0, 0]])  # two beat one, one beats two, nothing seen
>>> print(jnp.exp(-plackett_luce_loss(jnp.zeros((3, 3)), ranks=ranks)).round(4))
[0.3333 0.3333 1.    ]

That sum has `m!` terms for `m` tied candidates, and one integral in their place. Give every candidate an alarm clock
that rings at rate `exp(r)`: they ring in a Plackett-Luce order, and the first of those ranked below, together, is a
clock of rate `exp(R)`, `R` the log-sum-exp of their rewards. With `e^x` the time at which it rings in units of its
mean, all tied candidates `B` ring before it with probability

.. math:: \int e^{x - e^x} \prod_{i \in B} \big(1 - \exp(-e^{x + r_i - R})\big) \, dx

The integrand is positive, entire in `x`, and decays at least as `e^x` to the left and doubly exponentially to the right
of a peak whose place is known, so the trapezoid rule is exact to rounding with a few dozen nodes.
"""

import functools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, explain
from jaxdpo.losses._scores import Wide, candidate_scores, subtract
from jaxdpo.losses.divergences import reverse_kl


def plackett_luce_loss(
    rewards: ArrayLike, *, ranks: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Negative log-likelihood of the observed ranking under Plackett-Luce.

    .. math:: -\log \prod_k \frac{e^{r_k}}{\sum_{j \ge k} e^{r_j}} = -\sum_k \log σ(r_k - \log \sum_{j > k} e^{r_j})

    A sum, not a mean, over the duels of a ranking, so it is a log-probability: over all orders of the same candidates
    the probabilities sum to 1, and longer rankings weigh more. Ties and a top k make it the probability of a set of
    orders, exact to rounding; what was not observed costs nothing, so a tie of all candidates is 0 without gradient.

    Args:
      rewards: `[..., candidates]` float, best first where `ranks` is None.
      ranks: `[..., candidates]` int, 0 is best, equal values tie, `jaxdpo.types.UNRANKED` is below the observed top k.
        Only their order matters, and candidates may stand in any. None: no ties, as they stand. May be traced. With
        ranks the gradient takes about 6 kB per candidate in float32 (four candidates, `benchmarks/losses.py`).
      where: `[..., candidates]` bool, which candidates exist; those that do not may stand anywhere. Groups of fewer
        than two return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ or `ranks` are not integers.
    References:
      Plackett 1975, https://doi.org/10.2307/2346567; Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 18;
      the integral over unordered samples: Kool et al. 2020, https://arxiv.org/abs/2002.06043.
    Example:
      >>> print(f"{plackett_luce_loss(jnp.zeros(4)):.4f}")  # log 4!: all orders are equally likely
      3.1781
      >>> print(f"{plackett_luce_loss(jnp.zeros(4), ranks=jnp.array([1, 0, 1, 0])):.4f}")  # log 6: so are all pairs
      1.7918
    """
    (rewards,), exists = candidate_arrays(where, 2, rewards=rewards)
    return _observed(rewards[..., None, :] - rewards[..., None], exists, ranks)  # [...]


def _observed(gap: jax.Array, exists: jax.Array, ranks: ArrayLike | None) -> jax.Array:
    """The loss `[...]` from `[..., k, j]` rewards r_j - r_k."""
    both = exists[..., None, :] & exists[..., None]  # [..., k, j]
    if ranks is None:
        below = jnp.triu(both, k=1)  # [..., k, j], both exist and j is ranked below k
    else:
        ranks = checked_ranks(ranks, exists.shape)
        below = both & (ranks[..., None, :] > ranks[..., None])
    # All pairs of a few candidates, not one cumulative log-sum-exp of rewards: for three tied at 1e4 in float32 that is
    # off by 1e-4, this by 1e-7.
    soft_max = jax.nn.logsumexp(gap, axis=-1, where=below)  # [..., k], -inf where no candidate is below
    duels = jax.nn.softplus(soft_max)  # [..., k], softplus(x) = -log σ(-x), which is 0 at -inf
    if ranks is None:
        return duels.sum(axis=-1)  # [...]
    tied = both & (ranks[..., None, :] == ranks[..., None])  # [..., k, j], k with itself too
    alone = tied.sum(axis=-1) == 1  # [..., k]
    return (jnp.where(alone, duels, 0) + _tie_losses(soft_max, tied)).sum(axis=-1)  # [...]


def checked_ranks(ranks: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Ranks as an array; InputError unless they are integers of this shape."""
    ranks = jnp.asarray(ranks)
    with explain(
        f"ranks is {ranks.dtype} of shape {ranks.shape}; allowed: integers of the shape of the candidates, {shape}; "
        "pass one rank per candidate, 0 for the best"
    ):
        chex.assert_type(ranks, int)
        chex.assert_shape(ranks, shape)
    return ranks


def _tie_losses(soft_max: jax.Array, tied: jax.Array) -> jax.Array:
    """-log P(all tied candidates are drawn before all below them), at the first of each tie, else 0.

    Args:
      soft_max: `[..., k]` R - r_k, R the log-sum-exp of the rewards below; -inf where there is none.
      tied: `[..., k, j]` bool, which candidates tie with k, itself included.
    """
    # The peak is between 0 and log(1 + m) for m tied. Nodes that are 2π/f apart err most for late alarms, relatively by
    # |Γ(1 + m + if)| / Γ(1 + m), which this f keeps below rounding for any m.
    candidates, rounding = soft_max.shape[-1], 2 - math.log(jnp.finfo(soft_max.dtype).eps)
    lowest, highest = -rounding, math.log(candidates) + 4
    frequency = math.sqrt(2 * rounding * candidates + (0.8 * rounding) ** 2)
    nodes = math.ceil((highest - lowest) * frequency / (2 * math.pi))
    x = jnp.linspace(lowest, highest, nodes, dtype=soft_max.dtype).reshape(*[1] * soft_max.ndim, -1)  # [..., 1, nodes]

    counts = (tied.sum(axis=-1) > 1) & (soft_max > -jnp.inf)  # [..., k], ties that something is below
    rung, shift = _log_rung(x, jnp.where(counts, soft_max, 0)[..., None])  # [..., k, nodes], [..., k, 1]
    # Accelerators round the factors of a matrix product, here up to 1e4 nats, unless told otherwise.
    matmul = functools.partial(jnp.matmul, tied.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    log_weights = jax.nn.log_softmax(x - jnp.exp(x), axis=-1)  # the trapezoid rule, its weights made to sum to 1
    losses = matmul(shift)[..., 0] - jax.nn.logsumexp(log_weights + matmul(rung), axis=-1)  # [..., k]
    first = ~jnp.tril(tied, k=-1).any(axis=-1)  # [..., k], no candidate before it ties with it
    return jnp.where(counts & first, losses, 0)


def _log_rung(x: jax.Array, delay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`log(1 - exp(-e^(x - delay)))` plus a shift, and the shift, a constant; exact for delays from -2e4 to 2e4.

    Without a shift the value for a delay of 1e4 is near -1e4, where steps of float32 are 1e-3.
    """
    cut = -2.3  # e^cut = 0.1: below, the series' next term is under 1e-15; above, 1 - exp(-e^z) keeps all but a digit
    z, shift = x - delay, jax.lax.stop_gradient(jax.nn.relu(delay))
    u = jnp.exp(jnp.minimum(z, cut))
    early = x - (delay - shift) - u / 2 + u**2 / 24 - u**4 / 2880 + u**6 / 181440
    late = jnp.log1p(-jnp.exp(-jnp.exp(jnp.clip(z, cut, 7)))) + shift  # log1p(0) from 6.7 on, e^z overflows at 89
    return jnp.where(z < cut, early, late), shift


def plackett_luce_dpo_loss(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike = 0.1,
    ranks: ArrayLike | None = None,
    divergence: Callable[[jax.Array], jax.Array] = reverse_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO for rankings: Plackett-Luce on the implicit rewards. Equals `dpo_loss` for two candidates.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, nats, best first where `ranks`
        is None.
      ref_logps: same shape, under the reference policy; None: reference-free, see `implicit_rewards`.
      beta: strength of the KL penalty, above 0; may be traced.
      ranks: `[..., candidates]` int, ties and partial rankings, see `plackett_luce_loss`; None: as they stand.
      divergence: score of a log-ratio, `[...]` to `[...]`, see `jaxdpo.losses.divergences`.
      where: `[..., candidates]` bool, which candidates exist. Groups of fewer than two return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced; `log K!` for an order of K candidates where policy and
      reference agree.
    Raises:
      InputError: (a ValueError) if shapes differ, `ranks` are not integers or `beta` is out of range; the message
        states the value.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Appendix A.3, Eq. 20.
    Example:
      >>> logps = jnp.array([-12.0, -15.0, -11.0])
      >>> print(f"{plackett_luce_dpo_loss(logps, logps):.4f}")  # log 3!: the policy is its reference
      1.7918
    """
    scores, exists = candidate_scores(policy_logps, ref_logps, divergence, where)  # [..., candidates]
    gap = subtract(Wide(*(part[..., None, :] for part in scores)), Wide(*(part[..., None] for part in scores)))
    return _observed(beta_option(beta, gap.dtype) * gap, exists, ranks)  # [...], from [..., k, j]


def all_pairs(
    ranks: ArrayLike | None, where: ArrayLike | None, **arrays: ArrayLike
) -> tuple[dict[str, jax.Array], jax.Array]:
    """All ordered pairs of every group's candidates, the better one first.

    Args:
      ranks: `[..., candidates]` int, see `plackett_luce_loss`; None: as they stand.
      where: `[..., candidates]` bool, which candidates exist; None: all.
      **arrays: `[..., candidates]` of one shape, one number per candidate.
    Returns:
      The arrays by name, `[..., pairs, 2]` with 0 at candidates that do not exist; and bool `[..., pairs]`, which pairs
      do: both candidates exist and do not tie. K candidates have `K (K - 1) / 2` pairs.
    Raises:
      InputError: (a ValueError) if shapes differ or `ranks` are not integers.
    Example:
      >>> pairs, exists = all_pairs(jnp.array([1, 0, 1]), None, rewards=jnp.array([5.0, 6.0, 7.0]))
      >>> print(pairs["rewards"][exists])
      [[6. 5.]
       [6. 7.]]
    """
    values, exists = candidate_arrays(where, 2, **arrays)
    i, j = jnp.triu_indices(exists.shape[-1], k=1)  # [pairs] each
    counts, swap = exists[..., i] & exists[..., j], jnp.zeros((*exists.shape[:-1], i.size), bool)  # [..., pairs]
    if ranks is not None:
        ranks = checked_ranks(ranks, exists.shape)
        counts &= ranks[..., i] != ranks[..., j]
        swap = ranks[..., i] > ranks[..., j]

    def pair(x: jax.Array) -> jax.Array:
        better, worse = jnp.where(swap, x[..., j], x[..., i]), jnp.where(swap, x[..., i], x[..., j])
        return jnp.stack([better, worse], axis=-1)  # [..., pairs, 2]

    return dict(zip(arrays, map(pair, values), strict=True)), counts
