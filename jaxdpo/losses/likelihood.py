r"""Likelihood of the answers themselves: supervised fine-tuning, and the baselines that the DPO paper compares with.

No reference and no reward: the chosen answer is made likely, and with `unlikelihood_loss` the rejected one unlikely.
Fine-tuning counts every token of a step alike, so a long answer weighs more than a short one. A loss per group says
the same once each answer's negative log-probability is divided by the mean number of tokens of the answers: its mean
over the groups is the mean over the tokens.

>>> import jax.numpy as jnp
>>> from jaxdpo.losses import sft_loss
>>> logps, lengths = jnp.array([[-6.0, -9.0], [-30.0, -8.0]]), jnp.array([[2, 3], [10, 4]])
>>> losses = sft_loss(logps, lengths=lengths)  # of the first candidates: 12 tokens in two groups
>>> print(losses, losses.mean() == (6 + 30) / (2 + 10))
[1. 5.] True

Where only a part of a step is at hand, one of its microbatches, the caller knows the mean number of tokens:

>>> print(sft_loss(logps[:1], lengths=lengths[:1], mean_length=6.0))
[1.]
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import best_candidate, candidate_arrays, check_pair, option


def mean_over_groups(values: jax.Array, counts: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Mean of the values that count, over all devices of an axis; 0 where none does.

    Args:
      values: `[...]` float.
      counts: `[...]` bool, which values count; the rest must be finite.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the values are split; None: all are here.
    Returns:
      A scalar in the dtype of the values.
    """
    total, number = jnp.where(counts, values, 0).sum(), counts.sum().astype(values.dtype)
    if axis_name is not None:
        total, number = jax.lax.psum((total, number), axis_name)
    return total / jnp.maximum(number, 1)


def sft_loss(
    policy_logps: ArrayLike,
    *,
    lengths: ArrayLike,
    mean_length: ArrayLike | None = None,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Supervised fine-tuning on the best candidate; on preference data this is the DPO paper's Preferred-FT.

    .. math:: -\log π_w / \overline{n_w}

    Its mean over the groups is TRL's mean over the tokens of the chosen completions, of the whole step rather than of
    each microbatch apart. Add it to a preference loss with a small weight to keep chosen answers likely.

    Args:
      policy_logps: `[..., candidates]` float, summed log-probability of each completion, best first, nats.
      lengths: same shape, number of tokens of each completion.
      mean_length: mean number of tokens of the best completions of all groups in the step, may be traced; below 1 it
        is 1. None: of the given groups.
      axis_name: axis of `jax.pmap` or `jax.shard_map` over which the groups are split, for `mean_length=None`.
      where: `[..., candidates]` bool, which candidates exist. Groups without one return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats per token, at least float32, not reduced.
    Raises:
      InputError: (a ValueError) if shapes differ or `mean_length` is out of range; the message states the value.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Sec. 6 (Preferred-FT); as a term of a preference loss:
      Liu et al. 2024, https://arxiv.org/abs/2405.16436, and Pang et al. 2024, https://arxiv.org/abs/2404.19733.
    Example:
      >>> print(sft_loss(jnp.array([-6.0]), lengths=jnp.array([3])))  # one answer: its mean over tokens
      2.0
    """
    (policy, tokens), exists = candidate_arrays(where, 1, policy_logps=policy_logps, lengths=lengths)
    best = best_candidate(exists)  # [..., candidates], one per group that counts
    if mean_length is None:
        mean_length = mean_over_groups(jnp.where(best, tokens, 0).sum(axis=-1), exists.any(axis=-1), axis_name)
    else:
        allowed = "0 or more, the mean number of tokens, such as 120.5"
        mean_length = option("mean_length", mean_length, allowed, lambda n: 0 <= n < math.inf, policy.dtype)
    return -jnp.where(best, policy, 0).sum(axis=-1) / jnp.maximum(mean_length, 1)  # [...]


def unlikelihood_loss(
    policy_logps: ArrayLike, *, unlikelihood_alpha: ArrayLike = 0.1, where: ArrayLike | None = None
) -> jax.Array:
    r"""The DPO paper's Unlikelihood baseline: make the chosen answer likely and the rejected one unlikely.

    .. math:: -\log π_w + α \log π_l

    The loss has no lower bound: for any `α > 0` it falls for ever as the rejected answer becomes unlikely, and nothing
    holds the policy back, which is why the paper found it to degenerate where answers are long. It is here to
    reproduce that comparison. Unlikelihood training in the sense of Welleck et al. is another loss: for each unwanted
    token it adds `-log(1 - p)`, which stays above 0.

    Args:
      policy_logps: `[..., 2]` float, summed log-probability of the chosen and the rejected completion, nats.
      unlikelihood_alpha: weight in [0, 1] of the rejected completion, may be traced; 0 leaves Preferred-FT, counted in
        sums. The paper tried 0.05, 0.1, 0.5 and 1.
      where: `[..., 2]` bool, which candidates exist. Pairs that are not complete return 0 and get zero gradient.
    Returns:
      `[...]` loss in nats, at least float32, not reduced; of either sign.
    Raises:
      InputError: (a ValueError) if there are not two candidates, or `unlikelihood_alpha` is out of range.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Sec. 6 (Unlikelihood); Welleck et al. 2019,
      https://arxiv.org/abs/1908.04319, for the loss over tokens.
    Example:
      >>> print(unlikelihood_loss(jnp.array([-6.0, -9.0]), unlikelihood_alpha=0.5))
      1.5
    """
    (policy,), _ = candidate_arrays(where, 2, policy_logps=policy_logps)
    check_pair(policy)
    alpha = option("unlikelihood_alpha", unlikelihood_alpha, "0 to 1, such as 0.1", lambda a: 0 <= a <= 1, policy.dtype)
    return alpha * policy[..., 1] - policy[..., 0]  # [...], 0 for incomplete pairs, whose log-probs are 0 here
